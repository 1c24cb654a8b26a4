"""The demo's values as they stand, in one compact table: what a refactor must reproduce.

`make demo-values` renews it from runs/demo. That is right after a change that means to move a value, which the changelog then names, and after a new
version of a package that the values rest on; never to make a test pass.
"""

from __future__ import annotations

import csv
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.results.tables import read_table

TABLE = Path(__file__).parents[1] / "values" / "demo.csv"
KEY = ("encoder", "task", "protocol", "metric")
VALUES = ("value", "ci_low", "ci_high", "n", "n_failed", "status", "readout", "lr")
NEAR = 0.04
"""How far a value may lie from the table's on another processor: two of the sample's 54 test images. Features agree to rounding across processors."""


def processor() -> str:
    """The model of this machine's CPU, as Linux names it: bytes of bf16 products differ between makers."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    described = dict(line.split(":", 1) for line in lines if line.startswith(("vendor_id", "cpu family", "model\t")))
    return " ".join(value.strip() for value in described.values())


def read_run(out: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], dict[str, Any]]]:
    """What a run was made with, and its records' values by (encoder, task, protocol, metric)."""
    rows = read_table(out / "results.parquet")
    versions = {package: version for package, version in json.loads(rows[0]["versions"]).items() if package != "partwise"}
    made_with = {"device": rows[0]["device"], "processor": processor(), "versions": versions}
    rows = [row | {"lr": json.loads(row["hyperparameters"]).get("lr")} for row in rows]
    return made_with, {tuple(row[name] for name in KEY): {name: row[name] for name in VALUES} for row in rows}


def write(made_with: Mapping[str, Any], values: Mapping[tuple[str, ...], Mapping[str, Any]], path: Path = TABLE) -> None:
    """Floats are written so that reading gives the same bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {json.dumps(made_with, sort_keys=True)}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*KEY, *VALUES))
        writer.writerows([*key, *(_text(value) for value in row.values())] for key, row in sorted(values.items()))


def read(path: Path = TABLE) -> tuple[dict[str, Any], dict[tuple[str, ...], dict[str, str]]]:
    """What the table was made with, and its values as text."""
    with path.open(newline="", encoding="utf-8") as file:
        made_with = json.loads(file.readline().removeprefix("# "))
        rows = list(csv.DictReader(file))
    return made_with, {tuple(row[name] for name in KEY): {name: row[name] for name in VALUES} for row in rows}


def differences(out: Path, path: Path = TABLE) -> list[str]:
    """A line for every record of a run that is not the table's.

    To the bit where processor, device type and packages are those of the table; elsewhere values within NEAR, counts and statuses exactly.
    """
    here, run = read_run(out)
    recorded, table = read(path)
    exact = here == recorded
    lines = [f"{' '.join(key)}: missing" for key in sorted(table.keys() - run.keys())]
    lines += [f"{' '.join(key)}: not in the table" for key in sorted(run.keys() - table.keys())]
    for key in sorted(table.keys() & run.keys()):
        lines += [f"{' '.join(key)}: {line}" for line in _apart(run[key], table[key], exact=exact)]
    return lines


def _apart(row: Mapping[str, Any], expected: Mapping[str, str], *, exact: bool) -> Iterable[str]:
    for name in VALUES if exact else ("value", "n", "n_failed", "status"):
        text = _text(row[name])
        if text == expected[name]:
            continue
        close = not exact and name == "value" and text and expected[name] and abs(float(text) - float(expected[name])) <= NEAR
        if not close:
            yield f"{name} expected {expected[name] or 'null'}, got {text or 'null'}"


def _text(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    write(*read_run(Path(sys.argv[1])))
    print(f"{TABLE}: {len(read()[1])} values")
