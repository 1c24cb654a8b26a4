"""What a sweep whose banks are ready costs its driver: planning, the accounts of the banks, the tables. CPU seconds.

`python bench/planning.py [--tiny] [--train N] [--test N] [--rows R] [--encoders E]`: ImageNet's 1,281 + 51 shards for seven encoders and two tasks,
in a store of real parts of R rows each, which is built first in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.config import load_sweep
from harness.features.bank import BankStore, PartRows, ReadParts, Receipt
from harness.features.device import device_type
from harness.plan.plan import Plan, make_plan
from harness.results.collect import collect
from harness.search.accounts import Accounts
from harness.search.build import outcome_of
from harness.search.propose import HeadScore
from harness.search.state import StudyState
from harness.search.study import Round, Score, Value

ENCODERS, TRAIN, TEST, ROWS = 7, 1281, 51, 20
MIDGET = {"train": 6, "test": 2, "rows": 3, "encoders": 2}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    for name, default in (("train", TRAIN), ("test", TEST), ("rows", ROWS), ("encoders", ENCODERS)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(MIDGET)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measured(Path(folder), options.encoders, {"train": options.train, "test": options.test}, options.rows)
    print(f"{options.encoders} encoders, {options.train:,} + {options.test:,} shards, {options.rows} rows each")
    for name, spent in {**seconds, "in all": sum(seconds.values())}.items():
        print(f"  {name:<40} {spent:9.2f} s of CPU")


def measured(root: Path, encoders: int, shards: dict[str, int], rows: int) -> dict[str, float]:
    """CPU seconds of each phase, of a sweep all of whose banks are in the store."""
    seconds: dict[str, float] = {}
    write_data_set(root / "shards" / "plain", shards, rows)
    sweep = load_sweep(write_sweep(root, encoders))
    with phase(seconds, "planning"):
        plan = make_plan(sweep, root, device_type(False), "float32")
    store = BankStore(str(root / "cache"))
    fill(plan, store, rows)
    parts = ReadParts(store)
    with phase(seconds, "what is missing"):
        missing = plan.missing(parts)
    assert not missing
    with phase(seconds, "accounts and studies"):
        accounts = Accounts(plan, parts, {})
        outcomes = [outcome_of(plan, study, accounts) for study in plan.studies]
    for outcome in outcomes:
        assert outcome.state is not None
        finish(outcome.state)
    with phase(seconds, "tables"):
        collect(root / "out", plan, outcomes, accounts, store.root, "run")
    return seconds


@contextmanager
def phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def write_data_set(folder: Path, shards: dict[str, int], rows: int) -> None:
    """A manifest alone: a plan reads nothing else of a data set."""
    folder.mkdir(parents=True)
    splits = {
        split: {
            "samples": count * rows,
            "official": None,
            "shards": [{"file": f"{split}-{index:05d}.tar", "samples": rows, "bytes": 1, "sha256": f"{index:064x}"} for index in range(count)],
        }
        for split, count in shards.items()
    }
    about = {"schema": 1, "dataset": "plain", "version": "1", "license": "none", "source": "none", "classes": ["a", "b"], "annotations": ["label"]}
    (folder / "manifest.json").write_text(json.dumps({**about, "splits": splits}))


def write_sweep(root: Path, encoders: int) -> Path:
    file = root / "sweep.yaml"
    specs = [{"name": f"e{seed}", "architecture": "test_vit", "random": True, "seed": seed} for seed in range(encoders)]
    sweep = {"name": "planning", "shards": str(root / "shards"), "encoders": specs, "tasks": ["plain/object-knn", "plain/object-linear"]}
    file.write_text(json.dumps(sweep))
    return file


def fill(plan: Plan, store: BankStore, rows: int) -> None:
    """Every part of every bank: keys and groups as a data set has them, features of four numbers."""
    more = {"failed": 0, "duplicates": 0, "reasons": {}, "attempts": 1, "node": "here", "seconds": 1.0, "images": rows}
    for bank in {bank.key: bank for study in plan.studies for bank in study.specs}.values():
        store.describe(bank)
        for file, digest, samples in bank.shards:
            keys = [f"{file.removesuffix('.tar')}-{index:05d}" for index in range(samples)]
            part = PartRows(keys=keys, groups=keys, targets=[0] * samples, features=list(np.zeros((samples, 4), np.float32)))
            receipt = Receipt(bank_key=bank.key, shard=file, expected=samples, seen=samples, rows=samples, sha256=digest, **more)  # type: ignore[arg-type]
            store.write_part(bank.leased, part, receipt)


def finish(state: StudyState) -> None:
    """One round of one head, and its score."""
    study = state.study
    head = HeadScore(round=0, head=0, lr=0.1, readout=study.readouts[0], value=0.5)
    state.rounds = [Round(index=0, heads=(head,), seconds=1.0)]
    columns = {"key": ["k"], "group": ["k"], "target": [0], "prediction": [0], "score": [1.0]}
    values = tuple(Value(metric=name, value=0.5, low=0.4, high=0.6, reason=None) for name in study.metrics)
    state.score = Score(
        head=head, values=values, n=1, seconds=1.0, created_at="", predictions=columns, provenance={"versions": {}, "git_commit": None}
    )


if __name__ == "__main__":
    main()
