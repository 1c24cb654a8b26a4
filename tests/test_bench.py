"""Every benchmark runs at tiny size; results are kept per day and machine, and the page of them is what the committed results give."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path

import pytest

import bench.__main__ as command
from bench.document import DOCS, document, pictures
from bench.machine import slug
from bench.picture import advantage
from bench.results import FOLDER, Measurement, latest, load, save
from bench.rows import Row, not_measured, table
from bench.running import benchmarks, chosen
from harness.errors import RequestError

ROW = Row(row="x / y", what="x", against="y", ratio=1.23456, target=2.0, lower_is_better=True, measured={"x, s": 1.0, "y, s": 0.5})
MEASURED = Measurement(
    benchmark="one",
    date="2026-01-01",
    commit="c" * 40,
    machine={"name": "m", "processor": "M", "cores": 2, "memory_gib": 8, "gpu": None, "system": "Linux"},
    versions={"torch": "1"},
    seconds=1.0,
    rows=(ROW,),
)


@pytest.mark.parametrize("name", benchmarks())
def test_a_benchmark_runs_at_tiny_size(name: str) -> None:
    rows = importlib.import_module(f"bench.{name}").run(tiny=True)
    assert rows
    for row in rows:
        assert row.ratio is not None, f"{row.row}: {row.reason}"
        assert math.isfinite(row.ratio)
        assert row.ratio >= 0
        assert row.what
        assert row.against
        assert all(math.isfinite(value) for value in row.measured.values())
        assert replace(Row.from_json(row.to_json()), ratio=None, measured={}) == replace(row, ratio=None, measured={})


def test_rows_of_all_benchmarks_have_names_of_their_own() -> None:
    names = [row.row for path in FOLDER.glob("*.json") for one in latest(load(path)).values() for one in one.values() for row in one.rows]
    assert len(names) == len(set(names))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "target", "lower_is_better", "met", "better"),
    [
        (1.0, 2.0, True, True, 2.0),
        (2.0, 2.0, True, True, 1.0),
        (2.0, 1.0, True, False, 0.5),
        (0.9, 0.95, False, False, 0.9 / 0.95),
        (4.0, 2.0, False, True, 2.0),
    ],
)
def test_a_target_is_a_bound_on_the_side_that_is_better(ratio: float, target: float, lower_is_better: bool, met: bool, better: float) -> None:
    row = replace(ROW, ratio=ratio, target=target, lower_is_better=lower_is_better)
    assert row.is_met is met
    assert advantage(row) == pytest.approx(better)


def test_a_row_without_a_ratio_says_why() -> None:
    row = not_measured("gpu", "no GPU", target=0.95, lower_is_better=False)
    assert row.is_met is None
    assert advantage(row) is None
    assert "not measured  ≥ 0.95" in table([ROW, row])
    assert "no GPU" in table([row])
    assert Row.from_json(row.to_json()) == row


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_a_ratio_is_a_finite_number(ratio: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        replace(ROW, ratio=ratio).to_json()


# --- results and their page -------------------------------------------------------------------------------------------


def test_a_later_run_of_one_benchmark_takes_its_place_in_the_file_of_the_day(tmp_path: Path) -> None:
    other = replace(MEASURED, benchmark="two")
    path = save([MEASURED, other], tmp_path)
    assert path == save([replace(other, seconds=9.0)], tmp_path)
    assert path.name == "2026-01-01-m.json"
    assert [(one.benchmark, one.seconds) for one in load(path)] == [("one", 1.0), ("two", 9.0)]
    assert load(path)[0].rows[0].ratio == 1.235


def test_the_page_shows_the_newest_measurement_of_each_benchmark_on_each_machine() -> None:
    old = replace(MEASURED, date="2025-12-31", rows=(replace(ROW, ratio=77.0),))
    elsewhere = replace(MEASURED, machine={**MEASURED.machine, "name": "n", "processor": "N", "gpu": "G"}, rows=(not_measured("z", "no time"),))
    page = document([elsewhere, MEASURED, old])
    assert "| x / y | 1.23 | ≤ 2 | met | x / y |" in page
    assert "| z | not measured | – | – | no time |" in page
    assert "77" not in page
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## M, 2 cores, no GPU", "## N, 2 cores, G"]
    assert set(pictures([elsewhere, MEASURED])) == {"benchmarks.svg", "benchmarks-1.svg"}
    assert "x / y  (≤ 2)" in pictures([MEASURED])["benchmarks.svg"]
    assert pictures([MEASURED]) == pictures([MEASURED])


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    measurements = [one for path in sorted(FOLDER.glob("*.json")) for one in load(path)]
    assert measurements
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == document(measurements), "run python -m bench.document"
    for name, picture in pictures(measurements).items():
        committed = (DOCS / name).read_text(encoding="utf-8")
        assert [line for line in picture.splitlines() if "<text" in line] == [line for line in committed.splitlines() if "<text" in line]


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="expected schema 1, got 0"):
        load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Intel(R) Xeon(R) CPU @ 2.20GHz 2 cores ", "intel-xeon-2-cores"), ("AMD EPYC 9B14 4 cores NVIDIA H100", "amd-epyc-9b14-4-cores-nvidia-h100")],
)
def test_a_machine_is_named_for_file_names(text: str, expected: str) -> None:
    assert slug(text) == expected


# --- the command ------------------------------------------------------------------------------------------------------


def test_an_unknown_benchmark_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "plannings"]) == 2
    assert "did you mean 'planning'?" in capsys.readouterr().err
    assert chosen(["knn", "knn"], gpu=False) == ["knn"]
    with pytest.raises(RequestError):
        chosen(["rows"], gpu=False)


def test_without_a_gpu_what_needs_one_is_refused_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main(["--gpu"]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
