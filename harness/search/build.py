"""From a plan to the studies that carry it out: the one place where what is planned, what was seen and what is searched come together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

from harness.plan.plan import Plan, StudyPlan
from harness.plan.roles import HELD_OUT
from harness.probes import is_decided
from harness.search.accounts import Accounts, Outcome
from harness.search.state import StudyState
from harness.search.study import BankRef, Stream, Study


def outcome_of(plan: Plan, study: StudyPlan, accounts: Accounts) -> Outcome:
    """A study of the plan of which nothing is done yet; without a state where the study is undefined."""
    return Outcome(plan=study, state=None if study.undefined is not None else state_of(plan, study, accounts))


def state_of(plan: Plan, study: StudyPlan, accounts: Accounts) -> StudyState:
    """The beginning of a study, with the banks of its test split, as far as `accounts` say that they could be seen."""
    refs = _refs(study, accounts)
    test = {
        readout: replace(
            ref,
            reference=refs.get("reference", {}).get(readout),
            more=tuple(refs[role][readout] for role in study.scored if role != "test"),
        )
        for readout, ref in refs["test"].items()
    }
    return StudyState(study=_study(plan, study, accounts, refs), test=test)


def study_of(plan: Plan, study: StudyPlan, accounts: Accounts) -> Study:
    """The search over one (encoder, task), as the processes that carry it out need it."""
    return _study(plan, study, accounts, _refs(study, accounts))


def _study(plan: Plan, study: StudyPlan, accounts: Accounts, refs: Mapping[str, Mapping[str, BankRef]]) -> Study:
    search, task, readouts = plan.sweep.search, study.task, tuple(study.banks["test"])
    return Study(
        name=f"{study.encoder.weights_sha256} {task.name}@{task.protocol.name}",
        probe=task.probe.name,
        metrics=tuple(metric.name for metric in task.metrics),
        classes=len(task.classes),
        protocol=task.protocol.fields,
        readouts=readouts,
        train=refs.get("train", {}),
        val=refs.get("val") or refs.get(HELD_OUT, {}),
        holds_out="val" not in refs,
        decided=is_decided(task.probe, readouts, task.protocol.fields),
        trials=search.trials,
        stack=search.stack,
        lr=search.lr,
        seed=search.seed,
        contents=_contents(study, accounts),
        stream=_stream(plan, study) if study.task.feed == "streamed" else None,
        levels=task.levels,
        counterparts=task.counterparts,
        chosen_by=task.chosen_by.name if task.chosen_by else None,
    )


def _refs(study: StudyPlan, accounts: Accounts) -> dict[str, dict[str, BankRef]]:
    """What a study reads, by role and readout."""
    streams = study.task.feed == "streamed"
    return {
        role: {
            readout: BankRef(bank=bank, without=() if streams else accounts.without(bank), source=study.sources.get(role))
            for readout, bank in banks.items()
        }
        for role, banks in study.banks.items()
    }


def _contents(study: StudyPlan, accounts: Accounts) -> str:
    """A digest of what the banks really hold.

    What a stream holds is known when it was read: until then its manifest's digests, which are part of its key, stand for it.
    """
    banks = [] if study.task.feed == "streamed" else [(bank, receipt) for bank in study.specs for receipt in accounts.of(bank)]
    contents = [(bank.key, receipt.shard, receipt.seen, receipt.sha256) for bank, receipt in banks]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _stream(plan: Plan, study: StudyPlan) -> Stream:
    resources = plan.sweep.resources
    return Stream(
        encoder=plan.encoders[study.encoder.name],
        weights_sha256=study.encoder.weights_sha256,
        precision=plan.precision_of(study.encoder),
        batch_size=resources.batch_size,
        decode_threads=resources.decode_threads,
        checkpoint_seconds=resources.checkpoint_seconds,
    )
