"""What a sweep whose banks are ready costs its driver, at ImageNet's size: planning, accounts, resuming, tables, and the report. CPU seconds.

The store is one of real parts, written here: each is the first of its split with other names in it. Seconds and memory are of a process that does
nothing else, beyond its imports.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import Row
from harness.config import load_sweep
from harness.features.bank import BankSpec, BankStore, Receipt, ShardRows
from harness.features.device import device_type
from harness.features.index import ReadParts
from harness.plan.plan import Plan, make_plan
from harness.report import write_report
from harness.results.collect import collect
from harness.search.accounts import Accounts
from harness.search.build import outcome_of
from harness.search.journal import Journal
from harness.search.propose import HeadScore
from harness.search.state import StudyState
from harness.search.study import Round, Score, Value

CPU_SECONDS, REPORT_SECONDS, BYTES = 20.0, 10.0, 10**9
"""What the driver may take."""
REPORT = "report"


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a sweep; `rows` in each shard."""

    encoders: int
    train: int
    test: int
    rows: int
    classes: int

    @property
    def text(self) -> str:
        return f"{self.encoders} encoders, 2 tasks, {self.train:,} + {self.test:,} shards of {self.rows:,} rows, all banks ready"


IMAGENET = Size(encoders=7, train=1281, test=51, rows=1000, classes=1000)
FEW_ROWS, MANY_SHARDS = (Size(encoders=2, train=train, test=51, rows=2, classes=2) for train in (1281, 20_000))
MIDGET, MIDGETS = (Size(encoders=2, train=train, test=2, rows=3, classes=2) for train in (4, 8))


def run(tiny: bool) -> list[Row]:
    size, few, many = (MIDGET, MIDGET, MIDGETS) if tiny else (IMAGENET, FEW_ROWS, MANY_SHARDS)
    first, seconds, memory = measured(size, alone=not tiny)
    small, large = (measured(one, alone=not tiny)[1] for one in (few, many))
    per_shard = [driver_seconds(spent) / (one.train + one.test) for spent, one in ((small, few), (large, many))]
    return [
        absolute("planning, CPU", size, driver_seconds(seconds), CPU_SECONDS, "s", {f"{name}, s": spent for name, spent in seconds.items()}),
        absolute(
            "planning without an index, CPU", size, driver_seconds(first), CPU_SECONDS, "s", {f"{name}, s": spent for name, spent in first.items()}
        ),
        absolute("planning, memory", size, memory, BYTES, "bytes", {"peak beyond imports, bytes": memory}),
        Row(
            row="planning, growth",
            what=f"CPU seconds per shard, {many.text}",
            against=f"the same of {few.train:,} + {few.test:,} shards",
            ratio=per_shard[1] / per_shard[0],
            target=1.1,
            lower_is_better=True,
            measured={f"{name}, s": spent for name, spent in large.items()},
        ),
        absolute("report, CPU", size, seconds[REPORT], REPORT_SECONDS, "s", {"report, s": seconds[REPORT]}),
    ]


def absolute(row: str, size: Size, value: float, limit: float, unit: str, more: dict[str, float]) -> Row:
    return Row(row=row, what=size.text, against=f"{limit:,g} {unit}", ratio=value / limit, target=1.0, lower_is_better=True, measured=more)


def driver_seconds(seconds: dict[str, float]) -> float:
    return sum(spent for name, spent in seconds.items() if name != REPORT)


def measured(size: Size, *, alone: bool) -> tuple[dict[str, float], dict[str, float], float]:
    """CPU seconds of each phase of a sweep all of whose banks are in the store and all of whose studies are done, and peak bytes beyond imports.

    The seconds come twice: of a cache without indexes, such as earlier versions left, and of the run after that, whose peak it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        if not alone:
            prepare(folder, size)
            return phases(folder)[0], *phases(folder)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            pool.apply(prepare, (folder, size))
            return pool.apply(phases, (folder,))[0], *pool.apply(phases, (folder,))


def prepare(folder: str, size: Size) -> None:
    """A finished sweep in `folder`: shards, as far as a plan reads them, banks, and the journal of its studies."""
    root = Path(folder)
    write_data_set(root / "shards" / "plain", size)
    write_sweep(root, size.encoders)
    plan = planned(root)
    store = BankStore(str(root / "cache"))
    fill(plan, store, root / "cache")
    accounts = Accounts(plan, store, {})
    for outcome in (outcome_of(plan, study, accounts) for study in plan.studies):
        assert outcome.state is not None
        finish(outcome.state, size)
        Journal(root / "out").save(outcome.state)


def phases(folder: str) -> tuple[dict[str, float], float]:
    """As `measured`, of what `prepare` left."""
    root, seconds, before = Path(folder), dict[str, float](), peak_bytes()
    with phase(seconds, "planning"):
        plan = planned(root)
    store = BankStore(str(root / "cache"))
    parts = ReadParts(store)
    with phase(seconds, "what is missing"):
        missing = plan.missing(parts)
    assert not missing
    with phase(seconds, "accounts and studies"):
        accounts = Accounts(plan, parts, {})
        outcomes = [outcome_of(plan, study, accounts) for study in plan.studies]
        parts.keep()
    with phase(seconds, "resuming"):
        for outcome in outcomes:
            assert outcome.state is not None
            Journal(root / "out").load(outcome.state, lambda *_: False)
            assert not outcome.state.steps_left
    with phase(seconds, "tables"):
        collect(root / "out", plan, outcomes, accounts, store.root, plan.run_id)
    memory = peak_bytes() - before
    with phase(seconds, REPORT):
        write_report(root / "out", shards=str(root / "shards"))
    return seconds, memory


@contextmanager
def phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def peak_bytes() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def planned(root: Path) -> Plan:
    return make_plan(load_sweep(root / "sweep.yaml"), root, device_type(False), "float32")


def write_data_set(folder: Path, size: Size) -> None:
    """A manifest alone: a plan reads nothing else of a data set."""
    folder.mkdir(parents=True)
    splits = {
        split: {
            "samples": count * size.rows,
            "official": None,
            "shards": [{"file": f"{split}-{index:05d}.tar", "samples": size.rows, "bytes": 1, "sha256": f"{index:064x}"} for index in range(count)],
        }
        for split, count in (("train", size.train), ("test", size.test))
    }
    classes = [f"class {index}" for index in range(size.classes)]
    about = {"schema": 1, "dataset": "plain", "version": "1", "license": "none", "source": "none", "classes": classes, "annotations": ["label"]}
    (folder / "manifest.json").write_text(json.dumps({**about, "splits": splits}))


def write_sweep(root: Path, encoders: int) -> None:
    specs = [{"name": f"e{seed}", "architecture": "test_vit", "random": True, "seed": seed} for seed in range(encoders)]
    sweep = {"name": "planning", "shards": str(root / "shards"), "encoders": specs, "tasks": ["plain/object-knn", "plain/object-linear"]}
    (root / "sweep.yaml").write_text(json.dumps(sweep))


def fill(plan: Plan, store: BankStore, cache: Path) -> None:
    """Every part of every bank: keys and groups as a data set has them, features of one number."""
    templates: dict[str, tuple[BankSpec, bytes]] = {}
    for bank in plan.banks():
        store.describe(bank)
        if bank.split not in templates:
            templates[bank.split] = bank, template(bank, store, cache)
        origin, data = templates[bank.split]
        data = data.replace(origin.key.encode(), bank.key.encode())
        first, first_digest, _ = origin.shards[0]
        for file, digest, _ in bank.shards:
            part = data.replace(first_digest.encode(), digest.encode()).replace(stem(first).encode(), stem(file).encode())
            (cache / bank.key / f"{stem(file)}.arrow").write_bytes(part)


def template(bank: BankSpec, store: BankStore, cache: Path) -> bytes:
    """The bytes of a bank's first part, in which names and digests are as long as those of every other part."""
    file, digest, samples = bank.shards[0]
    keys = [f"{stem(file)}-{index:05d}" for index in range(samples)]
    features = list(np.zeros((samples, 1), np.float32))
    receipt = Receipt(
        bank_key=bank.key,
        shard=file,
        expected=samples,
        seen=samples,
        failed=0,
        duplicates=0,
        reasons={},
        sha256=digest,
        attempts=1,
        node="here",
        rows=samples,
        seconds=1.0,
        images=samples,
    )
    store.write_part(bank.leased, ShardRows(keys=keys, groups=keys, targets=[0] * samples, features=features), receipt)
    return (cache / bank.key / f"{stem(file)}.arrow").read_bytes()


def stem(file: str) -> str:
    return file.removesuffix(".tar")


def finish(state: StudyState, size: Size) -> None:
    """One round of one head, and its score, with a prediction of every test row."""
    study, rows = state.study, size.test * size.rows
    head = HeadScore(round=0, head=0, lr=0.1, readout=study.readouts[0], value=0.5)
    state.rounds = [
        Round(index=index, heads=(HeadScore(round=index, head=0, lr=0.1, readout=study.readouts[0], value=0.5),), seconds=1.0)
        for index in range(state.planned_rounds)
    ]
    keys = [f"test-{shard:05d}-{index:05d}" for shard in range(size.test) for index in range(size.rows)]
    labels = [index % size.classes for index in range(rows)]
    columns: dict[str, list[Any]] = {"key": keys, "group": keys, "target": labels, "prediction": labels, "score": [1.0] * rows}
    values = tuple(Value(metric=name, value=0.5, low=0.4, high=0.6, reason=None) for name in study.metrics)
    state.score = Score(
        head=head, values=values, n=rows, seconds=1.0, created_at="", predictions=columns, provenance={"versions": {}, "git_commit": None}
    )
