"""Fine-tuning through the real command: killed in the middle of a rung, it goes on to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.helpers import tiny
from tests.helpers.gates import Gates
from tests.helpers.runs import Run, same_values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROTOCOL = {"epochs": 9, "batch_size": 6, "rungs": 3, "eta": 2, "init_std": 0.02, "layer_decay": 0.9, "lr_bounds": [1e-5, 1e-2]}
SECOND_RUNG = 3 * 6
"""The step that it begins with: after three epochs of 36 images."""


def sweep_of(shards: Path) -> str:
    """Two rounds of four learning rates, which save their heads after every step."""
    return tiny.sweep_text(
        shards,
        tasks=["tiny/finetune"],
        encoders=[{"name": "tiny_vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 32}}],
        search={"trials": 2, "stack": 4, "seed": 0},
        resources={"batch_size": 8, "precision": "float32", "checkpoint_seconds": 0, "actors": 2},
        protocol=PROTOCOL,
    )


def climbed(run: Run) -> int:
    """Climbs that are done: heads at ends of rungs."""
    return len(list(run.cache.glob("*/climb-*.json")))


def test_a_fine_tuning_killed_in_its_middle_goes_on_to_the_bit(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards")
    (tmp_path / "sweep.yaml").write_text(sweep_of(tmp_path / "shards"))
    straight, killed = (Run(sweep=tmp_path / "sweep.yaml", out=tmp_path / name, cache=tmp_path / f"{name}.cache") for name in ("straight", "killed"))
    assert straight.run() == 0, straight.log
    killed.gates = gates = Gates(tmp_path / "gates")
    gates.close("training", at=SECOND_RUNG + 2)
    process = killed.start()
    gates.wait("training", 1, process)
    trials = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name().startswith("ray::ResourceTr")]
    assert trials
    process.send_signal(signal.SIGKILL)
    killed.finish(process)
    assert not psutil.wait_procs(trials, timeout=60)[1], "a trial ends within seconds of its driver"
    gates.open("training")
    left = climbed(killed)
    assert 4 <= left < 14, "it was not in the middle of its rounds"

    assert killed.run() == 0, killed.log
    same_values(straight, killed)
    (row, _) = killed.table("results")
    assert (row["task"], row["probe"], row["status"], row["readout"]) == ("tiny/finetune", "finetune", "ok", "mean")
    assert 1e-5 <= json.loads(row["hyperparameters"])["lr"] <= 1e-2
    assert row["value"] == 1.0, "the planted task is learned"
    assert row["num_trials"] == 8
    for run in (straight, killed):
        sums = {split: sum(entry["seen"] for entry in run.table("ledger") if entry["split"] == split) for split in ("train", "val", "test")}
        assert sums == {"train": 36, "val": 18, "test": 24}
    heads = killed.table("trials")
    assert len(heads) == 8
    assert all(head["val_value"] is not None for head in heads)
    assert {head["status"] for head in heads} == {"ok", "stopped"}
    finished = {head["epochs"] for head in heads if head["status"] == "ok"}
    assert len(finished) == 1
    assert all(head["epochs"] < max(finished) for head in heads if head["status"] == "stopped"), "stopped heads tell how far they came"

    before = (killed.rounds, killed.table("results"))
    assert killed.run() == 0
    assert before == (killed.rounds, killed.table("results")), "the same command again does nothing again"
