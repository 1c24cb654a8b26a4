"""How far a study has come, and what it wants done next: pure logic, which knows nothing of the processes that do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.plan.rates import is_searched, rates_at_once
from harness.probes import grid, probe
from harness.probes.fields import lr_bounds_of
from harness.search import steps
from harness.search.halving import Halving, RungResult
from harness.search.propose import HeadScore, choose, propose
from harness.search.steps import Step
from harness.search.study import BankRef, Round, Score, Study


@dataclass(kw_only=True, eq=False)
class StudyState:
    """How far a study has come."""

    study: Study
    test: Mapping[str, BankRef]
    rounds: list[Round] = field(default_factory=list)
    score: Score | None = None
    _fit: steps.Fit | None = None
    """The round under way, where it has rungs."""
    _rungs: dict[tuple[int, int], RungResult] = field(default_factory=dict)
    """The results of those jobs that are done, by rung and head."""

    @property
    def planned_rounds(self) -> int:
        if self.study.decided:
            return 0
        return self.study.trials if probe(self.study.probe).has_learning_rate and is_searched(self.lr) else 1

    @property
    def lr(self) -> tuple[float, ...]:
        """Bounds of the learning rates, or more than two that are tried: the protocol's own, or else the sweep's."""
        return tuple(lr_bounds_of(self.study.protocol) or self.study.lr)

    @property
    def heads(self) -> list[HeadScore]:
        return [head for finished in self.rounds for head in finished.heads]

    @property
    def steps_left(self) -> int:
        return self.planned_rounds - len(self.rounds) + (self.score is None)

    @property
    def _only_head(self) -> HeadScore:
        value = grid(self.study.probe, self.study.protocol)[0]
        return HeadScore(round=0, head=0, lr=value, readout=self.study.readouts[0], value=None)

    def next_step(self) -> steps.Fit | steps.Score | None:
        """What the study wants done next; None where nothing is left, or nothing can be scored."""
        study = self.study
        if len(self.rounds) < self.planned_rounds:
            return self._next_round()
        if self.score is not None:
            return None
        chosen = self._only_head if study.decided else choose(self.heads, study.readouts)
        if chosen is None:
            self.score = Score(head=None, values=(), n=0, seconds=0.0, error=_first_error(self.heads))
            return None
        return steps.Score(chosen=chosen)

    def _next_round(self) -> steps.Fit:
        study, index = self.study, len(self.rounds)
        if not probe(study.probe).has_learning_rate:
            values = grid(study.probe, study.protocol)
            return steps.Fit(round=index, proposals=tuple((readout, value) for readout in study.readouts for value in values))
        proposals = propose(
            study=study.name,
            seed=study.seed,
            round_index=index,
            history=self.heads,
            readouts=study.readouts,
            stack=rates_at_once(self.lr, study.stack),
            lr=self.lr,
        )
        return steps.Fit(round=index, proposals=tuple(proposals))

    def next_steps(self) -> Sequence[Step]:
        """All that may run side by side: the jobs of a rung where a round has rungs, else the one step that comes next."""
        step = self._fit or self.next_step()
        if not isinstance(step, steps.Fit):
            return [] if step is None else [step]
        halving = Halving.planned(self.study.probe, self.study.protocol, step.round, step.proposals) if step.proposals else None
        if halving is None:
            return [step]
        self._fit = step
        jobs = [steps.Rung(round=step.round, proposals=step.proposals, job=job) for job in halving.open(self._rungs)]
        return jobs or [step]

    def take(self, step: Step, payload: str) -> None:
        """Note what became of one of `next_steps`, as the outcome's own `to_json` tells it."""
        if isinstance(step, steps.Rung):
            self._rungs[step.job.rung, step.job.head] = RungResult.from_json(payload)
        elif isinstance(step, steps.Fit):
            self.rounds.append(Round.from_json(payload))
            self._fit, self._rungs = None, {}
        else:
            self.score = Score.from_json(payload)


def _first_error(heads: Sequence[HeadScore]) -> str:
    return next((head.error for head in heads if head.error), "no head could be scored on the selection split")
