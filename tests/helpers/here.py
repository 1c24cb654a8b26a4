"""A sweep in one process, without Ray: encoded, searched and collected by the code that actors and trials run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.config import load_sweep
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type
from harness.local import encode, finish
from harness.plan.plan import Plan, make_plan
from harness.results.collect import collect
from harness.search.accounts import Accounts
from harness.search.build import outcome_of
from harness.search.journal import Journal
from harness.search.runner import Runner


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
