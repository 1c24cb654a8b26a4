"""Banks larger than memory: rows are read where they lie, and every probe says of them what it says of the same rows in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.features import mapped
from harness.features.bank import BankSpec, BankStore, Receipt, ShardRows
from harness.features.mapped import MappedArray
from harness.features.rows import hold_out, joined_rows
from harness.probes import probe

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def pieces(*sizes: int, row: tuple[int, ...] = (5,)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((size, *row)).astype(np.float32) for size in sizes]


def test_parts_read_as_the_array_that_they_make_up() -> None:
    arrays = pieces(3, 1, 0, 4, row=(2, 5))
    whole, lying = np.concatenate(arrays), MappedArray(arrays)
    assert (lying.shape, lying.ndim, lying.dtype, lying.nbytes, len(lying)) == (whole.shape, 3, whole.dtype, whole.nbytes, 8)
    for where in (
        slice(None),
        slice(2, 5),
        slice(0, 0),
        slice(6, 99),
        np.array([7, 0, 3, 3, -1]),
        np.array([[1, 2], [4, 5]]),
        np.array([], np.int64),
    ):
        assert np.array_equal(lying[where], whole[where])
    with pytest.raises(IndexError, match="rows of 8, got 0 to 8"):
        lying[np.array([0, 8])]


def test_chosen_rows_of_parts_are_chosen_again() -> None:
    arrays, order = pieces(3, 4), np.array([6, 1, 1, 4, 0])
    whole, lying = np.concatenate(arrays)[order], MappedArray(arrays).chosen(order)
    assert np.array_equal(lying[1:4], whole[1:4])
    assert np.array_equal(lying.chosen(np.array([4, 2]))[:], whole[[4, 2]])
    both = MappedArray.of([lying, arrays[1], MappedArray(arrays)])
    assert np.array_equal(both[:], np.concatenate([whole, arrays[1], *arrays]))
    assert np.array_equal(both[np.array([11, 5, 0])], np.concatenate([whole, arrays[1], *arrays])[[11, 5, 0]])


# --- probes -----------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 2, "batch_size": 16, "feature_norm": "standardize"},
    "logistic": {"c_grid": [1.0], "max_iterations": 5},
    "lowshot": {"c_grid": [1.0], "max_iterations": 5, "share": 0.5},
    "knn": {"k": 3},
    "retrieval": {"exclude": "image"},
    "attentive": {"epochs": 2, "batch_size": 16, "attention_heads": 2},
    "dense": {"epochs": 2, "batch_size": 16, "feature_norm": "standardize", "mask": "object"},
    "detector": {"epochs": 2, "batch_size": 16, "theta": 0.5},
}
DENSE = ("attentive", "dense", "detector")
RATES = {"linear": 0.1, "logistic": 1.0, "lowshot": 1.0, "attentive": 0.1, "dense": 0.1, "detector": 0.1}


def bank(root: Path, name: str) -> tuple[BankStore, BankSpec]:
    """A bank of four parts, one of them empty."""
    store, rng = BankStore(str(root)), np.random.default_rng(1)
    sizes = {"a.tar": 20, "b.tar": 7, "c.tar": 0, "d.tar": 13}
    spec = BankSpec(dataset="x", split="train", shards=tuple((file, file, size) for file, size in sizes.items()), readout="r", view="v", identity=())
    shape = (3, 4, 8) if name in DENSE else (8,)
    for file, size in sizes.items():
        rows = ShardRows(
            keys=[f"{file}{i}" for i in range(size)],
            groups=[f"{file}{i // 2}" for i in range(size)],
            targets=rng.integers(0, 2, size).tolist(),
            features=list(rng.standard_normal((size, *shape)).astype(np.float32)),
            masks={"object": list(rng.integers(0, 2, (size, 3, 4) if name == "dense" else (size, 1, 12)).astype(np.uint8))},
        )
        account = {"failed": 0, "duplicates": 0, "reasons": {}, "sha256": file, "attempts": 1, "node": "n", "seconds": 0.0, "images": size}
        store.write_part(spec, rows, Receipt(bank_key=spec.key, shard=file, expected=size, seen=size, rows=size, **account))
    return store, spec


def learnt_and_said(name: str, store: BankStore, spec: BankSpec) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """What the probe learns of one part of the bank and says of the other."""
    rows = store.rows(spec, mask="object" if name in DENSE else None)
    training, held = hold_out(rows, share=0.3)
    how: dict[str, Any] = {"classes": 2, "protocol": probe(name).fields(**CASES[name]), "seed": 0, "device": CPU}
    fitted = probe(name).fit(training if probe(name).needs_train else None, [RATES.get(name)], **how)
    return fitted.state(0), fitted.predict(joined_rows([held, training]) if name == "retrieval" else held, 0).scores


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_probe_says_the_same_of_rows_in_memory_and_where_they_lie(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, spec = bank(tmp_path, name)
    state, scores = learnt_and_said(name, store, spec)
    assert isinstance(store.rows(spec).features, np.ndarray)
    monkeypatch.setattr(mapped, "HELD_BYTES", 0)
    assert isinstance(store.rows(spec).features, MappedArray)
    state_of_parts, scores_of_parts = learnt_and_said(name, store, spec)
    assert np.array_equal(scores, scores_of_parts)
    assert state.keys() == state_of_parts.keys()
    assert all(torch.equal(state[key], state_of_parts[key]) for key in state)


# --- memory -----------------------------------------------------------------------------------------------------------

BOUNDED = """
import json, sys, threading
import numpy as np, torch
from harness.features import mapped
from harness.features.bank import BankSpec, BankStore
from harness.core import Rows
from harness.probes import probe
from harness.features.rows import hold_out

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], resident())

mapped.HELD_BYTES = int(sys.argv[2])
torch.set_num_threads(1)
spec = BankSpec(**{**json.loads(sys.argv[3]), "shards": tuple(map(tuple, json.loads(sys.argv[3])["shards"])), "identity": ()})
how = {"classes": 2, "seed": 0, "device": torch.device("cpu")}
few = Rows(keys=list("abcd"), groups=list("abcd"), targets=np.arange(4) % 2, features=np.eye(4, 4096, dtype=np.float32))
probe("linear").fit(few, [0.1], protocol=probe("linear").fields(epochs=1, batch_size=64), **how)
before, done = resident(), threading.Event()
most = [before]
watcher = threading.Thread(target=watch)
watcher.start()
training, held = hold_out(BankStore(sys.argv[1]).rows(spec))
fitted = probe("linear").fit(training, [0.1], protocol=probe("linear").fields(epochs=1, batch_size=64), **how)
predicted = len(fitted.predict(held, 0))
done.set()
watcher.join()
print(json.dumps({"rows": len(training) + predicted, "bytes": most[0] - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process's own memory is told so on Linux")
def test_of_a_large_bank_a_probe_copies_only_what_it_reads_at_once(tmp_path: Path) -> None:
    store, width, size = BankStore(str(tmp_path)), 4096, 2000
    spec = BankSpec(
        dataset="x", split="train", shards=tuple((f"{n}.tar", str(n), size) for n in range(8)), readout="r", view="v", identity=()
    )  # 250 MiB
    noise = np.random.default_rng(0).standard_normal((size, width)).astype(np.float32)
    for file, _, _ in spec.shards:
        rows = ShardRows(
            keys=[f"{file}{i}" for i in range(size)],
            groups=[f"{file}{i}" for i in range(size)],
            targets=[i % 2 for i in range(size)],
            features=list(noise),
        )
        account = {"failed": 0, "duplicates": 0, "reasons": {}, "sha256": file, "attempts": 1, "node": "n", "seconds": 0.0, "images": size}
        store.write_part(spec, rows, Receipt(bank_key=spec.key, shard=file, expected=size, seen=size, rows=size, **account))
    description = json.dumps({"dataset": "x", "split": "train", "shards": spec.shards, "readout": "r", "view": "v"})

    def run(held: int) -> dict[str, int]:
        """What a probe of the whole bank takes, beside the pages of the files."""
        command = [sys.executable, "-c", BOUNDED, str(tmp_path), str(held), description]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        measured: dict[str, int] = json.loads(done.stdout)
        return measured

    lying, held = run(0), run(2**32)
    assert lying["rows"] == held["rows"] == 16_000
    assert lying["bytes"] < 8 * noise.nbytes // 2 < held["bytes"]
