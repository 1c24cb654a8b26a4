"""Timings of rivals in one run, in turns, so that a noisy machine is as noisy for each; figures are ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


def median_of(rivals: Mapping[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Seconds of each rival's median call; every round calls each once."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(calls) for name, calls in seconds.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and for every other library's arithmetic, while the block lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
