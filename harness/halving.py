"""Successive halving within a round: learning rates climb rungs of more and more epochs, and at each one the best of them go on.

Synchronous: a rung is over when all of its heads are, so that who goes on depends on their values alone. Each head's step is journalled when it is
done, and a round that was interrupted goes on with the one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness.propose import HeadScore, survivors


@dataclass(frozen=True, kw_only=True)
class Climbed:
    """One head at the end of a rung."""

    value: float | None
    """On the selection split; None where the head failed."""
    error: str | None
    epochs: int
    """Epochs that it has behind it."""
    account: Mapping[str, Any] = field(default_factory=dict)
    """What became of the samples in all its epochs, and what that took: plain values, for whoever climbs."""


@dataclass(kw_only=True)
class Journal:
    """How far a round has come."""

    proposals: list[list[Any]]
    """Readout and learning rate of each head."""
    starts: int = 0
    climbed: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """Of each rung the heads (by number) that are done with it, as `Climbed`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Journal:
        return Journal(**json.loads(text))

    def last(self, head: int) -> Climbed | None:
        """A head at the end of the highest rung that it is done with."""
        found = [rung[str(head)] for rung in self.climbed if str(head) in rung]
        return Climbed(**found[-1]) if found else None


@dataclass(kw_only=True, eq=False)
class Halving:
    """One round."""

    round_index: int
    journal: Journal
    ends: Sequence[int]
    """Epochs after which each rung ends."""
    eta: int
    climb: Callable[[int, int], Climbed]
    """Train a head on to the end of so many epochs, and score it."""
    drop: Callable[[int], None]
    """Forget the weights of a head that does not go on."""
    save: Callable[[Journal], None]

    def run(self) -> list[HeadScore]:
        """Every head as the last rung that it came to left it, in the order of the proposals."""
        heads = [
            HeadScore(round=self.round_index, head=number, lr=rate, readout=readout, value=None)
            for number, (readout, rate) in enumerate(self.journal.proposals)
        ]
        going = list(heads)
        for rung, end in enumerate(self.ends):
            done = [self._climbed(head, rung, end) for head in going]
            going = survivors(done, self.eta) if rung < len(self.ends) - 1 else done
            kept = {head.head for head in going}
            for head in done:
                heads[head.head] = replace(head, stopped=head.value is not None and head.head not in kept)
                if head.head not in kept or head.value is None:
                    self.drop(head.head)
        return heads

    def _climbed(self, head: HeadScore, rung: int, end: int) -> HeadScore:
        while len(self.journal.climbed) <= rung:
            self.journal.climbed.append({})
        done = self.journal.climbed[rung]
        if str(head.head) not in done:
            done[str(head.head)] = asdict(self.climb(head.head, end))
            self.save(self.journal)
        found = Climbed(**done[str(head.head)])
        return replace(head, value=found.value, error=found.error, epochs=found.epochs)
