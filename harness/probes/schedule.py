"""Learning-rate schedules as factors of the rate given, one a step (an iteration, not an epoch)."""

from __future__ import annotations

import math


def cosine(step: int, steps: int) -> float:
    """(1 + cos(pi step / steps)) / 2 for step 0 to steps - 1: from 1 towards 0, which the step after the last would reach. SGDR, arXiv 1608.03983."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def polynomial(step: int, steps: int, *, power: float = 1.0) -> float:
    """(1 - step / steps) ** power for step 0 to steps - 1. DeepLab, arXiv 1606.00915."""
    return float((1 - step / steps) ** power)
