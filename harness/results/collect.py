"""Parts and trials to Arrow tables, Parquet on disk: one row per encoder × task × protocol × metric, with its interval and its provenance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from harness.core import Task
from harness.data.augment import left_out_classes
from harness.data.manifest import Manifest
from harness.data.shards import NAMED as NAMED_PER_REASON
from harness.data.shards import with_count
from harness.errors import BankError
from harness.features.bank import BankSpec, BankStore, Receipt
from harness.files import file_name, publish
from harness.metrics import sense
from harness.metrics.levels import AtLevel
from harness.plan.plan import Plan, StudyPlan
from harness.plan.roles import view_of
from harness.probes.fields import MaskFields, epochs_of
from harness.results.provenance import provenance
from harness.results.tables import LEDGER, NEIGHBOURS, PREDICTIONS, RESULTS, TRIALS, write_table
from harness.search.accounts import Accounts, Outcome
from harness.search.head_store import HeadStore
from harness.search.propose import HeadScore
from harness.search.state import StudyState
from harness.search.study import Value
from harness.tracebacks import SEE_FILE
from harness.versions import counters

UNLABELLED_NAMES = frozenset(
    {"background", "ground", "other", "others", "other objects", "not listed", "void", "ignore", "ignored", "none", "nothing", "unknown"}
) | {f"un{word}" for word in ("labelled", "labeled", "annotated", "defined")}
"""Names of a label, in lower case, that mark it as not a class. They decide about a note only, never about a value."""
NAMED_CLASSES = 5
"""Maximum number of classes that a record names."""
OF_A_SHARD = ("shard lost", "absent", "truncated", "sha256", "unexpected", "duplicate member", "members not adjacent")
"""Reasons in a shard's account that concern the whole shard and name no failed sample."""


def collect(out: Path, plan: Plan, outcomes: Sequence[Outcome], accounts: Accounts, cache: str, run_id: str) -> list[dict[str, Any]]:
    """Write every table under `out`; the rows of results.parquet."""
    results = [row for outcome in outcomes for row in records(plan, outcome, accounts, run_id)]
    write_table(out / "results.parquet", results, RESULTS)
    write_table(out / "trials.parquet", [row for outcome in outcomes for row in _trials(outcome, run_id)], TRIALS)
    write_table(out / "ledger.parquet", _ledger(accounts), LEDGER)
    for folder, column, schema in (("predictions", "predictions", PREDICTIONS), ("neighbours", "neighbours", NEIGHBOURS)):
        shutil.rmtree(out / folder, ignore_errors=True)
        for path, rows in _per_task(outcomes, column).items():
            write_table(out / folder / path, rows, schema)
    _save_heads(out, outcomes, cache)
    _save_encoders(out, plan)
    return results


def records(plan: Plan, outcome: Outcome, accounts: Accounts, run_id: str) -> Iterator[dict[str, Any]]:
    """The rows of results.parquet of one study: one per metric of its task."""
    study, state = outcome.plan, outcome.state
    info, task = study.encoder, study.task
    head = state.score.head if state is not None and state.score is not None else None
    banks = {bank.key: bank for bank in _banks(study, head.readout if head else None)}.values()
    receipts = [receipt for bank in banks for receipt in accounts.of(bank)]
    manifest = plan.manifests[task.dataset]
    status, error, values = _verdict(outcome, banks, accounts)
    n_failed = failed_samples(banks, accounts)
    timed = receipts_of(study, accounts, head.readout if head else None, own_view=True)
    seconds = sum(receipt.seconds for receipt in timed)
    created = state.score.created_at if state is not None and state.score is not None else None
    made_with = state.score.provenance if state is not None and state.score is not None and state.score.provenance else provenance()
    remarks = _join(_untrained(manifest, study, state), _left_out(task))
    for metric in task.metrics:
        value = values.get(metric.name)
        has_value = value is not None and value.value is not None
        reason = None if has_value or status not in ("ok", "incomplete") else value.reason if value else "not computed"
        yield {
            "run_id": run_id,
            "encoder": info.name,
            "weights_sha256": info.weights_sha256,
            "params_m": info.params / 1e6,
            "task": task.name,
            "level": task.level,
            "dataset": task.dataset,
            "dataset_version": manifest.version,
            "split": study.split,
            "view": task.view.identity,
            "readout": head.readout if head else None,
            "probe": task.probe.name,
            "protocol": task.protocol.name,
            "protocol_fields": task.protocol.fields.to_json(),
            "metric": metric.name,
            "value": value.value if value else None,
            "ci_low": value.low if value else None,
            "ci_high": value.high if value else None,
            "n": value.n if value else 0,
            "n_failed": n_failed,
            "hyperparameters": json.dumps({"lr": head.lr, "readout": head.readout, "round": head.round, "head": head.head} if head else {}),
            "selected_on": study.selected_on,
            "num_trials": len({(trial.lr, trial.readout) for trial in state.heads}) if state is not None else 0,
            "seed": plan.sweep.search.seed,
            "status": "undefined" if reason and status == "ok" else status,
            "error": _error_text(reason, error, value if has_value else None, remarks),
            "bank_keys": sorted({receipt.bank_key for receipt in receipts}),
            "seconds": _seconds(state),
            "images_per_second": sum(receipt.images for receipt in timed) / seconds if seconds else None,
            "device": plan.device_type,
            "precision": plan.precision_of(info),
            "versions": json.dumps(made_with["versions"]),
            "git_commit": made_with["git_commit"],
            "created_at": created,
            "code_versions": json.dumps(counters()),
            "study_id": state.study.id if state is not None else None,
            "num_classes": len(task.classes),
            "class_levels": json.dumps(metric.of) if isinstance(metric, AtLevel) else None,
        }


def _seconds(state: StudyState | None) -> float:
    """Of the search and the score of a study."""
    if state is None:
        return 0.0
    return sum(finished.seconds for finished in state.rounds) + (state.score.seconds if state.score else 0.0)


def _error_text(reason: str | None, error: str | None, value: Value | None, remarks: str | None) -> str | None:
    """Why a record has no value, why it is not ok, and notes on its value, if it has one, whether it is ok or not."""
    return _join(reason, error, remarks if value else None, *(value.notes if value else ()))


def _untrained(manifest: Manifest, study: StudyPlan, state: StudyState | None) -> str | None:
    """Which of the tested classes no training row had; None where every one had some."""
    labels = state.score.untrained if state is not None and state.score is not None else ()
    if not labels:
        return None
    classes = manifest.classes if study.task.counterparts else study.task.classes
    names = [classes[label] for label in labels[:NAMED_CLASSES]] + (["…"] if len(labels) > NAMED_CLASSES else [])
    return f"{len(labels)} of the tested classes {'has' if len(labels) == 1 else 'have'} no training row: {', '.join(names)}"


def _left_out(task: Task) -> str | None:
    """Which named classes of a label map count neither in training nor in the value; None where their names already say so, or every class counts."""
    ignored = task.protocol.fields.ignored() if isinstance(task.protocol.fields, MaskFields) else None
    if ignored is None:
        return None
    field, values = ignored
    labels = left_out_classes(values, len(task.classes))
    named = [f"{label} ({task.classes[label]})" for label in labels if task.classes[label].lower() not in UNLABELLED_NAMES]
    return f"label {', '.join(named)} does not count; set protocol.{field} where it is a class" if named else None


def receipts_of(study: StudyPlan, accounts: Accounts, readout: str | None, *, own_view: bool = False) -> list[Receipt]:
    """Receipts of the banks that a record rests on: those of the chosen readout, or of all where none was chosen.

    With `own_view`, only those of the task's own view: other views, such as intact images beside altered ones, take another time.
    """
    return [receipt for bank in _banks(study, readout, own_view=own_view) for receipt in accounts.of(bank)]


def _banks(study: StudyPlan, readout: str | None, *, own_view: bool = False) -> list[BankSpec]:
    identity = study.task.view.identity
    roles = [role for role in study.banks if not own_view or view_of(study.task, role).identity == identity]
    return [bank for role in roles for name, bank in study.banks[role].items() if readout is None or name == readout]


def failed_samples(banks: Iterable[BankSpec], accounts: Accounts) -> int:
    """Samples of the splits of `banks` that could not be seen, each counted once however many banks a split has.

    For each shard the bank with the most losses counts. A stream that was not read, because its study failed before, has lost nothing.
    """
    failed: dict[tuple[str, str, str], int] = {}
    for bank in banks:
        for receipt in accounts.of(bank):
            shard = (bank.dataset, bank.split, receipt.shard)
            failed[shard] = max(failed.get(shard, 0), receipt.failed if receipt.attempts else 0)
    return sum(failed.values())


def unseen_splits(banks: Iterable[BankSpec], accounts: Accounts) -> str | None:
    """The splits of which nothing was seen, each with the first reason of its account and a count; None where there is none.

    A stream that nobody has read has no account yet, and a split that is empty has lost nothing.
    """
    reasons: dict[str, None] = {}
    for bank in banks:
        receipts = [receipt for receipt in accounts.of(bank) if receipt.expected]
        if receipts and all(receipt.attempts and not receipt.seen for receipt in receipts):
            reasons[f"{bank.dataset}/{bank.split}: {first_reason(receipts)}"] = None
    return "; ".join(reasons) or None


def first_reason(receipts: Sequence[Receipt]) -> str:
    """The first reason for which samples failed, and how many: `missing member: json, 2,500 of 2,500 samples`."""
    reason = next((reason for receipt in receipts for reason in receipt.reasons), "no reason")
    named = next((receipt.reasons[reason] for receipt in receipts if reason in receipt.reasons), [])
    count = sum(failed_for(reason, receipt) for receipt in receipts)
    return with_count(reason, named[0] if named else None, f"{count:,} of {sum(receipt.expected for receipt in receipts):,} samples")


def failed_for(reason: str, receipt: Receipt) -> int:
    """Failed samples that a reason accounts for: those that it names, or where it names none or not all, those that the other reasons leave."""
    if reason not in receipt.reasons:
        return 0
    names = receipt.reasons[reason]
    if reason not in OF_A_SHARD and len(names) <= NAMED_PER_REASON:
        return min(len(names), receipt.failed)
    others = sum(len(names) for other, names in receipt.reasons.items() if other != reason and other not in OF_A_SHARD)
    return max(0, receipt.failed - others)


def _verdict(outcome: Outcome, banks: Iterable[BankSpec], accounts: Accounts) -> tuple[str, str | None, dict[str, Value]]:
    """Status, its reason, and the values by metric."""
    if outcome.plan.undefined is not None:
        return "undefined", outcome.plan.undefined, {}
    score, unseen = outcome.state.score if outcome.state is not None else None, unseen_splits(banks, accounts)
    troubled = [receipt for bank in banks for receipt in accounts.of(bank) if receipt.status != "ok"]
    losses = _losses([receipt for receipt in troubled if receipt.attempts])  # a stream that nobody has read has lost nothing
    if outcome.error is not None or score is None:
        return "failed", unseen or _join(outcome.error or "the search did not come to its end", losses), {}
    values = {value.metric: value for value in score.values}
    if score.error is not None or (unseen and all(value.value is None for value in score.values)):
        return "failed", unseen or _join(score.error, losses), values
    return ("incomplete" if troubled else "ok"), _losses(troubled), values


def _join(*words: str | None) -> str | None:
    return "; ".join(word for word in words if word) or None


def _losses(troubled: Sequence[Receipt]) -> str | None:
    """The shards that a record rests on and that are not whole, each with its reasons; None where there is none."""
    shards = sorted({f"{receipt.shard}: {', '.join(receipt.reasons)}" for receipt in troubled})
    return "; ".join(shards)[:500] + where_tracebacks_are(troubled) if shards else None


def where_tracebacks_are(receipts: Sequence[Receipt]) -> str:
    """Where the tracebacks of shards lost to a program fault are, for the end of a record's error."""
    reasons = [reason for receipt in receipts for reason in receipt.reasons.get("shard lost", ())]
    files = sorted({reason.partition(SEE_FILE)[2] for reason in reasons if SEE_FILE in reason})
    return "".join([SEE_FILE, ", ".join(files[:3])]) if files else ""


def _trials(outcome: Outcome, run_id: str) -> Iterator[dict[str, Any]]:
    if outcome.state is None:
        return
    task = outcome.plan.task
    for finished in outcome.state.rounds:
        for head in finished.heads:
            yield {
                "run_id": run_id,
                "encoder": outcome.plan.encoder.name,
                "task": task.name,
                "protocol": task.protocol.name,
                "round": head.round,
                "head": head.head,
                "lr": head.lr,
                "readout": head.readout,
                "metric": task.searched.name,
                "val_value": None if head.value is None else sense(task.searched) * head.value,
                "epochs": _epochs(task, head),
                "seconds": finished.seconds,
                "status": "failed" if head.value is None else "stopped" if head.stopped else "ok",
                "error": head.error,
                "study_id": outcome.state.study.id,
            }


def _epochs(task: Task, head: HeadScore) -> int | None:
    """Epochs for which a head was trained: fewer than in the protocol where successive halving stopped it."""
    if head.epochs is not None or not task.probe.has_learning_rate:
        return head.epochs
    return epochs_of(task.protocol.fields)


def _ledger(accounts: Accounts) -> Iterator[dict[str, Any]]:
    for bank in accounts.banks():
        for receipt in accounts.of(bank):
            yield {
                "bank_key": bank.key,
                "dataset": bank.dataset,
                "split": bank.split,
                "shard": receipt.shard,
                "expected": receipt.expected,
                "seen": receipt.seen,
                "failed": receipt.failed,
                "duplicates": receipt.duplicates,
                "reasons": json.dumps(receipt.reasons),
                "attempts": receipt.attempts,
                "node": receipt.node,
                "sha256": receipt.sha256,
                "status": "failed" if "shard lost" in receipt.reasons else receipt.status,
            }


def _per_task(outcomes: Sequence[Outcome], column: str) -> dict[str, list[dict[str, Any]]]:
    """`<encoder>/<task>.parquet` → its rows, of all protocols together."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for outcome in outcomes:
        if outcome.state is None or outcome.state.score is None:
            continue
        task, content = outcome.plan.task, getattr(outcome.state.score, column)
        rows = [dict(zip(content, cells, strict=True)) for cells in zip(*content.values(), strict=True)] if isinstance(content, dict) else content
        if rows:
            path = f"{file_name(outcome.plan.encoder.name)}/{task.name}.parquet"
            names = {"encoder": outcome.plan.encoder.name, "task": task.name, "protocol": task.protocol.name}
            tables.setdefault(path, []).extend({**row, **names} for row in rows)
    return tables


def _save_heads(out: Path, outcomes: Sequence[Outcome], cache: str) -> None:
    """Keep the chosen heads' weights as `heads/<encoder>/<task>@<protocol>.safetensors`; probes that keep none leave nothing."""
    heads = HeadStore(BankStore(cache))
    for outcome in outcomes:
        if outcome.state is None or outcome.state.score is None or outcome.state.score.head is None:
            continue
        task = outcome.plan.task
        if not task.probe.keeps_heads:
            continue
        path = out / "heads" / file_name(outcome.plan.encoder.name) / f"{task.name}@{task.protocol.name}.safetensors"
        try:
            state = heads.state(outcome.state.study, outcome.state.score.head)
        except BankError:  # the cache was cleaned since; what was saved then stays
            continue
        if state:
            with publish(path) as temporary:
                temporary.write_bytes(save(state))


def _save_encoders(out: Path, plan: Plan) -> None:
    """Write `encoders.json`: each encoder's description, its preprocessing, and the fate of every key of its checkpoint."""
    described = {name: asdict(info) for name, info in plan.infos.items()}
    with publish(out / "encoders.json") as temporary:
        temporary.write_text(json.dumps(described, indent=2), encoding="utf-8")
