"""The tables that a run writes: their schemas, in one place, and their atomic writing and reading.

Values such as accuracy, AP and IoU are fractions in [0, 1]; undefined is null, with the reason in `error`. JSON columns hold one document per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.files import publish
from harness.versions import SCHEMA_VERSION

_META = {b"schema_version": str(SCHEMA_VERSION).encode()}


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()), metadata=_META)


RESULTS = _schema(
    run_id=pa.string(),
    encoder=pa.string(),
    weights_sha256=pa.string(),
    params_m=pa.float64(),  # millions of parameters
    task=pa.string(),  # <data set>/<task>
    level=pa.string(),  # object or part
    dataset=pa.string(),
    dataset_version=pa.string(),
    split=pa.string(),
    view=pa.string(),
    readout=pa.string(),
    probe=pa.string(),
    protocol=pa.string(),
    protocol_fields=pa.string(),  # JSON
    metric=pa.string(),
    value=pa.float64(),
    ci_low=pa.float64(),  # 95 %, percentile bootstrap over images; Wilson's where that has no width at 0 and 1
    ci_high=pa.float64(),
    n=pa.int64(),  # items that the value is computed from
    n_failed=pa.int64(),  # samples of the splits used that could not be seen
    hyperparameters=pa.string(),  # JSON
    selected_on=pa.string(),
    num_trials=pa.int64(),  # learning rates tried
    seed=pa.int64(),
    status=pa.string(),  # ok, incomplete, failed, undefined
    error=pa.string(),  # why it is not ok, and notes on the value
    bank_keys=pa.list_(pa.string()),
    seconds=pa.float64(),  # search and scoring of this study
    images_per_second=pa.float64(),  # of the encoder's passes over the task's view, per actor
    device=pa.string(),
    precision=pa.string(),
    versions=pa.string(),  # JSON
    git_commit=pa.string(),
    created_at=pa.string(),  # ISO 8601, UTC
    code_versions=pa.string(),  # JSON: the counters of harness.versions
    study_id=pa.string(),  # names the search in the journal, the cache and trials.parquet; null where there was none
    num_classes=pa.int64(),  # classes that the probe predicts
    class_levels=pa.string(),  # JSON: class -> its class at the level of a metric named <metric>@<level>; null for others
)

TRIALS = _schema(
    run_id=pa.string(),
    encoder=pa.string(),
    task=pa.string(),
    protocol=pa.string(),
    round=pa.int64(),
    head=pa.int64(),
    lr=pa.float64(),
    readout=pa.string(),
    metric=pa.string(),
    val_value=pa.float64(),
    epochs=pa.int64(),
    seconds=pa.float64(),
    status=pa.string(),  # ok, stopped, failed
    error=pa.string(),
    study_id=pa.string(),  # as in results
)

LEDGER = _schema(
    bank_key=pa.string(),
    dataset=pa.string(),
    split=pa.string(),
    shard=pa.string(),
    expected=pa.int64(),
    seen=pa.int64(),
    failed=pa.int64(),
    duplicates=pa.int64(),
    reasons=pa.string(),  # JSON: reason -> affected members or samples
    attempts=pa.int64(),
    node=pa.string(),
    sha256=pa.string(),  # of the bytes that were read
    status=pa.string(),  # ok, incomplete, failed
)

PREDICTIONS = _schema(
    encoder=pa.string(),
    task=pa.string(),
    key=pa.string(),
    group=pa.string(),
    protocol=pa.string(),
    target=pa.int64(),
    prediction=pa.int64(),
    score=pa.float64(),
)

NEIGHBOURS = _schema(
    encoder=pa.string(),
    task=pa.string(),
    query=pa.string(),
    protocol=pa.string(),
    rank=pa.int64(),  # 1 is the nearest
    neighbour=pa.string(),
    similarity=pa.float64(),
    relevant=pa.bool_(),
)


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write `rows` as Parquet, atomically. A row with an unknown or a missing column is a bug and raises ValueError."""
    listed = list(rows)
    for row in listed:
        if set(row) != set(schema.names):
            raise ValueError(f"{path.name}: columns {sorted(set(row) ^ set(schema.names))} do not match the schema")
    with publish(path) as temporary:
        pq.write_table(pa.Table.from_pylist(listed, schema=schema), temporary)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that `write_table` wrote, as dictionaries."""
    return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]


def conformed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table that any version of this code wrote, with the columns of `schema`: missing ones are null, unknown ones are left out.

    Raises ValueError, which names the column, where a column is of another type, or the table of a later schema than this code knows.
    """
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode(errors="replace")
    if not version.isdecimal() or not 1 <= int(version) <= SCHEMA_VERSION:
        raise ValueError(f"expected a table of schema {SCHEMA_VERSION}, got {version}")
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
        elif table.schema.field(field.name).type != field.type:
            raise ValueError(f"expected a column {field.name} of {field.type}, got {table.schema.field(field.name).type}")
        else:
            columns.append(table[field.name])
    return pa.table(columns, schema=schema)
