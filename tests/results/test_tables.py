"""The atomic writing of tables, and schemas that may grow."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from harness.errors import RunError
from harness.files import publish
from harness.results import tables
from harness.results.tables import conformed


def test_a_name_that_the_file_system_refuses_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 400)
    with pytest.raises(RunError, match=r"cannot write .*File name too long"), publish(path) as temporary:
        temporary.write_bytes(b"")


# --- schemas that may grow --------------------------------------------------------------------------------------------

FIRST = {
    "results": "run_id encoder weights_sha256 params_m task level dataset dataset_version split view readout probe protocol protocol_fields metric "
    "value ci_low ci_high n n_failed hyperparameters selected_on num_trials seed status error bank_keys seconds images_per_second device precision "
    "versions git_commit created_at",
    "trials": "run_id encoder task protocol round head lr readout metric val_value epochs seconds status error",
    "ledger": "bank_key dataset split shard expected seen failed duplicates reasons attempts node sha256 status",
    "predictions": "key group protocol target prediction score encoder task",
    "neighbours": "query protocol rank neighbour similarity relevant encoder task",
}
"""Columns of the first release, frozen: none may go, or change its type, unless the schema's version is raised."""
TEXT = "string"
TYPES = {
    "double": "params_m value ci_low ci_high seconds images_per_second lr val_value score similarity",
    "int64": "n n_failed num_trials seed round head epochs expected seen failed duplicates attempts target prediction rank num_classes",
    "bool": "relevant",
    "list<element: string>": "bank_keys",
}
"""Type to the columns that have it; all others are text."""
ADDED = {
    "results": "code_versions study_id num_classes class_levels",
    "trials": "study_id",
    "ledger": "",
    "predictions": "",
    "neighbours": "",
}
"""Columns added since. The rule: a new one is nullable, comes last, is written down here, and leaves the version of the schema as it is; tables of
before are read, with null in it. A column that is written down here is frozen as well."""


def schema_of(name: str) -> pa.Schema:
    schema: pa.Schema = getattr(tables, name.upper())
    return schema


@pytest.mark.parametrize("name", FIRST)
def test_columns_are_frozen_and_new_ones_come_last(name: str) -> None:
    schema, first, added = schema_of(name), FIRST[name].split(), ADDED[name].split()
    assert sorted(schema.names) == sorted(first + added), "write a new column down in ADDED, and put none away"
    assert schema.names[len(first) :] == added, "a new column comes last"
    assert all(field.nullable for field in schema), "a table of before has null in it"
    types = {column: kind for kind, columns in TYPES.items() for column in columns.split()}
    assert {field.name: str(field.type).replace("item:", "element:") for field in schema} == {name: types.get(name, TEXT) for name in schema.names}
    assert schema.metadata == {b"schema_version": b"1"}, "raised only where a column changes its type or its meaning, or goes"


@pytest.mark.parametrize("name", FIRST)
def test_a_table_of_other_columns_is_read(name: str) -> None:
    schema = schema_of(name)
    table = pa.Table.from_pylist([dict.fromkeys(schema.names)], schema=schema)
    for column in schema.names:
        lacking = table.drop_columns([column]).append_column("of_a_later_version", pa.array([7]))
        completed = conformed(lacking, schema)
        assert completed.schema == schema
        assert completed[column].to_pylist() == [None]


@pytest.mark.parametrize(
    ("version", "is_read"), [("1", True), ("0", False), ("2", False), ("999", False), ("none", False), ("-1", False), ("1.0", False)]
)
def test_a_raised_version_refuses(version: str, is_read: bool) -> None:
    table = schema_of("trials").empty_table().replace_schema_metadata({"schema_version": version})
    if is_read:
        assert conformed(table, schema_of("trials")).num_rows == 0
        return
    with pytest.raises(ValueError, match=f"expected a table of schema 1, got {version}"):
        conformed(table, schema_of("trials"))


def test_a_table_without_a_version_is_none_of_ours() -> None:
    with pytest.raises(ValueError, match="got none"):
        conformed(pa.table({"key": ["a"]}), schema_of("predictions"))


def test_a_column_of_another_type_is_named() -> None:
    schema = schema_of("predictions")
    changed = schema.set(schema.get_field_index("score"), pa.field("score", pa.string()))
    with pytest.raises(ValueError, match="expected a column score of double, got string"):
        conformed(changed.empty_table(), schema)
