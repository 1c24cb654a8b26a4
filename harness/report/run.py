"""A finished run: its tables and its sweep file, read from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.config import parse_yaml, resolve_path
from harness.core import Predictions
from harness.errors import RequestError
from harness.files import file_name
from harness.report.board import Row
from harness.results.tables import LEDGER, NEIGHBOURS, PREDICTIONS, RESULTS, TRIALS, conformed


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A folder of results. Tables that are not there are empty; results must be there."""

    out: Path
    results: Sequence[Row]
    trials: Sequence[Row]
    ledger: Sequence[Row]
    sweep: Mapping[str, Any]
    """sweep.yaml as plain values; empty where there is none."""

    @property
    def shards(self) -> str | None:
        """Path or URL of the folder that holds the data sets, as sweep.yaml says."""
        location = self.sweep.get("shards")
        return resolve_path(location, self.out) if isinstance(location, str) else None

    def predictions(self, encoder: str, task: str, protocol: str | None) -> Predictions | None:
        """The chosen head's predictions of every test item; None where none were kept, or not enough to compute a metric."""
        path = self._table("predictions", encoder, task)
        if not path.exists():
            return None
        table = _read(path, PREDICTIONS)
        table = table.filter(pa.compute.equal(table["protocol"], protocol))
        if any(table[name].null_count for name in ("key", "group", "target", "prediction")):
            return None
        return Predictions(
            keys=table["key"].to_pylist(),
            groups=table["group"].to_pylist(),
            targets=table["target"].to_numpy(),
            predictions=table["prediction"].to_numpy(),
            scores=table["score"].to_numpy().astype(np.float64),
        )

    def neighbours(self, encoder: str, task: str, protocol: str | None) -> list[dict[str, Any]]:
        """Rows of the gallery's table, in its order; empty where nothing was kept."""
        path = self._table("neighbours", encoder, task)
        rows: list[dict[str, Any]] = _read(path, NEIGHBOURS).to_pylist() if path.exists() else []
        needed = ("query", "rank", "neighbour", "relevant")
        return [row for row in rows if row["protocol"] == protocol and all(row[name] is not None for name in needed)]

    def _table(self, folder: str, encoder: str, task: str) -> Path:
        return self.out / folder / file_name(encoder) / f"{task}.parquet"


def read_run(out: Path) -> Run:
    """Read the run in `out`. Raises RequestError where it holds no results, a table of another schema, or a sweep.yaml that is not plain YAML."""
    results = out / "results.parquet"
    if not results.exists():
        raise RequestError(f"{results}: no such file; expected the folder of a run, which python -m harness.sweep writes")
    table = _read(results, RESULTS)
    for name in ("encoder", "task", "dataset"):
        if table[name].null_count:
            raise RequestError(f"{results}: expected a column {name} that says what each row is of, got rows without; run the sweep again")
    return Run(
        out=out,
        results=table.to_pylist(),
        trials=_rows(out / "trials.parquet", TRIALS),
        ledger=_rows(out / "ledger.parquet", LEDGER),
        sweep=_sweep(out / "sweep.yaml"),
    )


def random_twins(sweep: Mapping[str, Any]) -> dict[str, str | None]:
    """The sweep's encoders with random weights, each with the one encoder made of the same architecture; None where there is not exactly one."""
    made_of: dict[str, str | None] = {}
    random: set[str] = set()
    for entry in sweep.get("encoders") or ():
        plain = {"encoder": entry} if isinstance(entry, str) else entry
        if not isinstance(plain, dict):
            continue
        source = plain.get("encoder") or plain.get("architecture")
        is_random = plain.get("random") is True
        name = plain.get("name") or (f"{source} random" if is_random else source)
        made_of[str(name)] = source
        if is_random:
            random.add(str(name))
    twins: dict[str, str | None] = {}
    for name in random:
        partners = [other for other, source in made_of.items() if other not in random and source == made_of[name]]
        twins[name] = partners[0] if len(partners) == 1 else None
    return twins


def _rows(path: Path, schema: pa.Schema) -> list[dict[str, Any]]:
    return _read(path, schema).to_pylist() if path.exists() else []


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path}: expected a Parquet table, got: {' '.join(str(error).split())[:200]}; run the sweep again") from None
    try:
        return conformed(table, schema)
    except ValueError as error:
        raise RequestError(f"{path}: {error}; run the sweep again, or read it with the version that wrote it") from None


def _sweep(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return content if isinstance(content, dict) else {}
