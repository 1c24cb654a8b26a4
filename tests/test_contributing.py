"""CONTRIBUTING.md adds one of each: every file of that page, written into a copy of the package, and all of them run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from harness.report.run import read_run
from harness.results.tables import RESULTS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


class Block(NamedTuple):
    path: str
    """The file that the page names above the block."""
    language: str
    text: str


BLOCKS = [Block(*groups) for groups in re.findall(r"^`([\w/.]+)`\n```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)]


def patched(text: str, diff: str) -> str:
    """`text` with a block of changed and unchanged lines applied; the unchanged ones say where, and come once."""
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    assert text.count(before) == 1, f"the page shows lines that are not there, or not once:\n{before}"
    return text.replace(before, after)


def write(tree: Path, block: Block) -> None:
    path = tree / block.path
    if block.language == "diff":
        path.write_text(patched(path.read_text(), block.text))
        return
    assert path.parent.is_dir(), f"{block.path}: the package has no such folder"
    assert not path.exists(), f"{block.path}: the page adds a file that is there already"
    path.write_text(block.text)


def draw(folder: Path) -> None:
    """Cut-outs whose figure has the colour of its class, and whose background that of the next class; in the test split, of the one after it."""
    names, rng = list(COLOURS), np.random.default_rng(0)
    for split, count, offset in (("train", 18, 1), ("val", 9, 1), ("test", 12, 2)):
        for number in range(count):
            label = number % len(names)
            pixels = np.zeros((40, 40, 4), np.uint8)
            pixels[..., :3] = COLOURS[names[(label + offset) % len(names)]]
            top, left = rng.integers(2, 18, 2)
            pixels[top : top + 20, left : left + 20] = (*COLOURS[names[label]], 255)
            path = folder / split / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the page's additions, run; beside it a run from before, which lacks the column that the page adds."""
    tree = tmp_path_factory.mktemp("added")
    shutil.copytree(ROOT / "harness", tree / "harness")
    shutil.copytree(ROOT / "shards", tree / "shards", ignore=shutil.ignore_patterns("data", "textures"))
    for block in BLOCKS:
        write(tree, block)
    draw(tree / "pictures")
    (tree / "earlier").mkdir()
    row = {"encoder": "colours", "task": "cutouts/object-knn", "dataset": "cutouts", "metric": "accuracy", "value": 0.25, "status": "ok"}
    pq.write_table(pa.Table.from_pylist([row], schema=RESULTS), tree / "earlier" / "results.parquet")
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "added.py")]
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    return tree


@pytest.fixture(scope="module")
def outcome(tree: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((tree / "outcome.json").read_text())
    return written


@pytest.fixture(scope="module")
def values(outcome: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """(task, metric) to its record."""
    return {(record["task"].partition("/")[2], record["metric"]): record for record in outcome["records"]}


def test_the_page_adds_one_of_each() -> None:
    folders = [block.path.rpartition("/")[0] for block in BLOCKS if block.language == "python"]
    assert folders == ["harness/encoders/families", "shards", "harness/data/views", "harness/metrics", "harness/probes", "harness/tasks"]
    assert [block.language for block in BLOCKS if block.language != "python"] == ["diff", "diff", "yaml"]
    assert all(len(block.text.splitlines()) <= 60 for block in BLOCKS)


def test_the_recipe_builds_the_data_set(tree: Path, outcome: dict[str, Any]) -> None:
    assert outcome["status"] == 0
    manifest = json.loads((tree / "shards" / "data" / "cutouts" / "manifest.json").read_text())
    assert {name: split["samples"] for name, split in manifest["splits"].items()} == {"train": 18, "val": 9, "test": 12}
    assert manifest["classes"] == list(COLOURS)


def test_the_encoder_gives_the_means_of_cells(outcome: dict[str, Any]) -> None:
    colours = outcome["colours"]
    assert colours["listed"]
    assert colours["block"]
    assert colours["grid"] == [14, 14]
    assert colours["cell"] == pytest.approx(colours["expected"], abs=1e-6)


def test_the_task_shows_the_view(outcome: dict[str, Any], values: dict[tuple[str, str], Any]) -> None:
    """Whole pictures are told by their backgrounds, which in the test split are those of other classes; figures alone by their own colours."""
    assert all(record["status"] == "ok" for record in outcome["records"])
    assert values["figure-knn", "accuracy"]["view"] == "figure"
    assert values["figure-knn", "accuracy"]["value"] == outcome["evaluated"] == 1.0
    assert values["object-knn", "accuracy"]["value"] == 0.0


def test_the_probe_is_trained_on_banks(outcome: dict[str, Any], values: dict[tuple[str, str], Any]) -> None:
    record = values["figure-cosines", "accuracy"]
    assert (record["probe"], record["num_trials"], record["n"]) == ("cosines", 3, 12)
    assert json.loads(record["protocol_fields"])["scale"] == 16.0
    assert record["value"] > 0.9
    assert outcome["cosines"] == {"right": True, "restored": True, "rungs": None}


def test_the_metric_is_that_of_scikit_learn(tree: Path, values: dict[tuple[str, str], Any]) -> None:
    for task in ("object-knn", "figure-knn", "figure-cosines"):
        rows = pq.read_table(tree / "out" / "predictions" / "colours" / "cutouts" / f"{task}.parquet").to_pydict()
        assert values[task, "kappa"]["value"] == pytest.approx(cohen_kappa_score(rows["target"], rows["prediction"]), abs=1e-12)


def test_the_column_is_filled_in_and_a_run_from_before_is_read(tree: Path, outcome: dict[str, Any]) -> None:
    assert {(record["embed_dim"], record["params_m"]) for record in outcome["records"]} == {(3, 0.0)}
    assert [(row["value"], row["embed_dim"]) for row in outcome["earlier"]] == [(0.25, None)]
    files = [tree / "earlier" / "results.parquet", tree / "out" / "results.parquet"]
    schema = RESULTS.append(pa.field("embed_dim", pa.int64()))
    assert set(ds.dataset(files, schema=schema).to_table()["embed_dim"].to_pylist()) == {None, 3}
    assert len(read_run(tree / "out").results) == len(outcome["records"]), "code from before the column leaves it out"


def test_the_files_of_the_page_pass_the_formatter_and_the_linter(tree: Path) -> None:
    files = [str(tree / block.path) for block in BLOCKS if block.path.endswith(".py")]
    for options in (["format", "--check"], ["check"]):
        command = [sys.executable, "-m", "ruff", *options, "--config", str(ROOT / "pyproject.toml"), *files]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
