"""What is done next for a study: one of three steps, each a frozen value with a form in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from harness.core import Proposal
from harness.search.halving import RungJob
from harness.search.propose import HeadScore


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One round: a stack of heads, fitted on train and scored on the selection split."""

    kind: ClassVar = "fit"
    round: int
    proposals: tuple[Proposal, ...]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One rung of one head of a round whose heads are trained by successive halving."""

    kind: ClassVar = "rung"
    round: int
    proposals: tuple[Proposal, ...]
    """Those of the whole round."""
    job: RungJob


@dataclass(frozen=True, kw_only=True)
class Score:
    """The chosen head on test: the last step of a study."""

    kind: ClassVar = "score"
    chosen: HeadScore


Step = Fit | Rung | Score


def to_plain(step: Step) -> dict[str, Any]:
    """The step as plain values that JSON can hold; `from_plain` reads them."""
    plain = {"kind": step.kind, **asdict(step)}
    if not isinstance(step, Score):
        plain["proposals"] = [list(proposal) for proposal in step.proposals]
    return plain


def from_plain(plain: Mapping[str, Any]) -> Step:
    """The step of which these are the plain values. Raises ValueError where they are of no kind of step."""
    if plain["kind"] == Score.kind:
        return Score(chosen=HeadScore(**plain["chosen"]))
    index, proposals = plain["round"], tuple((readout, value) for readout, value in plain["proposals"])
    if plain["kind"] == Fit.kind:
        return Fit(round=index, proposals=proposals)
    if plain["kind"] == Rung.kind:
        return Rung(round=index, proposals=proposals, job=RungJob(**plain["job"]))
    raise ValueError(f"expected a step of kind fit, rung or score, got {plain['kind']!r}")
