"""The protocol field `epoch`: a head as the last epoch left it, or as the epoch did that was best on the selection split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.core import FittedStack, Rows
from harness.errors import RequestError
from harness.features.bank import BankSpec, BankStore, Receipt, ShardRows
from harness.probes import probe
from harness.probes.fields import epoch_of
from harness.search.head_store import HeadStore
from harness.search.runner import Runner
from harness.search.study import BankRef, Study
from harness.tasks import select
from harness.tasks.attentive import ObjectAttentive
from harness.tasks.objects import ObjectLinear
from tests.helpers import tiny

CPU = torch.device("cpu")
PROTOCOLS: dict[str, Any] = {
    "linear": ObjectLinear(epochs=12, batch_size=8),
    "attentive": ObjectAttentive(epochs=12, batch_size=8, attention_heads=2),
}
RATES = (3.0, 0.003)
"""One at which SGD jumps about, so that its last epoch is not its best one, and one that only just begins."""


def bank(store: BankStore, split: str, name: str, count: int) -> BankRef:
    rng = np.random.default_rng(len(split))
    shape = (3, 8) if name == "attentive" else (8,)
    targets = rng.integers(0, 2, count)
    features = rng.standard_normal((count, *shape)).astype(np.float32)
    features[..., 0] += 0.5 * targets.reshape(-1, *[1] * (len(shape) - 1))
    spec = BankSpec(dataset="x", split=split, shards=(("a.tar", split, count),), readout="cls", view="v", identity=())
    keys = [f"{split}{i}" for i in range(count)]
    account = {"failed": 0, "duplicates": 0, "reasons": {}, "sha256": "a", "attempts": 1, "node": "n", "seconds": 0.0, "images": count}
    receipt = Receipt(bank_key=spec.key, shard="a.tar", expected=count, seen=count, rows=count, **account)
    store.write_part(spec, ShardRows(keys=keys, groups=keys, targets=targets.tolist(), features=list(features)), receipt)
    return BankRef(bank=spec)


def study_of(store: BankStore, name: str, epoch: str) -> Study:
    return Study(
        name="e t@p",
        probe=name,
        metrics=("accuracy",),
        classes=2,
        protocol=PROTOCOLS[name].replaced(epoch=epoch),
        readouts=("cls",),
        train={"cls": bank(store, "train", name, 40)},
        val={"cls": bank(store, "val", name, 60)},
        holds_out=False,
        trials=1,
        stack=2,
        lr=(1e-3, 10.0),
        seed=0,
        contents="",
    )


def after_each_epoch(name: str, train: Rows, val: Rows) -> list[list[tuple[float, dict[str, torch.Tensor]]]]:
    """Accuracy on val and state of each head, trained alone for 1, 2, … epochs of the whole schedule: what a look at it must find."""
    outcomes: list[list[tuple[float, dict[str, torch.Tensor]]]] = [[] for _ in RATES]

    def look(stack: FittedStack) -> None:
        for head in range(len(RATES)):
            predictions = stack.predict(val, head)
            accuracy = float(np.mean(predictions.predictions == predictions.targets))
            outcomes[head].append((accuracy, {key: tensor.clone() for key, tensor in stack.state(head).items()}))

    fitted = probe(name).fit(train, RATES, classes=2, protocol=PROTOCOLS[name], seed=0, device=CPU, after_epoch=look)
    plain = probe(name).fit(train, RATES, classes=2, protocol=PROTOCOLS[name], seed=0, device=CPU)
    for head in range(len(RATES)):
        assert all(torch.equal(tensor, plain.state(head)[key]) for key, tensor in fitted.state(head).items()), "looking changes nothing"
    return outcomes


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_the_best_epoch_on_the_selection_split_is_kept(name: str, tmp_path: Path) -> None:
    store, runner = BankStore(str(tmp_path)), Runner(str(tmp_path), gpu=False, threads=1)
    best, last = study_of(store, name, "best"), study_of(store, name, "last")
    assert best.id != last.id
    looks = after_each_epoch(name, store.rows(best.train["cls"].bank), store.rows(best.val["cls"].bank))
    assert [len(epochs) for epochs in looks] == [12, 12]
    proposals = [("cls", rate) for rate in RATES]
    for head, epochs in zip(runner.run_round(last, 0, proposals).heads, looks, strict=True):
        assert (head.value, head.epochs) == (epochs[-1][0], None)
    chosen = []
    for head, epochs in zip(runner.run_round(best, 0, proposals).heads, looks, strict=True):
        first = int(np.argmax([accuracy for accuracy, _ in epochs]))
        assert (head.value, head.epochs) == (epochs[first][0], first + 1)
        state = HeadStore(store).state(best, head)
        assert all(torch.equal(state[key], tensor) for key, tensor in epochs[first][1].items())
        chosen.append(first)
    assert min(chosen) < 11, "an epoch before the last one is the best of some head"


def test_it_is_a_field_of_the_probes_on_banks_alone(tmp_path: Path) -> None:
    tiny.build(tmp_path)
    for name in ("object-linear", "object-attentive", "part-linear", "part-attentive"):
        (task,), _ = select([f"tiny/{name}"], str(tmp_path), {"epoch": "best"})
        assert epoch_of(task.protocol.fields) == "best"
    for name in ("object-linear-streamed", "bag-linear"):
        with pytest.raises(RequestError, match=f"protocol.{name}.epoch: {name} has no such field"):
            select([f"tiny/{name}"], str(tmp_path), {name: {"epoch": "best"}})
    with pytest.raises(RequestError, match=r"protocol\.epoch: expected 'last' or 'best', got 'first'"):
        select(["tiny/object-linear"], str(tmp_path), {"epoch": "first"})
