"""Reading a run's folder, and drawing its report from the command line."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harness.errors import RequestError
from harness.files import file_name
from harness.report.__main__ import main
from harness.report.page import write_report
from harness.report.palette import make_palette
from harness.report.run import random_twins, read_run
from tests.helpers.report_example import Example


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return Example(shards=root / "shards", encoders=("alpha", "hub:some/net"), tasks=("object-knn",)).write(root / "out")


def test_every_encoder_has_a_folder_of_its_own_that_is_no_path() -> None:
    names = ["alpha", "timm:vit_small.dino", "hf-hub:a/b", "hf-hub:a_b", "../../etc", "..", ".", "<script>", "a b", "ünï", "a@b=c+d"]
    folders = [file_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in folder and not folder.startswith(".") for folder in folders)


def test_predictions_of_an_encoder_whose_name_is_no_file_name_are_found(run: Path) -> None:
    predictions = read_run(run).predictions("hub:some/net", "tiny/object-knn", "dino")
    assert predictions is not None
    assert len(predictions) == 24
    assert read_run(run).predictions("hub:some/net", "tiny/object-knn", "another") is not None
    assert len(read_run(run).predictions("hub:some/net", "tiny/object-knn", "another") or ()) == 0
    assert read_run(run).predictions("nobody", "tiny/object-knn", "dino") is None


def test_a_random_twin_is_known_by_what_both_are_made_of() -> None:
    encoders = [
        "net",
        {"encoder": "net", "random": True},
        {"name": "mae", "architecture": "vit", "checkpoint": "a.pth"},
        {"name": "dino", "architecture": "vit", "checkpoint": "b.pth"},
        {"name": "vit untrained", "architecture": "vit", "random": True},
    ]
    assert random_twins({"encoders": encoders}) == {"net random": "net", "vit untrained": None}
    assert random_twins({}) == {}


def test_every_encoder_has_a_look_of_its_own_and_twins_resemble_each_other() -> None:
    names = [f"net{i}" for i in range(12)]
    palette = make_palette([*names, "net3 random"], {"net3 random": "net3"})
    assert len({style.colour for style in palette.styles.values()}) == 13
    twin, trained = palette.styles["net3 random"], palette.styles["net3"]
    assert (twin.marker, twin.random, twin.line, twin.face) == (trained.marker, True, "--", "#ffffff")


def test_a_folder_without_results_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("RequestError: ")
    assert "results.parquet" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("table", ["results", "trials", "ledger"])
def test_a_table_of_another_schema_is_refused(run: Path, tmp_path: Path, table: str) -> None:
    for name in ("results", "trials", "ledger"):
        (tmp_path / f"{name}.parquet").write_bytes((run / f"{name}.parquet").read_bytes())
    rewritten = pq.read_table(tmp_path / f"{table}.parquet")
    pq.write_table(rewritten.replace_schema_metadata({"schema_version": "999"}), tmp_path / f"{table}.parquet")
    with pytest.raises(RequestError, match=f"{table}.parquet: expected a table of schema 1, got 999"):
        read_run(tmp_path)


def test_a_run_of_an_earlier_version_is_read(run: Path, tmp_path: Path) -> None:
    """Whose predictions named neither encoder nor task, and whose results had columns that are gone."""
    for path in run.rglob("*.parquet"):
        table = pq.read_table(path)
        if path.parts[len(run.parts)] in ("predictions", "neighbours"):
            table = table.drop_columns(["encoder", "task"])
        else:
            table = table.append_column("of_another_version", table[table.column_names[0]])
        place = tmp_path / path.relative_to(run)
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, place)
    earlier, today = read_run(tmp_path), read_run(run)
    assert (earlier.results, earlier.trials, earlier.ledger) == (today.results, today.trials, today.ledger)
    mine, theirs = (either.predictions("alpha", "tiny/object-knn", "dino") for either in (earlier, today))
    assert mine is not None
    assert theirs is not None
    assert (list(mine.keys), mine.scores.tolist()) == (list(theirs.keys), theirs.scores.tolist())


def test_a_column_of_another_type_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    table = pq.read_table(run / "results.parquet")
    changed = table.set_column(table.column_names.index("value"), "value", table["value"].cast("string"))
    pq.write_table(changed, tmp_path / "results.parquet")
    with pytest.raises(RequestError, match=r"results\.parquet: expected a column value of double, got string; run the sweep again"):
        read_run(tmp_path)


@pytest.mark.parametrize("column", ["encoder", "task", "dataset"])
def test_results_that_do_not_say_what_they_are_of_are_refused(run: Path, tmp_path: Path, column: str) -> None:
    pq.write_table(pq.read_table(run / "results.parquet").drop_columns([column]), tmp_path / "results.parquet")
    with pytest.raises(RequestError, match=rf"results\.parquet: expected a column {column} that says what each row is of"):
        read_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("results", "hyperparameters versions bank_keys protocol_fields status n"),
        ("trials", "lr round readout"),
        ("ledger", "expected"),
        ("ledger", "seen failed duplicates reasons"),
        ("predictions", "key"),
        ("predictions", "target prediction"),
        ("neighbours", "query"),
        ("neighbours", "rank relevant"),
    ],
)
def test_a_report_is_drawn_of_tables_that_lack_columns(tmp_path: Path, table: str, columns: str) -> None:
    """A missing column reads as null in every part of the report."""
    run = Example(shards=tmp_path / "shards", encoders=("alpha", "beta"), tasks=("object-retrieval",)).write(tmp_path / "out")
    path = run / f"{table}.parquet" if table in ("results", "trials", "ledger") else run / table / "alpha" / "tiny" / "object-retrieval.parquet"
    pq.write_table(pq.read_table(path).drop_columns(columns.split()), path)
    assert write_report(run, shards=str(tmp_path / "shards")).exists()


def test_a_damaged_table_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "results.parquet").write_bytes((run / "results.parquet").read_bytes()[:-9])
    with pytest.raises(RequestError, match="expected a Parquet table"):
        read_run(tmp_path)


def test_results_alone_are_enough(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.parquet").write_bytes((run / "results.parquet").read_bytes())
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "its predictions were not kept" in page
    assert "The run&#39;s ledger is empty" in page or "The run's ledger is empty" in page


def test_relative_shards_in_the_sweep_are_relative_to_its_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "results.parquet").write_bytes((run / "results.parquet").read_bytes())
    (tmp_path / "sweep.yaml").write_text("shards: ../data\n")
    assert read_run(tmp_path).shards == str((tmp_path / "../data").resolve())
    (tmp_path / "sweep.yaml").write_text("shards: s3://bucket/data\n")
    assert read_run(tmp_path).shards == "s3://bucket/data"
