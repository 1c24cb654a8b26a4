"""Ray Tune and Optuna: all studies of a sweep in one Tuner.

A Tune trial is one round of a study (a whole stack of learning rates) or the scoring of its chosen head. A study has at most one unfinished trial and
its proposals depend on its own history alone, so trials of different studies run side by side, in any number, and change nothing.
"""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.search import Searcher

from harness import tracebacks
from harness.errors import RunError, Unexpected, in_one_line, is_of_the_place, portable
from harness.features.device import check_device
from harness.results.provenance import provenance
from harness.search import steps
from harness.search.journal import Journal
from harness.search.runner import Runner
from harness.search.state import StudyState
from harness.search.steps import Step
from harness.search.study import BankRef, Study

MAX_FAILURES = 3
"""How often a step is run again whose process died, or that could not read, write or find the memory."""
PAUSE = 1.0
"""Seconds before such a step is tried again by another process, or by the same one."""
NODE_TIMEOUT = 600.0
"""Seconds without any node that could run a trial after which a search ends, as encoding waits for an actor; Tune itself would wait for ever."""
_LOOK = 1.0
"""Seconds between two looks at the nodes."""


class StudyTrial(tune.Trainable):  # type: ignore[misc]
    """Runs one step of one study; Tune reuses its process for the next."""

    def setup(
        self, config: dict[str, Any], states: Sequence[tuple[Study, Mapping[str, BankRef]]], cache: str, gpu: bool, threads: int, device_type: str
    ) -> None:
        """Nothing that can fail: a trial whose setup fails has no way of saying why."""
        self._states, self._gpu, self._device_type = states, gpu, device_type
        self._runner = Runner(cache, gpu=gpu, threads=threads)

    def step(self) -> dict[str, Any]:
        """A step's outcome, or why it has none (`error`), whether another try may have one (`again`), and the traceback of what nobody raised."""
        try:
            check_device(self._device_type, gpu=self._gpu, node=ray.util.get_node_ip_address())
            study, test = self._states[self.config["study"]]
            outcome = self._runner.run(study, test, steps.from_plain(self.config["step"]))
            return {"payload": outcome.to_json(), "done": True}
        except RunError as error:
            return {"error": in_one_line(error), "done": True}
        except Exception as error:
            if is_of_the_place(error):
                time.sleep(PAUSE)
                return {"error": in_one_line(error), "again": True, "done": True}
            fault = portable(error)
            return {"error": in_one_line(fault), "done": True, **({"traceback": fault.traceback} if isinstance(fault, Unexpected) else {})}

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
        self._running: dict[str, tuple[int, Step]] = {}
        self._on_step = on_step
        self._out = out
        self._tried: Counter[tuple[int, Step]] = Counter()
        self.errors: dict[int, str] = {}
        """Index of a study to why it could not be brought to its end."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        for index, state in enumerate(self._states):
            running = [step for study, step in self._running.values() if study == index]
            if index in self.errors or any(not isinstance(step, steps.Rung) for step in running):
                continue
            left = state.steps_left
            step = next((step for step in state.next_steps() if step not in running), None)
            if step is not None:
                self._running[trial_id] = (index, step)
                return {"study": index, "step": steps.to_plain(step)}
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

    def _note_failure(self, index: int, step: Step, result: Mapping[str, Any]) -> None:
        """A step without an outcome: tried again where that may help, else the end of its study, for this run; nothing of it is journalled."""
        reason = result.get("error") or f"the trial's process was lost {MAX_FAILURES + 1} times"
        if result.get("again"):
            self._tried[index, step] += 1
            if self._tried[index, step] <= MAX_FAILURES:
                return
            reason = f"gave up after {MAX_FAILURES + 1} attempts: {reason}"
        if "traceback" in result:
            reason += tracebacks.SEE_FILE + tracebacks.keep(self._out, self._states[index].study.id, result["traceback"])
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


class Nodes(tune.Callback):  # type: ignore[misc]
    """Ends a search that has had no node for its trials for too long: all were lost, or those that came instead are too small."""

    def __init__(self, *, cpus: float, gpus: float, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._needs, self._timeout, self._clock = {"CPU": cpus, "GPU": gpus}, timeout, clock
        self._fit_at = self._looked_at = clock()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises RunError, which ends the Tuner; what is journalled stays."""
        now = self._clock()
        if now - self._looked_at < _LOOK:
            return
        self._looked_at = now
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0) >= amount for name, amount in self._needs.items()) for node in nodes):
            self._fit_at = now
        elif now - self._fit_at > self._timeout:
            raise RunError(
                f"no node could run a trial for {self._timeout:g} s: expected one with {_counted(self._needs)}, "
                f"got {'; '.join(map(_counted, nodes)) or 'none that is alive'}; "
                "look at `ray status` for nodes that are missing or too small; what is done stays: run again to go on"
            )


def _counted(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"


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
    node_timeout: float = NODE_TIMEOUT
    """Seconds without any node that could run a trial after which the search ends."""


def run_search(states: Sequence[StudyState], settings: SearchSettings, on_step: Callable[[StudyState], None]) -> dict[int, str]:
    """Bring every study to its end, in one Tuner; index of a study to why it could not be. KeyboardInterrupt passes through.

    Raises RunError where no node could run a trial for `node_timeout`.
    """
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
            callbacks=[Losses(proposer), Nodes(cpus=settings.cpus, gpus=settings.gpus, timeout=settings.node_timeout)],
        ),
    )
    tuner.fit()
    return proposer.errors
