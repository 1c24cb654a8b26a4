"""Ray Tune and Optuna: all studies of a sweep in one Tuner.

A Tune trial is one round of a study (a whole stack of learning rates) or the scoring of its chosen head. A study has at most one unfinished trial and
its proposals depend on its own history alone, so trials of different studies run side by side, in any number, and change nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import optuna
import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.search import Searcher

from harness import tracebacks
from harness.device import Compute, check_device
from harness.errors import RunError, Unexpected, in_one_line, is_of_the_place, portable
from harness.halving import Climb, Climbed, Halving
from harness.probes import grid, probe
from harness.propose import HeadScore, choose, is_searched, propose, rates_at_once
from harness.provenance import provenance
from harness.streamed import StreamedRunner
from harness.study import BankRef, Round, Score, Study, StudyRunner
from harness.tables import publish

T = TypeVar("T")

MAX_FAILURES = 3
"""How often a step is run again whose process died, or that could not read, write or find the memory."""
PAUSE = 1.0
"""Seconds before such a step is tried again by another process, or by the same one."""


@dataclass(kw_only=True, eq=False)
class StudyState:
    """How far a study has come."""

    study: Study
    test: Mapping[str, BankRef]
    rounds: list[Round] = field(default_factory=list)
    score: Score | None = None
    _config: dict[str, Any] | None = None
    """Of the round under way, where its heads climb."""
    _climbed: dict[tuple[int, int], Climbed] = field(default_factory=dict)
    """What they have climbed of it, by rung and head."""

    @property
    def planned_rounds(self) -> int:
        if self.study.decided:
            return 0
        return self.study.trials if probe(self.study.probe).has_learning_rate and is_searched(self.lr) else 1

    @property
    def lr(self) -> tuple[float, ...]:
        """Bounds of the learning rates, or more than two that are tried: the protocol's own, or else the sweep's."""
        return tuple(self.study.protocol.get("lr_bounds") or self.study.lr)

    @property
    def heads(self) -> list[HeadScore]:
        return [head for one in self.rounds for head in one.heads]

    @property
    def steps_left(self) -> int:
        return self.planned_rounds - len(self.rounds) + (self.score is None)

    @property
    def _only_head(self) -> HeadScore:
        value = grid(self.study.probe, self.study.protocol)[0]
        return HeadScore(round=0, head=0, lr=value, readout=self.study.readouts[0], value=None)

    def next_config(self) -> dict[str, Any] | None:
        """What the study wants done next; None where nothing is left, or nothing can be scored."""
        study = self.study
        index = len(self.rounds)
        if index < self.planned_rounds:
            if not probe(study.probe).has_learning_rate:
                values = grid(study.probe, study.protocol)
                return {"round": index, "proposals": [(readout, value) for readout in study.readouts for value in values]}
            proposals = propose(
                study=study.name,
                seed=study.seed,
                round_index=index,
                history=self.heads,
                readouts=study.readouts,
                stack=rates_at_once(self.lr, study.stack),
                lr=self.lr,
            )
            return {"round": index, "proposals": proposals}
        if self.score is not None:
            return None
        chosen = self._only_head if study.decided else choose(self.heads, study.readouts)
        if chosen is None:
            self.score = Score(head=None, values=(), n=0, seconds=0.0, error=_first_error(self.heads))
            return None
        return {"chosen": asdict(chosen)}

    def next_steps(self) -> list[dict[str, Any]]:
        """All that may run side by side: the climbs of a rung where a round has rungs, else the one thing that comes next."""
        config = self._config or self.next_config()
        if config is None:
            return []
        proposals = [(readout, rate) for readout, rate in config.get("proposals", ())]
        halving = Halving.planned(self.study.probe, self.study.protocol, config["round"], proposals) if proposals else None
        if halving is None:
            return [config]
        self._config = config
        return [{**config, "climb": asdict(climb)} for climb in halving.open(self._climbed)] or [config]

    def take(self, step: Mapping[str, Any], payload: str) -> None:
        """Note what became of one of `next_steps`."""
        if "climb" in step:
            self._climbed[step["climb"]["rung"], step["climb"]["head"]] = Climbed.from_json(payload)
        elif "round" in step:
            self.rounds.append(Round.from_json(payload))
            self._config, self._climbed = None, {}
        else:
            self.score = Score.from_json(payload)


def _first_error(heads: Sequence[HeadScore]) -> str:
    return next((head.error for head in heads if head.error), "no head could be scored on the selection split")


class StudyTrial(tune.Trainable):  # type: ignore[misc]
    """Runs one step of one study; Tune reuses its process for the next."""

    def setup(
        self, config: dict[str, Any], states: Sequence[tuple[Study, Mapping[str, BankRef]]], cache: str, gpu: bool, threads: int, device_type: str
    ) -> None:
        """Nothing that can fail: a trial whose setup fails has no way of saying why."""
        self._states, self._cache, self._gpu, self._threads, self._device_type = states, cache, gpu, threads, device_type
        self._banked: StudyRunner | None = None
        self._streamed: StreamedRunner | None = None

    def step(self) -> dict[str, Any]:
        """A step's outcome, or why it has none (`error`), whether another try may have one (`again`), and the traceback of what nobody raised."""
        try:
            check_device(self._device_type, gpu=self._gpu, node=ray.util.get_node_ip_address())
            return {"payload": self._outcome().to_json(), "done": True}
        except RunError as error:
            return {"error": in_one_line(error), "done": True}
        except Exception as error:
            if is_of_the_place(error):
                time.sleep(PAUSE)
                return {"error": in_one_line(error), "again": True, "done": True}
            told = portable(error)
            return {"error": in_one_line(told), "done": True, **({"traceback": told.traceback} if isinstance(told, Unexpected) else {})}

    def _outcome(self) -> Round | Score | Climbed:
        study, test = self._states[self.config["study"]]
        step, runner = self.config["step"], self._runner_of(study)
        if "chosen" in step:
            chosen = HeadScore(**step["chosen"])
            return runner.score(study, chosen, test[chosen.readout])
        proposals = [(readout, rate) for readout, rate in step["proposals"]]
        if "climb" in step and isinstance(runner, StreamedRunner):
            return runner.climb(study, step["round"], proposals, Climb(**step["climb"]))
        return runner.run_round(study, step["round"], proposals)

    def _runner_of(self, study: Study) -> StudyRunner | StreamedRunner:
        if study.stream is None:
            if self._banked is None:
                self._banked = StudyRunner(self._cache, Compute("float32", self._gpu, self._threads).device)
            return self._banked
        if self._streamed is None or self._streamed.precision != study.stream.precision:
            self._streamed = StreamedRunner(self._cache, Compute(study.stream.precision, self._gpu, self._threads))
        return self._streamed

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A step is done or not done: there is nothing in between to keep."""

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing was kept."""


class Proposer(Searcher):  # type: ignore[misc]
    """Tune's search algorithm: gives the next step of a study that has none running, or another one of those that may run side by side."""

    def __init__(self, states: Sequence[StudyState], on_step: Callable[[StudyState], None], out: Path | None = None) -> None:
        super().__init__(metric=None, mode=None)
        self._states = states
        self._running: dict[str, tuple[int, dict[str, Any]]] = {}
        self._on_step = on_step
        self._out = out
        self._tried: Counter[tuple[int, str]] = Counter()
        self.errors: dict[int, str] = {}
        """Index of a study to why it could not be brought to its end."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        for index, state in enumerate(self._states):
            running = [step for study, step in self._running.values() if study == index]
            if index in self.errors or any("climb" not in step for step in running):
                continue
            left = state.steps_left
            steps = state.next_steps()
            step = next((step for step in steps if step not in running), None)
            if step is not None:
                self._running[trial_id] = (index, step)
                return {"study": index, "step": step}
            if left and not running:  # nothing to score: every head failed
                self._on_step(state)
        return None if self._running else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._running:
            return
        index, step = self._running.pop(trial_id)
        state = self._states[index]
        if error or not result or "payload" not in result:
            self._note_failure(index, step, result or {})
            return
        state.take(step, result["payload"])
        self._on_step(state)

    def _note_failure(self, index: int, step: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """A step without an outcome: tried again where that may help, else the end of its study, for this run; nothing of it is journalled."""
        reason = result.get("error") or f"the trial's process was lost {MAX_FAILURES + 1} times"
        if result.get("again"):
            tried = (index, json.dumps(step, sort_keys=True))
            self._tried[tried] += 1
            if self._tried[tried] <= MAX_FAILURES:
                return
            reason = f"gave up after {MAX_FAILURES + 1} attempts: {reason}"
        if "traceback" in result:
            reason += tracebacks.TOLD_IN + tracebacks.keep(self._out, self._states[index].study.id, result["traceback"])
        self.errors.setdefault(index, reason)

    def explain(self, index: int, error: BaseException) -> None:
        """Say why the process of a trial was lost, of which Tune tells its searcher nothing."""
        if index in self.errors:
            self.errors[index] += f": {in_one_line(error)}"

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher beside its own state, which is never restored: nothing worth keeping, and a display cannot be pickled."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Tune asks for this from time to time; what a run resumes from is its own journal."""
        Path(checkpoint_path).write_bytes(pickle.dumps(len(self._states)))

    def restore(self, checkpoint_path: str) -> None:
        raise RunError("a search is resumed by running the sweep again, not by Tuner.restore")


class Losses(tune.Callback):  # type: ignore[misc]
    """Reads what befell a trial that Tune has given up from where Tune left it."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error()
        if error is not None:
            self._proposer.explain(trial.config["study"], error.cause if isinstance(error, RayTaskError) else error)


class Journal:
    """What each study has come to, one small file a round, under `<out>/tune/studies/<study id>/`: what a run resumes from."""

    def __init__(self, out: Path) -> None:
        self._root = out / "tune" / "studies"

    def folder(self, study: Study) -> Path:
        return self._root / study.id

    def load(self, state: StudyState, has_heads: Callable[[Study, int], bool]) -> None:
        """Bring `state` up to what was journalled; rounds whose heads are gone from the cache do not count, unless the study was scored."""
        folder = self.folder(state.study)
        score = _read(folder / "score.json", Score.from_json)
        rounds: list[Round] = []
        while (journalled := _read(folder / f"round-{len(rounds)}.json", Round.from_json)) is not None:
            if score is None and not has_heads(state.study, len(rounds)):
                break
            rounds.append(journalled)
        state.rounds = rounds[: state.planned_rounds]
        if score is not None and len(state.rounds) == state.planned_rounds:
            state.score = score

    def forget(self, state: StudyState) -> None:
        """Begin the study anew."""
        shutil.rmtree(self.folder(state.study), ignore_errors=True)
        state.rounds, state.score = [], None

    def save(self, state: StudyState) -> None:
        """Journal what is new."""
        folder = self.folder(state.study)
        for one in state.rounds:
            _write(folder / f"round-{one.index}.json", one.to_json())
        if state.score is not None:
            _write(folder / "score.json", state.score.to_json())


def _read(path: Path, parse: Callable[[str], T]) -> T | None:
    """A journalled file, or None where there is none, or one that was cut short: that one goes, so that it can be written again."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        path.unlink(missing_ok=True)
        return None


def _write(path: Path, text: str) -> None:
    if not path.exists():
        with publish(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search may use."""

    out: Path
    cache: str
    concurrent: int
    cpus: float
    gpus: float
    threads: int
    device_type: str


def run_search(states: Sequence[StudyState], settings: SearchSettings, on_step: Callable[[StudyState], None]) -> dict[int, str]:
    """Bring every study to its end, in one Tuner; index of a study to why it could not be. KeyboardInterrupt passes through."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's own makes an interrupted search look like a finished one
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its table of trials ignores verbose=0
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = Journal(settings.out)

    def step(state: StudyState) -> None:
        if state.score is not None and not state.score.provenance:
            state.score = replace(state.score, provenance=provenance())
        journal.save(state)
        on_step(state)

    proposer = Proposer(states, step, settings.out)
    trainable = tune.with_parameters(
        StudyTrial,
        states=[(state.study, state.test) for state in states],
        cache=settings.cache,
        gpu=settings.gpus > 0,
        threads=settings.threads,
        device_type=settings.device_type,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": settings.cpus, "gpu": settings.gpus}),
        tune_config=tune.TuneConfig(search_alg=proposer, num_samples=-1, reuse_actors=True, max_concurrent_trials=settings.concurrent),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str((settings.out / "tune").resolve()),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # only the driver need see `out`
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[Losses(proposer)],
        ),
    )
    tuner.fit()
    return proposer.errors
