"""What does the steps of studies in one process, whichever way their probes are fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from harness.core import Encoder
from harness.encoders import EncoderSpec, load
from harness.features.device import Compute
from harness.search import steps
from harness.search.halving import RungResult
from harness.search.steps import Step
from harness.search.stream_feed import StreamedRunner
from harness.search.study import BankRef, Round, Score, Study, StudyRunner


class Runners:
    """One runner for studies that read banks and one for studies that stream, each made when it is first needed."""

    def __init__(self, cache: str, *, gpu: bool, threads: int, load_encoder: Callable[[EncoderSpec], Encoder] = load) -> None:
        """`load_encoder` gives streamed studies their encoder, on the CPU."""
        self._cache, self._gpu, self._threads, self._load_encoder = cache, gpu, threads, load_encoder
        self._banked: StudyRunner | None = None
        self._streamed: StreamedRunner | None = None

    def run(self, study: Study, test: Mapping[str, BankRef], step: Step) -> Round | Score | RungResult:
        """The outcome of a step; `test` are the banks of the test split, which a score alone reads. Raises HarnessError, and what a place does."""
        runner = self.runner_of(study)
        if isinstance(step, steps.Score):
            return runner.score(study, step.chosen, test[step.chosen.readout])
        if isinstance(step, steps.Climb):
            if not isinstance(runner, StreamedRunner):
                raise ValueError(f"expected a streamed study, whose heads may climb, got one of the probe {study.probe}")
            return runner.climb(study, step.round, step.proposals, step.job)
        return runner.run_round(study, step.round, list(step.proposals))

    def runner_of(self, study: Study) -> StudyRunner | StreamedRunner:
        """The runner of a study, kept from one to the next for as long as the precision is the same."""
        if study.stream is None:
            if self._banked is None:
                self._banked = StudyRunner(self._cache, Compute("float32", self._gpu, self._threads).device)
            return self._banked
        if self._streamed is None or self._streamed.precision != study.stream.precision:
            compute = Compute(study.stream.precision, self._gpu, self._threads)
            self._streamed = StreamedRunner(self._cache, compute, load_encoder=self._load_encoder)
        return self._streamed
