"""A sweep in one process, without Ray: encoded, searched and collected by the code that actors and trials run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import load_sweep, parse_sweep
from harness.core import Encoder
from harness.encoders import EncoderSpec
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type
from harness.local import encode, finish
from harness.plan.plan import Plan, StudyPlan, make_plan
from harness.results.collect import collect
from harness.search.accounts import Accounts
from harness.search.build import outcome_of
from harness.search.journal import Journal
from harness.search.runner import Runner
from harness.search.study import Score


def planned(folder: Path, text: str) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(text)
    return make_plan(load_sweep(folder / "sweep.yaml"), folder, device_type(False), "float32")


def run(folder: Path, text: str) -> list[dict[str, Any]]:
    """The rows of results.parquet of a sweep, whose cache and results lie in `folder`; journalled, so that the command finds nothing left to do."""
    plan, cache = planned(folder, text), str(folder / "cache")
    store = BankStore(cache)
    accounts = Accounts(plan, store, encode(plan, store, plan.missing(store), Compute("float32", False, 1)))
    runner = Runner(cache, gpu=False, threads=1)
    outcomes = [outcome_of(plan, study, accounts) for study in plan.studies]
    for outcome in outcomes:
        if outcome.state is not None:
            outcome.error = finish(outcome.state, runner)
            Journal(folder / "out").save(outcome.state)
    return collect(folder / "out", plan, outcomes, accounts, cache, plan.run_id)


@dataclass(kw_only=True)
class World:
    """Data sets below `shards`, and a cache which fills as tasks are asked for of encoders that are given as they are."""

    shards: Path
    cache: Path

    def plan(self, encoder: Encoder, task: str, *, lr: tuple[float, float] = (0.1, 1.0), stack: int = 2, **protocol: Any) -> Plan:
        """Of `<data set>/<task>[@<protocol>]`, with one round of search."""
        text = {
            "name": "world",
            "shards": str(self.shards),
            "encoders": [encoder.info.name],
            "tasks": [task],
            "search": {"trials": 1, "stack": stack, "lr": lr, "seed": 0},
            "resources": {"batch_size": 16, "precision": "float32"},
            "protocol": protocol,
        }
        sweep, spec = parse_sweep(text, "world", self.shards), EncoderSpec(name=encoder.info.name)
        return make_plan(sweep, self.shards, device_type(False), "float32", specs={spec.name: spec}, info_of=lambda _: encoder.info)

    def encode(self, encoder: Encoder, plan: Plan) -> Accounts:
        """The accounts of all banks of a plan, which are whole."""
        store = BankStore(str(self.cache))
        assert encode(plan, store, plan.missing(store), Compute("float32", False, 1), lambda _: encoder) == {}
        return Accounts(plan, store, {})

    def scores(self, encoder: Encoder, task: str, **how: Any) -> list[tuple[StudyPlan, Score]]:
        """What each point of a task finds in an encoder: heads fitted on train and chosen on val, one scored on test."""
        plan = self.plan(encoder, task, **how)
        accounts, scored = self.encode(encoder, plan), []
        for study in plan.studies:
            assert study.undefined is None, study.undefined
            state = outcome_of(plan, study, accounts).state
            assert state is not None
            assert finish(state, Runner(str(self.cache), gpu=False, threads=1, load_encoder=lambda _: encoder)) is None
            assert state.score is not None, [head.error for head in state.heads]
            scored.append((study, state.score))
        return scored
