"""An evaluation in one process, without Ray: extract, fit, choose and score, here, by the code that a sweep runs elsewhere."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch

from harness.config import Sweep, parse_sweep
from harness.core import Encoder
from harness.encoders import EncoderSpec, live, load, refuse_unknown_keys
from harness.errors import HarnessError, RequestError, RunError, ShardError, in_one_line, is_of_the_place, portable
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type, has_gpu, resolve_precision, undisturbed
from harness.features.extract import Extractor, ShardWork
from harness.plan.plan import Plan, make_plan
from harness.plan.usable import lost_splits
from harness.results.collect import records
from harness.search.accounts import Accounts, Lost
from harness.search.build import outcome_of
from harness.search.runner import Runner
from harness.search.state import StudyState

Loader = Callable[[EncoderSpec], Encoder]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Score:
    """One metric of one task: a row of results.parquet, whose columns are its attributes, with the predictions that it is of."""

    record: Mapping[str, Any] = field(default_factory=dict)
    """The whole row: `value`, `ci_low`, `ci_high`, `n`, `n_failed`, `status`, `error`, `metric`, `task`, … as docs/results.md has them."""
    predictions: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Column to values: `key`, `group`, `target`, `prediction` and `score` of every test item; empty where nothing was predicted."""

    def __getattr__(self, name: str) -> Any:
        """A column of the record."""
        record = self.__dict__.get("record", {})
        if name not in record:
            raise AttributeError(f"a score has no {name!r}; its columns are {', '.join(record)}")
        return record[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.record]

    def __repr__(self) -> str:
        interval = "" if self.ci_low is None else f" ({self.ci_low:.4g} to {self.ci_high:.4g})"
        value = "no value" if self.value is None else f"{self.value:.4g}{interval}"
        return f"<Score {self.task}@{self.protocol} {self.metric}: {value}, n={self.n}, {self.status}>"


def evaluate(
    encoder: str | Mapping[str, Any] | EncoderSpec | torch.nn.Module,
    tasks: str | Sequence[str],
    data: str | Path,
    *,
    search: Mapping[str, Any] | None = None,
    protocol: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> list[Score]:
    """The scores of one encoder on the tasks that patterns name, in the order of a sweep's table, and equal to it to the bit.

    `encoder` is a name, an entry or a spec as in a sweep file, a live torch module, or {module, name, preprocessing}; a module is copied. `data` is a
    folder or URL with `<data set>/manifest.json`. `search`, `protocol` and `resources` are sections of a sweep file, `seed` is that of the search.
    `device` is `cpu` or `cuda`: by default a GPU where there is one. No file stays behind. A task that fails has a score with the reason in `error`.

    Raises RequestError, in one line, where the request cannot be; RunError where memory or disk fail; Unexpected for a fault of the program.
    """
    try:
        spec, load_encoder = _encoder(encoder)
        sections = {"search": {"seed": seed, **(search or {})}, "protocol": dict(protocol or {}), "resources": dict(resources or {})}
        patterns = [tasks] if isinstance(tasks, str) else list(tasks)
        entry = encoder if isinstance(encoder, str) else spec.name
        plain = {"name": "evaluate", "shards": str(data), "encoders": [entry], "tasks": patterns, **sections}
        sweep = parse_sweep(plain, "evaluate", Path.cwd())
        gpu = _has_gpu(device)
        with undisturbed(gpu), tempfile.TemporaryDirectory(prefix="partwise-") as cache:
            return _scores(_planned(sweep, spec, load_encoder, gpu), cache, load_encoder, gpu)
    except HarnessError:
        raise
    except Exception as error:
        raise (RunError(in_one_line(error)) if is_of_the_place(error) else portable(error)) from error


def encode(plan: Plan, store: BankStore, missing: Sequence[ShardWork], compute: Compute, load_encoder: Loader = load) -> dict[str, Lost]:
    """Publish the bank parts of `missing`, here; the shards that could not be read, by name, and why."""
    resources, lost = plan.sweep.resources, dict[str, Lost]()

    @functools.cache
    def placed(name: str) -> Encoder:
        encoder = load_encoder(plan.encoders[name])
        encoder.module.to(compute.device)
        return encoder

    extractor = Extractor(compute, placed, batch_size=resources.batch_size, decode_threads=resources.decode_threads)
    with contextlib.closing(extractor.each(missing, node="here")) as works:  # type: ignore[type-var]
        for work, begun in works:
            try:
                for bank, rows, receipt in begun.result():
                    store.write_part(bank, rows, receipt)
            except ShardError as error:
                lost[work.name] = Lost(reason=in_one_line(error), attempts=1)
    return lost


def finish(state: StudyState, runner: Runner) -> str | None:
    """Bring a study to its end, step by step; why it could not be, if so."""
    try:
        while (step := state.next_step()) is not None:
            state.take(step, runner.run(state.study, state.test, step).to_json())
    except HarnessError as error:
        return in_one_line(error)
    return None


def _encoder(value: str | Mapping[str, Any] | EncoderSpec | torch.nn.Module) -> tuple[EncoderSpec, Loader]:
    """What the encoder goes by, and what gives it, loaded once."""
    given = live(value)
    if given is not None:
        spec, build = given
        return spec, functools.cache(lambda _: build())
    if not isinstance(value, EncoderSpec):
        refuse_unknown_keys(value)
    return value if isinstance(value, EncoderSpec) else EncoderSpec.parse(value, base=Path.cwd()), functools.cache(load)


def _has_gpu(device: str | torch.device | None) -> bool:
    """Whether to compute on the GPU. Raises RequestError for devices of other kinds, and for a GPU that is not there."""
    if device is None:
        return has_gpu()
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise RequestError(f"device: expected cpu or cuda, got {device!r}") from None
    if target.type not in ("cpu", "cuda"):
        raise RequestError(f"device: expected cpu or cuda, got {device!r}")
    if target.type == "cuda" and not has_gpu():
        raise RequestError("device: expected a GPU for cuda, got none; give cpu or leave device out")
    if target.type == "cuda" and target.index not in (None, torch.cuda.current_device()):
        raise RequestError(f"device: expected the current GPU, cuda:{torch.cuda.current_device()}, got {device}; choose it by torch.cuda.set_device")
    return target.type == "cuda"


def _planned(sweep: Sweep, spec: EncoderSpec, load_encoder: Loader, gpu: bool) -> Plan:
    precision = resolve_precision(sweep.resources.precision, gpu)
    return make_plan(sweep, Path.cwd(), device_type(gpu), precision, specs={spec.name: spec}, info_of=lambda described: load_encoder(described).info)


def _scores(plan: Plan, cache: str, load_encoder: Loader, gpu: bool) -> list[Score]:
    store, threads = BankStore(cache), plan.sweep.resources.threads
    lost_splits(plan, _splits(plan))
    lost = encode(plan, store, plan.shard_work, Compute(plan.precision, gpu, threads), load_encoder)
    accounts, runner = Accounts(plan, store, lost), Runner(cache, gpu=gpu, threads=threads, load_encoder=load_encoder)
    verbosity, scores = optuna.logging.get_verbosity(), list[Score]()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        for study in plan.studies:
            outcome = outcome_of(plan, study, accounts)
            if outcome.state is not None:
                outcome.error = finish(outcome.state, runner)
            score = outcome.state.score if outcome.state is not None else None
            predictions = score.predictions if score is not None else {}
            scores += [Score(record=record, predictions=predictions) for record in records(plan, outcome, accounts, plan.run_id)]
    finally:
        optuna.logging.set_verbosity(verbosity)
    return scores


def _splits(plan: Plan) -> Iterator[tuple[str, str]]:
    """(data set, split) of all that is read."""
    for study in plan.studies:
        if study.undefined is None:
            yield from ((bank.dataset, bank.split) for bank in study.specs)
