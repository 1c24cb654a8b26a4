"""A sweep in one process, without Ray: encoded, searched and collected by the code that actors and trials run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness.bank import BankStore
from harness.collect import Accounts, collect
from harness.config import load_sweep
from harness.device import Compute, device_type
from harness.encoders import load
from harness.errors import HarnessError, ShardError
from harness.extract import Extractor, ShardWork
from harness.ledger import Lost
from harness.plan import Plan, make_plan
from harness.propose import HeadScore
from harness.search import Journal, StudyState
from harness.streamed import StreamedRunner
from harness.study import StudyRunner
from harness.sweep import _outcome, run_id


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
    compute = Compute("float32", False, 1)
    runner: Any = StudyRunner(cache, torch.device("cpu")) if state.study.stream is None else StreamedRunner(cache, compute)
    try:
        while (step := state.next_config()) is not None:
            if "chosen" in step:
                chosen = HeadScore(**step["chosen"])
                outcome = runner.score(state.study, chosen, state.test[chosen.readout])
            else:
                outcome = runner.run_round(state.study, step["round"], step["proposals"])
            state.take(step, outcome.to_json())
    except HarnessError as error:
        return str(error)
    return None


def run(folder: Path, text: str) -> list[dict[str, Any]]:
    """The rows of results.parquet of a sweep, whose cache and results lie in `folder`; journalled, so that the command finds nothing left to do."""
    plan, cache = planned(folder, text), str(folder / "cache")
    store = BankStore(cache)
    accounts = Accounts(plan, store, encode(plan, store, plan.missing(store)))
    outcomes = [_outcome(plan, study, accounts) for study in plan.studies]
    for outcome in outcomes:
        if outcome.state is not None:
            outcome.error = searched(outcome.state, cache)
            Journal(folder / "out").save(outcome.state)
    return collect(folder / "out", plan, outcomes, accounts, cache, run_id(plan))
