"""`python -m bench.document`: docs/benchmarks.md and docs/benchmarks.svg from bench/results/, of every machine its newest measurements."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.picture import svg
from bench.results import FOLDER, Measurement, latest, load
from bench.rows import Row, ratio_text, target_text, verdict_text

DOCS = Path(__file__).parent.parent / "docs"
_HEAD = """# Timings

<!-- python -m bench.document writes this page from bench/results/ -->

`make bench` measures everything in `bench/` (`make bench ONLY=knn` one of it, `make gpu` what needs a GPU), prints this table and keeps the
measurements in `bench/results/`; `python -m bench.document` then writes this page. Every ratio is of medians taken in turns in one run, against a
bare lower bound or against what one would take instead. Machines are noisy: look at the ratios. What bounds a row, and what became of the attempts to
move it, is in [bench/NOTES.md](../bench/NOTES.md).
"""
_ABOUT = ("python", "torch", "torchvision", "timm", "ray", "pyarrow", "numpy", "pillow", "faiss-cpu", "scikit-learn")


def document(measurements: Sequence[Measurement]) -> str:
    """The page, Markdown."""
    lines = [_HEAD]
    for place, newest in enumerate(latest(measurements).values()):
        lines += _machine(list(newest.values()), picture_name(place))
    return "\n".join(lines) + "\n"


def pictures(measurements: Sequence[Measurement]) -> dict[str, str]:
    """File name to SVG, one a machine."""
    return {
        picture_name(place): svg(machine_text(next(iter(newest.values())).machine), [row for one in newest.values() for row in one.rows])
        for place, newest in enumerate(latest(measurements).values())
    }


def picture_name(place: int) -> str:
    return f"benchmarks{f'-{place}' if place else ''}.svg"


def machine_text(machine: Mapping[str, object]) -> str:
    return f"{machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"


def _machine(newest: Sequence[Measurement], picture: str) -> Iterator[str]:
    """One machine's table, its picture, and what the ratios were worked out from."""
    first = max(newest, key=lambda one: one.date)
    yield f"## {machine_text(first.machine)}\n"
    yield f"{first.machine['memory_gib']} GiB of memory, {first.machine['system']}; {_versions(first.versions)}.\n"
    yield "| row | ratio | target | | what / against |\n|---|---|---|---|---|"
    for one in newest:
        for row in one.rows:
            yield f"| {row.row} | {ratio_text(row)} | {target_text(row)} | {verdict_text(row)} | {_about(row)} |"
    yield f"\n![How far each row is from its target]({picture})\n"
    yield "| rows | measured | date | commit |\n|---|---|---|---|"
    for one in newest:
        for names, values in _measured(one):
            yield f"| {names} | {values} | {one.date} | {(one.commit or 'none')[:8]} |"
    yield ""


def _measured(one: Measurement) -> Iterator[tuple[str, str]]:
    """Names of rows and what they were worked out from, rows of the same measurements together."""
    sharing: dict[str, list[str]] = {}
    for row in one.rows:
        if row.measured:
            sharing.setdefault("; ".join(f"{name} {value:,.4g}" for name, value in row.measured.items()), []).append(row.row)
    for values, rows in sharing.items():
        yield ", ".join(rows), values


def _about(row: Row) -> str:
    if row.ratio is None:
        return row.reason or "–"
    return f"{row.what} / {row.against}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {versions[package]}" for package in _ABOUT if package in versions)


def main() -> int:
    measurements = [one for path in sorted(FOLDER.glob("*.json")) for one in load(path)]
    (DOCS / "benchmarks.md").write_text(document(measurements), encoding="utf-8")
    for name, picture in pictures(measurements).items():
        (DOCS / name).write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
