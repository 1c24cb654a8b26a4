"""Learning rates proposed in batches: one Optuna study per (encoder, task), rebuilt from its history for every round.

Rebuilding makes a proposal a function of (seed, study, round, history) and of nothing else: not of which trial came back first, nor of how often the
run was interrupted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import FloatDistribution


@dataclass(frozen=True, kw_only=True)
class HeadScore:
    """What became of one head: one learning rate (None for probes without) of one readout."""

    round: int
    head: int
    lr: float | None
    readout: str
    value: float | None
    """On the selection split, negated where lower is better; None where the head failed."""
    error: str | None = None
    epochs: int | None = None
    """What it was trained for, where heads of one study differ in that."""
    stopped: bool = False
    """Others did better after so many epochs: it was not trained to the end, and cannot be chosen."""


def first_rates(low: float, high: float, count: int) -> list[float]:
    """`count` rates that cut the log range evenly: the midpoints of its equal parts."""
    span = math.log(high) - math.log(low)
    return [math.exp(math.log(low) + span * (index + 0.5) / count) for index in range(count)]


def propose(
    *, study: str, seed: int, round_index: int, history: Sequence[HeadScore], readouts: Sequence[str], stack: int, lr: Sequence[float]
) -> list[tuple[str, float]]:
    """Learning rates for every readout: all of `lr` where these are more than two, else `stack` between those bounds.

    Between bounds, an even cut of the log range in round 0, Optuna's TPE on the history from then on. Heads that were stopped are pruned trials to
    it, which it ranks behind finished ones, by epochs and then by value.
    """
    if len(lr) > 2:
        return [(readout, rate) for readout in readouts for rate in lr]
    low, high = lr
    if round_index == 0 or low == high:
        return [(readout, rate) for readout in readouts for rate in first_rates(low, high, stack)]
    distribution = FloatDistribution(low, high, log=True)
    digest = hashlib.sha256(f"{seed}/{study}/{round_index}".encode()).digest()
    sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"), n_startup_trials=stack)
    search = optuna.create_study(direction="maximize", sampler=sampler)
    for score in history:
        if score.lr is None:
            continue
        name = f"lr/{score.readout}"
        search.add_trial(optuna.trial.create_trial(params={name: score.lr}, distributions={name: distribution}, value=score.value, **_outcome(score)))
    return [(readout, search.ask().suggest_float(f"lr/{readout}", low, high, log=True)) for readout in readouts for _ in range(stack)]


def _outcome(score: HeadScore) -> dict[str, Any]:
    if score.value is None:
        return {"state": optuna.trial.TrialState.FAIL}
    if score.stopped:
        return {"state": optuna.trial.TrialState.PRUNED, "intermediate_values": {score.epochs or 0: score.value}}
    return {"state": optuna.trial.TrialState.COMPLETE}


def survivors(scores: Sequence[HeadScore], eta: int) -> list[HeadScore]:
    """The heads of a rung that go on: one in `eta` of them, at least one, the best on the selection split; none where every head failed.

    Of tied ones those in the middle by learning rate go on, as in `choose`, whatever the order of `scores`.
    """
    valid = [score for score in scores if score.value is not None]
    left = min(max(1, len(scores) // eta), len(valid))
    going: list[HeadScore] = []
    for value in sorted({score.value for score in valid if score.value is not None}, reverse=True):
        tied = sorted((score for score in valid if score.value == value), key=lambda score: (score.lr or 0.0, score.head))
        count = min(left - len(going), len(tied))
        first = (len(tied) - count) // 2
        going += tied[first : first + count]
    return sorted(going, key=lambda score: score.head)


def choose(scores: Sequence[HeadScore], readouts: Sequence[str]) -> HeadScore | None:
    """The head with the best value on the selection split of those trained to the end; None where every head failed.

    On small splits many heads tie. Of the tied ones, the readout that comes first in `readouts` is taken, and of its heads the one with the (lower)
    median learning rate: the middle of the plateau and not its edge.
    """
    valid = [score for score in scores if score.value is not None and not score.stopped]
    if not valid:
        return None
    best = max(score.value for score in valid if score.value is not None)
    tied = [score for score in valid if score.value == best]
    readout = min((score.readout for score in tied), key=list(readouts).index)
    ordered = sorted((score for score in tied if score.readout == readout), key=lambda score: (score.lr or 0.0, score.round, score.head))
    return ordered[(len(ordered) - 1) // 2]
