"""The atomic writing of tables, and schemas that may grow."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from harness import tables
from harness.errors import RunError
from harness.tables import conformed, publish


def test_a_name_that_the_file_system_refuses_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 400)
    with pytest.raises(RunError, match=r"cannot write .*File name too long"), publish(path) as temporary:
        temporary.write_bytes(b"")


# --- schemas that may grow --------------------------------------------------------------------------------------------

SCHEMAS = {
    "results": "run_id encoder weights_sha256 params_m task level dataset dataset_version split view readout probe protocol protocol_fields metric "
    "value ci_low ci_high n n_failed hyperparameters selected_on num_trials seed status error bank_keys seconds images_per_second device precision "
    "versions git_commit created_at",
    "trials": "run_id encoder task protocol round head lr readout metric val_value epochs seconds status error",
    "ledger": "bank_key dataset split shard expected seen failed duplicates reasons attempts node sha256 status",
    "predictions": "key group protocol target prediction score encoder task",
    "neighbours": "query protocol rank neighbour similarity relevant encoder task",
}
"""Columns that runs have been written with: none may go. New ones are added here, and leave the version of the schema as it is."""


def schema_of(name: str) -> pa.Schema:
    schema: pa.Schema = getattr(tables, name.upper())
    return schema


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_column_goes(name: str) -> None:
    assert set(SCHEMAS[name].split()) <= set(schema_of(name).names)
    assert schema_of(name).metadata == {b"schema_version": b"1"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_table_of_other_columns_is_read(name: str) -> None:
    schema = schema_of(name)
    table = pa.Table.from_pylist([dict.fromkeys(schema.names)], schema=schema)
    for column in schema.names:
        lacking = table.drop_columns([column]).append_column("of_a_later_version", pa.array([7]))
        found = conformed(lacking, schema)
        assert found.schema == schema
        assert found[column].to_pylist() == [None]


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
