"""Files of measurements: `bench/results/<date>-<machine>.json`. A later run of some rows on the same day takes their place in its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import Row

FOLDER = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The rows of one benchmark, on one machine."""

    benchmark: str
    """The module's name."""
    date: str
    """UTC day, YYYY-MM-DD."""
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    rows: tuple[Row, ...]


def save(measurements: Sequence[Measurement], folder: Path = FOLDER) -> Path:
    """Write measurements of one day on one machine, beside those of other benchmarks that its file has; the file."""
    first = measurements[0]
    path = folder / f"{first.date}-{first.machine['name']}.json"
    by_benchmark = {one.benchmark: one for one in (*(load(path) if path.exists() else ()), *measurements)}
    plain = {
        "schema": SCHEMA,
        "date": first.date,
        "machine": first.machine,
        "benchmarks": [
            {
                "benchmark": one.benchmark,
                "commit": one.commit,
                "seconds": round(one.seconds, 1),
                "versions": one.versions,
                "rows": [row.to_json() for row in one.rows],
            }
            for _, one in sorted(by_benchmark.items())
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> list[Measurement]:
    """Raises ValueError for a file of another schema."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    if plain.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {plain.get('schema')}; measure again")
    return [
        Measurement(
            benchmark=entry["benchmark"],
            date=plain["date"],
            commit=entry["commit"],
            machine=plain["machine"],
            versions=entry["versions"],
            seconds=entry["seconds"],
            rows=tuple(Row.from_json(row) for row in entry["rows"]),
        )
        for entry in plain["benchmarks"]
    ]


def latest(measurements: Iterable[Measurement]) -> dict[str, dict[str, Measurement]]:
    """Machine to benchmark to its newest measurement there, both by name."""
    newest: dict[str, dict[str, Measurement]] = {}
    for one in sorted(measurements, key=lambda one: (one.machine["name"], one.benchmark, one.date)):
        newest.setdefault(one.machine["name"], {})[one.benchmark] = one
    return newest
