"""The search of a sweep on ready banks against Ray Tune with one trial per learning rate, and scikit-learn at as many values of C.

All read the same banks on one core at a time: what is compared is what the arithmetic and the orchestration of a rate cost. Ray starts before the
clock does.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from bench.rows import Row
from harness.cluster.tuner import SearchSettings, run_search
from harness.features.bank import BankSpec, BankStore, Receipt, ShardRows
from harness.features.device import device_type
from harness.probes.linear import LinearFields
from harness.search.state import StudyState
from harness.search.study import BankRef, Study

CORES = 2
OURS, TUNE, SCIKIT = "the search of a sweep", "Ray Tune, one trial per learning rate", "scikit-learn LogisticRegression, one fit per C"


class Size:
    """Of a study: rows of train, val and test, features, classes, learning rates of a round, rounds, epochs."""

    def __init__(self, tiny: bool) -> None:
        self.studies = 2 if tiny else 20
        self.rows = {"train": 60, "val": 20, "test": 20} if tiny else {"train": 2_000, "val": 500, "test": 500}
        self.width, self.classes = (8, 3) if tiny else (384, 10)
        self.stack, self.rounds, self.epochs = (2, 1, 2) if tiny else (8, 2, 90)

    @property
    def rates(self) -> int:
        return self.studies * self.stack * self.rounds


def run(tiny: bool) -> list[Row]:
    """One row per rival: how many times as long it takes."""
    size = Size(tiny)
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        states, store = made(Path(folder) / "cache", size)
        ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        try:
            seconds = {
                OURS: timed(lambda: ours(states, Path(folder), store.root)),
                TUNE: timed(lambda: one_trial_per_rate(states, Path(folder), store.root, size)),
            }
        finally:
            ray.shutdown()
        fitted = states if tiny else states[:1]  # every one of them is as large
        seconds[SCIKIT] = timed(lambda: logistic(fitted, store, size)) * len(states) / len(fitted) / CORES
    about = (
        f"{size.studies} studies of {size.rows['train']:,} rows × {size.width}, {size.classes} classes, {size.rates} learning rates, {CORES} cores"
    )
    return [
        Row(
            row=f"search / {rival}",
            what=f"{rival}, {about}",
            against=OURS,
            ratio=seconds[rival] / seconds[OURS],
            target=4.0,
            lower_is_better=False,
            measured={f"{name}, s": value for name, value in seconds.items()},
        )
        for rival in (TUNE, SCIKIT)
    ]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def made(cache: Path, size: Size) -> tuple[list[StudyState], BankStore]:
    """Studies, each of banks of its own."""
    store = BankStore(str(cache))
    protocol = LinearFields(epochs=size.epochs)
    states = []
    for number in range(size.studies):
        banks = {split: {"mean": BankRef(bank=bank(store, split, number, size))} for split in size.rows}
        study = Study(
            name=f"study {number}",
            probe="linear",
            metrics=("accuracy",),
            classes=size.classes,
            protocol=protocol,
            readouts=("mean",),
            train=banks["train"],
            val=banks["val"],
            holds_out=False,
            trials=size.rounds,
            stack=size.stack,
            lr=(1e-3, 10.0),
            seed=0,
            contents=str(number),
        )
        states.append(StudyState(study=study, test=banks["test"]))
    return states, store


def bank(store: BankStore, split: str, study: int, size: Size) -> BankSpec:
    """Rows around the means of their classes."""
    count, name = size.rows[split], f"{split}-{study}.tar"
    spec = BankSpec(dataset="made", split=split, shards=((name, name, count),), readout="mean", view="made", identity=())
    rng, means = np.random.default_rng([study, len(split)]), np.random.default_rng(study).standard_normal((size.classes, size.width)) * 0.2
    targets = rng.integers(0, size.classes, count)
    features = (means[targets] + rng.standard_normal((count, size.width))).astype(np.float32)
    keys = [f"{name}/{place}" for place in range(count)]
    rows = ShardRows(keys=keys, groups=keys, targets=targets.tolist(), features=list(features), masks={})
    receipt = Receipt(
        bank_key=spec.key,
        shard=name,
        expected=count,
        seen=count,
        rows=count,
        failed=0,
        duplicates=0,
        reasons={},
        sha256=name,
        attempts=1,
        node="here",
        seconds=0.0,
        images=count,
    )
    store.write_part(spec, rows, receipt)
    return spec


def ours(states: Sequence[StudyState], folder: Path, cache: str) -> None:
    """Raises RuntimeError where a study did not come to its end."""
    settings = SearchSettings(out=folder / "out", cache=cache, concurrent=CORES, cpus=1, gpus=0, threads=1, device_type=device_type(False))
    errors = run_search(states, settings, lambda state: None)
    if errors or any(state.score is None for state in states):
        raise RuntimeError(f"search: expected every study to be scored, got {errors}; see {folder}")


def one_trial_per_rate(states: Sequence[StudyState], folder: Path, cache: str, size: Size) -> None:
    """Softmax regression by SGD under the same protocol, as one would write it, on all studies' banks: a trial per study and learning rate."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    splits = [[state.study.train["mean"].bank, state.study.val["mean"].bank] for state in states]
    protocol, classes = LinearFields(epochs=size.epochs), size.classes

    def trial(config: dict[str, Any]) -> dict[str, float]:
        torch.set_num_threads(1)
        train, val = (BankStore(cache).rows(spec) for spec in splits[config["study"]])
        features, targets = torch.tensor(train.features[:]), torch.tensor(train.targets)
        model = torch.nn.Linear(features.shape[1], classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=protocol.momentum)
        batches = -(-len(features) // protocol.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, protocol.epochs * batches)
        for _ in range(protocol.epochs):
            for chosen in torch.split(torch.randperm(len(features)), protocol.batch_size):
                optimizer.zero_grad()
                torch.autograd.backward(torch.nn.functional.cross_entropy(model(features[chosen]), targets[chosen]))
                optimizer.step()
                schedule.step()
        with torch.inference_mode():
            right = model(torch.tensor(val.features[:])).argmax(dim=1) == torch.tensor(val.targets)
        return {"accuracy": right.float().mean().item()}

    rates = np.geomspace(1e-3, 10, size.stack * size.rounds).tolist()
    space = {"study": tune.grid_search(list(range(len(states)))), "lr": tune.grid_search(rates)}
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=CORES),
        run_config=tune.RunConfig(name="rivals", storage_path=str(folder / "rival"), verbose=0),
    )
    results = tuner.fit()
    if results.errors or len(results) != size.rates:
        raise RuntimeError(f"Ray Tune: expected {size.rates} trials, got {len(results)} and {results.errors[:1]}")


def logistic(states: Sequence[StudyState], store: BankStore, size: Size) -> None:
    """As many values of C as a study has learning rates, each fit scored on val."""
    for state in states:
        train, val = (store.rows(refs["mean"].bank) for refs in (state.study.train, state.study.val))
        for c in np.geomspace(1e-4, 1e2, size.stack * size.rounds):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some values of C do not converge in so many iterations
                LogisticRegression(C=c, max_iter=1000).fit(train.features[:], train.targets).score(val.features[:], val.targets)
