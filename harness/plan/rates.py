"""How many learning rates a search tries: what the plan and the search must agree on."""

from __future__ import annotations

from collections.abc import Sequence


def is_searched(lr: Sequence[float]) -> bool:
    """Whether rates are looked for between bounds: not where the bounds are one rate, nor where more than two say what to try."""
    return len(lr) == 2 and lr[0] < lr[1]


def rates_at_once(lr: Sequence[float], stack: int) -> int:
    """Learning rates of a round, for every readout."""
    return stack if is_searched(lr) else len(lr) if len(lr) > 2 else 1
