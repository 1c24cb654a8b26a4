"""The one runner of studies: does their steps in one process, whichever way their probes are fed.

A round is given no test split, and a score fits nothing: what selects never sees what is reported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from harness.core import Encoder, Proposal, State
from harness.encoders import EncoderSpec, load
from harness.errors import HarnessError, is_of_the_place
from harness.features.bank import BankStore
from harness.features.device import Compute
from harness.search import steps
from harness.search.bank_feed import BankFeed
from harness.search.halving import Halving, RungJob, RungResult
from harness.search.head_store import HeadStore
from harness.search.propose import HeadScore
from harness.search.scoring import scored
from harness.search.steps import Step
from harness.search.stream_feed import StreamFeed
from harness.search.study import BankRef, Candidate, Predicted, Round, Score, Study
from harness.search.training import stream_of, train_ref


class StudyFeed(Protocol):
    """Gives the heads of a study what they are trained and scored on."""

    def stacks(self, proposals: Sequence[Proposal]) -> Sequence[Sequence[int]]:
        """Positions of those proposals of a round that are trained together, and fail together; all of them, once each."""

    def candidates(self, study: Study, index: int, proposals: Sequence[Proposal]) -> Sequence[Candidate]:
        """The heads of one stack of a round, one per proposal. Raises HarnessError where none of them can be trained."""

    def clear(self, study: Study, index: int) -> None:
        """Discard what a round keeps for its resumption; its heads are published."""

    def predictions(self, study: Study, head: HeadScore, state: State, test: BankRef) -> Predicted:
        """What a head says of the test split. Raises HarnessError where it cannot say anything."""


class Runner:
    """Runs rounds, rungs and scores. Keeps its feeds from one study to the next, and these what they read or loaded last."""

    def __init__(
        self,
        cache: str,
        *,
        gpu: bool,
        threads: int,
        load_encoder: Callable[[EncoderSpec], Encoder] = load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load_encoder` gives streamed studies their encoder, on the CPU; `clock`, in seconds, says when their checkpoints are due."""
        self._store = BankStore(cache)
        self._heads = HeadStore(self._store)
        self._gpu, self._threads, self._load_encoder, self._clock = gpu, threads, load_encoder, clock
        self._banks: BankFeed | None = None
        self._stream: StreamFeed | None = None

    def run(self, study: Study, test: Mapping[str, BankRef], step: Step) -> Round | Score | RungResult:
        """The outcome of a step; `test` are the banks of the test split, which a score alone reads. Raises HarnessError, and what a place does."""
        if isinstance(step, steps.Score):
            return self.score(study, step.chosen, test[step.chosen.readout])
        if isinstance(step, steps.Rung):
            return self.run_rung(study, step.round, step.proposals, step.job)
        return self.run_round(study, step.round, step.proposals)

    def run_round(self, study: Study, index: int, proposals: Sequence[Proposal]) -> Round:
        """Train `proposals` (readout, learning rate), score every head on the selection split, and publish what each is scored from later."""
        halving = Halving.planned(study.probe, study.protocol, index, proposals)
        if halving is not None:
            return self._run_halving(study, halving)
        start = time.perf_counter()
        feed = self._feed(study)
        candidates: dict[int, Candidate] = {}
        for positions in feed.stacks(proposals):
            stack = _candidates(feed, study, index, [proposals[position] for position in positions])
            candidates |= zip(positions, stack, strict=True)
        heads = tuple(_head_score(index, number, proposal, candidates[number]) for number, proposal in enumerate(proposals))
        self._heads.publish(study, index, {number: candidate.state for number, candidate in candidates.items()})
        feed.clear(study, index)
        return Round(index=index, heads=heads, seconds=time.perf_counter() - start)

    def score(self, study: Study, chosen: HeadScore, test: BankRef) -> Score:
        """The chosen head on the test split, from the bank or stream of its readout. Raises BankError where its round is not in the cache."""
        start = time.perf_counter()
        predicted = self._feed(study).predictions(study, chosen, self._heads.state(study, chosen), test)
        score = scored(study, chosen, predicted.predictions, predicted.trained)
        return replace(score, seconds=time.perf_counter() - start, neighbours=list(predicted.neighbours))

    # --- successive halving -------------------------------------------------------------------------------------------

    def run_rung(self, study: Study, index: int, proposals: Sequence[Proposal], job: RungJob) -> RungResult:
        """Train one head of a round on to the end of a rung, and score it on the selection split; noted in the cache, and not done again.

        The jobs of one rung may run in different processes that share the cache.
        """
        place, key = _place_of_rung(study, index, job), {"proposal": list(proposals[job.head])}
        data = self._store.read_bytes(*place)
        noted = None if data is None else json.loads(data)
        if noted is not None and noted["key"] == key:
            return RungResult.from_json(noted["climbed"])
        start = time.perf_counter()
        try:
            result = self._stream_feed(study).rung(study, index, proposals[job.head], job)
        except HarnessError as error:
            result = RungResult(value=None, error=_answer(error), epochs=0)
        result = replace(result, seconds=time.perf_counter() - start)
        self._store.publish(place, json.dumps({"key": key, "climbed": result.to_json()}).encode(), replace=True)
        return result

    def _run_halving(self, study: Study, halving: Halving) -> Round:
        """Run the jobs that are left, rung by rung; publish the networks of those heads that came to the end, and the account of train."""
        index, feed, done = halving.round_index, self._stream_feed(study), dict[tuple[int, int], RungResult]()
        while jobs := halving.open(done):
            for job in jobs:
                done[job.rung, job.head] = self.run_rung(study, index, halving.proposals, job)
        start = time.perf_counter()
        heads = halving.heads(done)
        finished = [head.head for head in heads if head.value is not None and not head.stopped]
        if any(feed.has_checkpoint(study, index, head) for head in finished) or not self._heads.has_round(study, index):
            networks = {head: feed.network(study, index, head, halving.proposals[head], halving.ends[-1]) for head in finished}
            self._heads.publish(study, index, networks)
        feed.end_rungs(study, index, done)
        seconds = sum(result.seconds for result in done.values()) + time.perf_counter() - start
        return Round(index=index, heads=tuple(heads), seconds=seconds)

    # --- feeds --------------------------------------------------------------------------------------------------------

    def _feed(self, study: Study) -> StudyFeed:
        if study.stream is not None:
            return self._stream_feed(study)
        if self._banks is None:
            self._banks = BankFeed(self._store, Compute("float32", self._gpu, self._threads).device)
        return self._banks

    def _stream_feed(self, study: Study) -> StreamFeed:
        """The feed of a streamed study, which is another one where the precision is. Raises ProbeError where the study reads banks."""
        precision = stream_of(study).precision
        if self._stream is None or self._stream.precision != precision:
            compute = Compute(precision, self._gpu, self._threads)
            self._stream = StreamFeed(self._store, compute, load_encoder=self._load_encoder, clock=self._clock)
        return self._stream


def _candidates(feed: StudyFeed, study: Study, index: int, proposals: Sequence[Proposal]) -> Sequence[Candidate]:
    """The heads of one stack, or why all of them failed."""
    try:
        return feed.candidates(study, index, proposals)
    except HarnessError as error:
        return [Candidate(value=None, error=_answer(error))] * len(proposals)


def _answer(error: HarnessError) -> str:
    """What an error says of a head; raises it where it says nothing of one, and another try may go better."""
    if is_of_the_place(error):
        raise error
    return str(error)


def _head_score(index: int, number: int, proposal: Proposal, candidate: Candidate) -> HeadScore:
    readout, rate = proposal
    return HeadScore(round=index, head=number, lr=rate, readout=readout, value=candidate.value, error=candidate.error, epochs=candidate.epochs)


def _place_of_rung(study: Study, index: int, job: RungJob) -> tuple[str, str]:
    """How a rung went for a head, beside the checkpoints; it stays when the round is over."""
    return train_ref(study).bank.key, f"climb-{study.id}-{index}-{job.rung}-{job.head}.json"
