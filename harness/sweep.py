"""`python -m harness.sweep SWEEP.yaml`: read, plan, run, report.

Exit status: 0 every record ok or undefined; 1 some record incomplete or failed; 2 the request was wrong, and nothing was run; 130 interrupted, to be
gone on with by the same command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def _leave(*_: object) -> None:
    print("interrupted: the same command resumes from here", file=sys.stderr, flush=True)
    os._exit(130)  # an exception would be raised in whichever module is being imported, which may turn it into another


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)  # while torch and Ray are imported, which takes seconds

import yaml
from rich.console import Console

from harness.cluster.cluster import Cluster, Machine
from harness.cluster.ledger import EventLog, Ledger
from harness.cluster.tuner import SearchSettings, run_search
from harness.command import OK, PARTIAL, Parser, default_cache, run_command
from harness.config import Sweep, load_sweep, resolve_path
from harness.encoders import refuse_unknown_keys
from harness.errors import RequestError
from harness.features.bank import BankStore
from harness.features.extract import IN_FLIGHT, ShardWork
from harness.features.index import ReadParts
from harness.files import only_driver, publish
from harness.plan.cost import cost_lines, cost_of, is_scored, least_bytes, size
from harness.plan.plan import Plan, make_plan
from harness.plan.usable import lost_splits
from harness.progress import Progress
from harness.report import terminal, write_report
from harness.results.collect import collect
from harness.search.accounts import Accounts, Lost, Outcome
from harness.search.build import outcome_of
from harness.search.head_store import HeadStore
from harness.search.journal import Journal
from harness.search.state import StudyState
from harness.search.stream_account import outdated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sweep; the exit status."""
    console = Console(stderr=True)
    return run_command(
        _parser(), arguments, lambda options: _run(options, console), out=_out_of, interrupted="interrupted: the same command resumes from here"
    )


def _out_of(options: argparse.Namespace) -> Path | None:
    """Where results go, as far as that is known before the sweep file is read; `_run` notes what its file says."""
    given = vars(options).get("out")
    return Path(given) if given else None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m harness.sweep", description="Evaluate encoders on tasks, as a sweep file says.", allow_abbrev=False)
    parser.add_argument("sweep", metavar="SWEEP.yaml")
    parser.add_argument("--out", metavar="DIR", help="where results go (default: runs/<name of the sweep>)")
    parser.add_argument("--cache", metavar="DIR", help="where feature banks live, a folder or URL (default: partwise in the user's cache folder)")
    parser.add_argument("--address", metavar="ADDRESS", help="a running Ray cluster, such as auto; without it a local single-node Ray is started")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="override a key of the sweep file")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--fresh", action="store_true", help="discard this sweep's results and banks first")
    parser.add_argument("--dashboard", action="store_true", help="start Ray's dashboard with the local Ray")
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    file = Path(options.sweep)
    sweep = load_sweep(file, options.overrides, check_encoder=refuse_unknown_keys)
    if "://" in (options.out or ""):
        raise RequestError(f"--out {options.out}: expected a folder, got a URL; results are small: write them to a folder and copy it")
    out = Path(options.out or Path("runs") / sweep.name)
    options.out = str(out)
    cache = resolve_path(options.cache, Path.cwd()) if options.cache else str(default_cache())
    with Progress(console) as progress, Cluster(options.address, sweep.resources, dashboard=options.dashboard, progress=progress) as cluster:
        with progress.phase("reading the manifests and the encoders' weights", may_refuse=True):
            machine = cluster.machine()
            plan = make_plan(sweep, file.resolve().parent, machine.device_type, machine.precision)
            store = _open_store(out, cache, keep=not options.dry_run)
            parts = ReadParts(store)
            missing = plan.shard_work if options.fresh else plan.missing(parts)
            _refuse_what_cannot_be_written(plan, missing, store, fresh=options.fresh)
            losses = lost_splits(plan, _unread(plan, missing, store, fresh=options.fresh))
        for loss in losses:
            console.print(f"{loss}; its studies will fail", highlight=False)
        if options.dry_run:
            with progress.phase("estimating what it takes"):
                lines = list(cost_lines(plan, cost_of(plan, store, actors=machine.actors), actors=machine.actors))
            print("\n".join(lines))
            return OK
        with only_driver(out):
            if options.fresh:
                _discard(plan, out, store)
                parts = ReadParts(store)
            _write_sweep(out, sweep, plan)
            results = run_plan(plan, out, parts, cluster, machine, progress, missing)
            with progress.phase("drawing the report"):
                page = write_report(out, shards=sweep.shards)
    terminal(results, Console())
    print(f"results: {out / 'results.parquet'}\nreport:  {page}")
    return PARTIAL if any(row["status"] in ("incomplete", "failed") for row in results) else OK


def run_plan(
    plan: Plan, out: Path, parts: ReadParts, cluster: Cluster, machine: Machine, progress: Progress, missing: Sequence[ShardWork]
) -> list[dict[str, Any]]:
    """Encode what is missing, search what is unfinished, and write the tables; the rows of results.parquet."""
    store = parts.store
    lost = _encode(plan, out, missing, store, cluster, machine, progress)
    with progress.phase("reading the accounts of the banks"):
        accounts = Accounts(plan, parts, lost)
        outcomes = [outcome_of(plan, study, accounts) for study in plan.studies]
        if store.read_only is None:
            parts.keep()
    _search(outcomes, out, store, cluster, machine, progress)
    with progress.phase("working out intervals, writing the tables"):
        return collect(out, plan, outcomes, accounts, store.root, plan.run_id)


def _unread(plan: Plan, missing: Sequence[ShardWork], store: BankStore, *, fresh: bool) -> Iterator[tuple[str, str]]:
    """(data set, split) of what is still to be read, for banks and for streams."""
    for work in missing:
        yield work.dataset, work.split
    for study in plan.studies:
        if study.task.feed == "streamed" and study.undefined is None and (fresh or not is_scored(study, store)):
            yield from ((bank.dataset, bank.split) for bank in study.specs)


def _encode(
    plan: Plan, out: Path, missing: Sequence[ShardWork], store: BankStore, cluster: Cluster, machine: Machine, progress: Progress
) -> dict[str, Lost]:
    if not missing:
        return {}
    leased = {job.bank.key for work in missing for encoder_pass in work.passes for job in encoder_pass.banks}
    for bank in plan.banks():
        if bank.key in leased:
            store.describe(bank)
    crew = cluster.crew(machine, store.root, plan.encoders, limit=len(missing))
    try:
        items = sum(work.items for work in missing)
        with EventLog(out / "events.jsonl") as log, progress.task("encoding", total=items, unit="items") as bar:
            ledger = Ledger(
                crew=crew,
                log=log,
                lease_timeout=plan.sweep.resources.lease_timeout,
                leases_per_actor=IN_FLIGHT,
                out=out,
                on_done=lambda work: bar.advance(work.items),
            )
            ledger.run(missing)
    finally:
        crew.release()
    return ledger.lost


def _search(outcomes: Sequence[Outcome], out: Path, store: BankStore, cluster: Cluster, machine: Machine, progress: Progress) -> None:
    journal, heads = Journal(out), HeadStore(store)
    pending: list[Outcome] = []
    for outcome in outcomes:
        if outcome.state is not None:
            journal.load(outcome.state, heads.has_round)
            if outcome.state.study.stream is not None:
                _forget_outdated(outcome.state, journal, store)
            if outcome.state.steps_left:
                pending.append(outcome)
    if not pending:
        return
    states = [outcome.state for outcome in pending if outcome.state is not None]
    _refuse_to_search(states, store)
    cluster.start()
    left = {id(state): state.steps_left for state in states}
    with progress.task("searching", total=sum(left.values()), unit="trials") as bar:

        def on_step(state: StudyState) -> None:
            bar.advance(left[id(state)] - state.steps_left)
            left[id(state)] = state.steps_left

        settings = SearchSettings(
            out=out,
            cache=store.root,
            concurrent=machine.trial_slots,
            cpus=machine.cpus,
            gpus=machine.gpus,
            threads=machine.threads,
            device_type=machine.device_type,
        )
        errors = run_search(states, settings, on_step)
    for index, error in errors.items():
        pending[index].error = error


def _forget_outdated(state: StudyState, journal: Journal, store: BankStore) -> None:
    """Begin a streamed study anew whose shards were repaired, or whose accounts are gone from the cache."""
    refs = [*state.study.train.values(), *state.study.val.values()] if state.rounds else []
    refs += state.test.values() if state.score is not None else []
    if outdated(store, refs):
        if store.read_only is not None:
            raise RequestError(f"{store.read_only}; the shards of {_task_of(state)} were repaired, and what the cache has of it is to be discarded")
        for ref in refs:
            store.discard(ref.bank.key)
        journal.forget(state)


def _task_of(state: StudyState) -> str:
    """A study's task and protocol, without the digest that its name begins with."""
    return state.study.name.partition(" ")[2]


def _open_store(out: Path, cache: str, *, keep: bool) -> BankStore:
    """The store of the cache, which says whether it can be written. Raises RequestError where a file cannot be written under `out`.

    `keep` creates the folders that are missing, and tries what the cache's file system can do.
    """
    _check_folder("--out", out, keep=keep)
    is_url = "://" in cache
    expected = f"--cache {cache}: expected a folder{' or a URL' if is_url else ''} that can be written, got"
    try:
        store = BankStore(cache)
    except Exception as error:  # each of fsspec's file systems raises errors of its own
        raise RequestError(f"{expected}: {_one_line(error)}") from None
    try:
        if not is_url:
            _check_folder("--cache", Path(cache), keep=keep)
        if keep:
            store.try_out()
    except Exception as error:
        reason = str(error) if isinstance(error, RequestError) else f"{expected}: {_one_line(error)}"
        if not _can_be_read(store):
            raise RequestError(reason) from None
        store.read_only = reason
    return store


def _can_be_read(store: BankStore) -> bool:
    try:
        return store.exists()
    except Exception:
        return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _refuse_what_cannot_be_written(plan: Plan, missing: Sequence[ShardWork], store: BankStore, *, fresh: bool) -> None:
    """Raises RequestError where there are banks to write or to discard, and the cache cannot be written or has not the room."""
    if store.read_only is not None and (missing or fresh):
        rest = "--fresh discards what it has" if fresh else f"{len(missing)} shards are still to be encoded"
        raise RequestError(f"{store.read_only}; {rest}")
    free = store.free_bytes
    if free is None or fresh:  # what --fresh discards makes room
        return
    least = least_bytes(plan, missing)
    if least > free:
        raise RequestError(
            f"--cache {store.root}: expected {size(least)} of free space for the feature banks to write, got {size(free)}; "
            "free some, choose another --cache, or ask for fewer readouts"
        )


def _refuse_to_search(states: Sequence[StudyState], store: BankStore) -> None:
    """Raises RequestError where a study has heads to train, which are kept in the cache, or streams to account for, and the cache is read-only."""
    if store.read_only is None:
        return
    left = [_task_of(state) for state in states if state.study.stream is not None or len(state.rounds) < state.planned_rounds]
    if left:
        raise RequestError(f"{store.read_only}; {len(left)} studies are still to be searched, whose heads are kept there, such as {left[0]}")


def _check_folder(option: str, folder: Path, *, keep: bool) -> None:
    place = folder
    try:
        if keep:
            folder.mkdir(parents=True, exist_ok=True)
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RequestError(f"{option} {folder}: expected a folder that can be written, got: {error.strerror or error}") from None


def _discard(plan: Plan, out: Path, store: BankStore) -> None:
    for bank in plan.banks():
        store.discard(bank.key)
    for name in ("tune", "predictions", "neighbours", "heads", "figures", "errors"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("results.parquet", "trials.parquet", "ledger.parquet", "encoders.json", "report.html", "events.jsonl"):
        (out / name).unlink(missing_ok=True)


def _write_sweep(out: Path, sweep: Sweep, plan: Plan) -> None:
    """The sweep as it runs: every default filled in, every path absolute."""
    plain = sweep.model_dump(mode="json")
    for entry, spec in zip(plain["encoders"], plan.encoders.values(), strict=True):
        if isinstance(entry, dict) and spec.checkpoint is not None:
            entry["checkpoint"] = spec.checkpoint
    with publish(out / "sweep.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
