"""Streamed probes on the embedded sample through real Ray: killed in the middle of training, they go on to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load

from tests.helpers import tiny
from tests.helpers.gates import Gates
from tests.helpers.runs import ROOT, Run, same_values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROTOCOLS: dict[str, dict[str, Any]] = {
    "object-linear-streamed": {"epochs": 20, "batch_size": 16},
    "object-attentive-streamed": {"epochs": 20, "batch_size": 16, "attention_heads": 4},
    "object-segmentation-streamed": {
        "iterations": 120,
        "batch_size": 16,
        "warmup_steps": 10,
        "crop": 64,
        "stride": 48,
        "train_scale": [128, 64],
        "test_scale": [128, 64],
        "blocks": [1, 2, 3, 5],
    },
}


def sweep_of(task: str) -> str:
    """One trial of three learning rates on the embedded sample, which saves its heads after every step."""
    return json.dumps({
        "name": "streamed",
        "shards": str(ROOT / "shards" / "data"),
        "encoders": [{"name": "tiny_vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 64}}],
        "tasks": [f"stamps/{task}"],
        "search": {"trials": 1, "stack": 3, "lr": [1e-3, 1.0], "seed": 0},
        "resources": {"batch_size": 16, "precision": "float32", "checkpoint_seconds": 0, "actors": 1},
        "protocol": PROTOCOLS[task],
    })  # fmt: skip


def position(run: Run) -> dict[str, Any] | None:
    """Where the checkpoint in the run's cache says that training is. Its bytes are read at once: load_file opens a file twice and may find two."""
    for path in run.cache.glob("*/checkpoint-*"):
        try:
            return json.loads(bytes(load(path.read_bytes())["progress"].tolist()))  # type: ignore[no-any-return]
        except FileNotFoundError:
            continue
    return None


@pytest.mark.parametrize("task", list(PROTOCOLS))
def test_a_training_killed_in_its_middle_goes_on_to_the_bit(task: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(sweep_of(task))
    straight, killed = (Run(sweep=tmp_path / "sweep.yaml", out=tmp_path / name, cache=tmp_path / f"{name}.cache") for name in ("straight", "killed"))
    assert straight.run() == 0, straight.log
    killed.gates = gates = Gates(tmp_path / "gates")
    gates.close("training", at=10)
    process = killed.start()
    gates.wait("training", 1, process)
    trials = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name().startswith("ray::ResourceTr")]
    assert trials
    process.send_signal(signal.SIGKILL)
    killed.finish(process)
    assert not psutil.wait_procs(trials, timeout=60)[1], "a trial ends within seconds of its driver"
    gates.open("training")
    left = position(killed)
    assert left is not None
    assert left["step"] == 10, "it was not in the middle of training"
    assert not killed.rounds

    assert killed.run() == 0, killed.log
    same_values(straight, killed)
    train = [row for row in killed.table("ledger") if row["split"] == "train"]
    assert {row["attempts"] for row in train} == {2}, "it began anew"
    for run in (straight, killed):
        sums = {split: sum(row["seen"] for row in run.table("ledger") if row["split"] == split) for split in ("train", "val", "test")}
        assert sums == {"train": 123, "val": 37, "test": 54}
        assert {row["status"] for row in run.table("ledger")} == {"ok"}

    before = (killed.rounds, killed.table("results"))
    assert killed.run() == 0
    assert before == (killed.rounds, killed.table("results")), "the same command again does nothing again"


def test_a_shard_that_is_repaired_is_streamed_anew(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "shards")
    protocol = {"epochs": 1, "batch_size": 8}
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(tmp_path / "shards", tasks=["tiny/object-linear-streamed"], protocol=protocol))
    whole, cut = (Run(sweep=tmp_path / "sweep.yaml", out=tmp_path / name, cache=tmp_path / f"{name}.cache") for name in ("whole", "cut"))
    assert whole.run() == 0, whole.log
    shard = folder / "train-001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    assert cut.run() == 1, cut.log
    assert {row["status"] for row in cut.table("results")} == {"incomplete"}
    assert cut.run() == 1
    shard.write_bytes(data)
    assert cut.run() == 0, cut.log
    same_values(whole, cut)
    assert {row["status"] for row in cut.table("ledger")} == {"ok"}
