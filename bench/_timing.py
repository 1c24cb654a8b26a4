"""Timings of rivals in one run, in turns, so that a noisy machine is as noisy for each; figures are ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def median_of(rivals: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Seconds of each rival's median call; every round calls each once."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def show(title: str, seconds: Mapping[str, float], base: str) -> None:
    """A line a rival: seconds, and how many times as long as `base`."""
    print(title)
    for name, each in seconds.items():
        print(f"  {name:<48} {each:9.3f} s  {each / seconds[base]:7.2f} x")
