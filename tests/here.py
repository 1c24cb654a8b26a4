"""A sweep in one process, without Ray: encoded, searched and collected by the code that actors and trials run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.accounts import Accounts, Lost
from harness.bank import BankStore
from harness.build import outcome_of
from harness.collect import collect
from harness.config import load_sweep
from harness.device import Compute, device_type
from harness.encoders import load
from harness.errors import HarnessError, ShardError
from harness.extract import Extractor, ShardWork
from harness.journal import Journal
from harness.plan import Plan, make_plan
from harness.runners import Runners
from harness.state import StudyState


def planned(folder: Path, text: str) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(text)
    return make_plan(load_sweep(folder / "sweep.yaml"), folder, device_type(False), "float32")


def encode(plan: Plan, store: BankStore, missing: Sequence[ShardWork]) -> dict[str, Lost]:
    """Publish the parts of `missing`; the shards that could not be read."""
    encoders = {name: load(spec) for name, spec in plan.encoders.items()} if missing else {}
    extractor = Extractor(Compute("float32", False, 1), encoders.__getitem__, batch_size=plan.sweep.resources.batch_size, decode_threads=1)
    lost: dict[str, Lost] = {}
    for work in missing:
        try:
            for bank, rows, receipt in extractor.run(work, node="here", attempts=1):
                store.write_part(bank, rows, receipt)
        except ShardError as error:
            lost[work.name] = Lost(reason=str(error), attempts=1)
    return lost


def searched(state: StudyState, cache: str) -> str | None:
    """Bring a study to its end; why it could not be, if so."""
    runners = Runners(cache, gpu=False, threads=1)
    try:
        while (step := state.next_step()) is not None:
            state.take(step, runners.run(state.study, state.test, step).to_json())
    except HarnessError as error:
        return str(error)
    return None


def run(folder: Path, text: str) -> list[dict[str, Any]]:
    """The rows of results.parquet of a sweep, whose cache and results lie in `folder`; journalled, so that the command finds nothing left to do."""
    plan, cache = planned(folder, text), str(folder / "cache")
    store = BankStore(cache)
    accounts = Accounts(plan, store, encode(plan, store, plan.missing(store)))
    outcomes = [outcome_of(plan, study, accounts) for study in plan.studies]
    for outcome in outcomes:
        if outcome.state is not None:
            outcome.error = searched(outcome.state, cache)
            Journal(folder / "out").save(outcome.state)
    return collect(folder / "out", plan, outcomes, accounts, cache, plan.run_id)
