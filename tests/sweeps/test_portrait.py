"""sweeps/portrait.yaml: it loads, plans, and asks for every group of the portrait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.config import load_sweep
from harness.plan.plan import Plan, make_plan
from harness.probes import all_metrics
from harness.report.portrait import GROUPS, portraits
from tests.helpers import tiny
from tests.helpers.report_rows import Row, row

FILE = Path(__file__).parents[2] / "sweeps" / "portrait.yaml"
SAMPLE = FILE.parent.parent / "shards" / "data" / "stamps"
TINY_ENCODER = 'encoders=[{"name": "net", "architecture": "test_vit", "random": true, "preprocessing": {"size": 64}}]'


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of the sweep as its comment says to change it: another encoder, another data set."""
    root = tmp_path_factory.mktemp("portrait")
    tiny.build(root / "data")
    text = FILE.read_text(encoding="utf-8").replace("stamps/", "tiny/").replace("../shards/data", "data")
    (root / "portrait.yaml").write_text(text, encoding="utf-8")
    return make_plan(load_sweep(root / "portrait.yaml", [TINY_ENCODER]), root, "cpu", "float32")


def _rows(plan: Plan) -> Iterator[Row]:
    """What a run of the plan would leave, if every value were one half."""
    for study in plan.studies:
        for metric in study.task.metrics:
            columns = {"level": study.task.level, "dataset": study.task.dataset, "protocol": study.task.protocol.name, "metric": metric.name}
            yield row(study.encoder.name, 0.5, task=study.task.name, protocol_fields="{}", **columns)


def test_it_asks_for_every_group_of_the_portrait(plan: Plan) -> None:
    (portrait,) = portraits(list(_rows(plan)), {}, None)
    assert portrait.groups == list(GROUPS)
    assert all(entry.mark is not None for entry in portrait.entries)


def test_locality_is_told_in_embedding_and_in_projection_space(plan: Plan) -> None:
    (portrait,) = portraits(list(_rows(plan)), {}, None)
    labels = [entry.label for entry in portrait.entries if entry.group == "locality"]
    assert labels == [f"same {relation}{space}" for space in ("", ", projection") for relation in ("part", "image", "class")]


def test_an_encoder_with_positions_can_do_all_of_it_but_blocks_and_heads_that_it_lacks(plan: Plan) -> None:
    reasons = {study.undefined for study in plan.studies if study.undefined}
    assert all("blocks" in reason or "projection" in reason for reason in reasons)


def test_its_metrics_are_ones_that_the_report_knows(plan: Plan) -> None:
    assert {metric.name for study in plan.studies for metric in study.task.metrics} <= all_metrics().keys()


@pytest.mark.slow
@pytest.mark.skipif(not (SAMPLE / "manifest.json").exists(), reason="the embedded sample is not in this checkout")
def test_as_it_stands_it_is_of_the_embedded_sample_and_an_encoder_with_its_random_twin() -> None:
    sweep = load_sweep(FILE)
    assert len(sweep.encoders) == 2
    plan = make_plan(sweep, FILE.parent, "cpu", "float32")
    (portrait,) = portraits(list(_rows(plan)), {"vit_s14_focus random": "vit_s14_focus"}, str(SAMPLE.parent))
    assert portrait.groups == list(GROUPS)
    assert all(entry.twin is not None for entry in portrait.entries)
