"""Learning-rate schedules as factors of a base rate, one per step (an iteration, not an epoch) unless stated otherwise."""

from __future__ import annotations

import math
from typing import Literal

Anneal = Literal["step", "epoch"]
"""How often a schedule sets the learning rate."""


def cosine(step: int, steps: int) -> float:
    """(1 + cos(pi step / steps)) / 2 for step 0 to steps - 1: from 1 towards 0, which step `steps` would reach. SGDR, arXiv 1608.03983."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def annealed(step: int, steps: int, *, epochs: int, anneal: Anneal) -> float:
    """`cosine` per step, or (`epoch`) its value at an epoch's first step for the whole epoch; `steps` are those of `epochs` equal epochs."""
    return cosine(step, steps) if anneal == "step" else cosine(step * epochs // steps, epochs)


def polynomial(step: int, steps: int, *, power: float = 1.0) -> float:
    """(1 - step / steps) ** power for step 0 to steps - 1. DeepLab, arXiv 1606.00915."""
    return float((1 - step / steps) ** power)
