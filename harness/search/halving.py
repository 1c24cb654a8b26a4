"""Successive halving within a round: learning rates climb rungs of more and more epochs, and at each one the best of them go on.

Synchronous: a rung is over when all of its heads are, so that who goes on depends on their values alone, and not on which of them came first. The
jobs of one rung may run side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness import probes
from harness.core import Fields, Proposal, StreamProbe
from harness.search.propose import HeadScore, survivors


@dataclass(frozen=True, kw_only=True)
class RungJob:
    """One head from the end of a rung to that of the next one."""

    head: int
    rung: int
    epochs: int
    """At the end of the rung, counted from the beginning."""


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """One head at the end of a rung."""

    value: float | None
    """On the selection split; None where the head failed."""
    error: str | None
    epochs: int
    """Epochs that it has behind it."""
    seconds: float = 0.0
    """That this rung took; after an interruption, since then."""
    account: Mapping[str, Any] = field(default_factory=dict)
    """What became of the samples in all its epochs, and what that took: plain values, for whoever trains the head on."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RungResult:
        return RungResult(**json.loads(text))


Done = Mapping[tuple[int, int], RungResult]
"""Rung and head to how that went."""


@dataclass(frozen=True, kw_only=True)
class Halving:
    """One round."""

    round_index: int
    proposals: Sequence[Proposal]
    ends: Sequence[int]
    """Epochs after which each rung ends."""
    eta: int
    """Of the heads of a rung one in so many goes on."""

    @staticmethod
    def planned(probe: str, protocol: Fields, round_index: int, proposals: Sequence[Proposal]) -> Halving | None:
        """A round as its protocol plans it; None where the probe trains all its heads to the end."""
        trained = probes.probe(probe)
        rungs = trained.rungs(protocol) if isinstance(trained, StreamProbe) else None
        return None if rungs is None else Halving(round_index=round_index, proposals=proposals, ends=rungs.ends, eta=rungs.eta)

    def open(self, done: Done) -> list[RungJob]:
        """The jobs that come next, in any order: what is missing of the lowest rung that is not over. Empty where the round is."""
        return self._walk(done)[0]

    def heads(self, done: Done) -> list[HeadScore]:
        """Every head as the last rung that it came to left it, in the order of the proposals."""
        return self._walk(done)[1]

    def _walk(self, done: Done) -> tuple[list[RungJob], list[HeadScore]]:
        heads = [
            HeadScore(round=self.round_index, head=number, lr=rate, readout=readout, value=None)
            for number, (readout, rate) in enumerate(self.proposals)
        ]
        going = list(heads)
        for rung, end in enumerate(self.ends):
            missing = [RungJob(head=head.head, rung=rung, epochs=end) for head in going if (rung, head.head) not in done]
            if missing:
                return missing, heads
            over = [_after(head, done[rung, head.head]) for head in going]
            going = survivors(over, self.eta) if rung < len(self.ends) - 1 else over
            survived = {head.head for head in going}
            for head in over:
                heads[head.head] = replace(head, stopped=head.value is not None and head.head not in survived)
        return [], heads


def _after(head: HeadScore, result: RungResult) -> HeadScore:
    return replace(head, value=result.value, error=result.error, epochs=result.epochs)
