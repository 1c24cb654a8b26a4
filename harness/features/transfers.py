"""Batches to a device and results back from it, so that neither waits for the other.

On a GPU batches go through pinned memory on a stream of their own, while the batch before them is computed on, and results are fetched once the next
batch is under way. On a CPU there is nothing to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(kw_only=True, eq=False)
class OnItsWay:
    """Results of a batch that may still be computed."""

    tensors: list[torch.Tensor]
    """On the host."""
    start: torch.cuda.Event | None
    end: torch.cuda.Event | None
    seconds: float
    """Of this process's time until they were under way."""

    def wait(self) -> tuple[list[np.ndarray], float]:
        """The results, in memory of their own, and the seconds that they took: on a GPU its own time."""
        if self.start is None or self.end is None:
            return [tensor.numpy() for tensor in self.tensors], self.seconds
        self.end.synchronize()
        return [tensor.numpy().copy() for tensor in self.tensors], self.start.elapsed_time(self.end) / 1000


class Transfers:
    """Between the host and one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def batch(self, values: list[torch.Tensor], size: int) -> torch.Tensor:
        """[size, ...] on the device of [...] on the host, padded with copies of the first."""
        padded = [*values, *values[:1] * (size - len(values))]
        if self._stream is None:
            return torch.stack(padded)
        pinned = torch.empty((size, *values[0].shape), dtype=values[0].dtype, pin_memory=True)
        torch.stack(padded, out=pinned)
        with torch.cuda.stream(self._stream):
            batch = pinned.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        batch.record_stream(current)
        return batch

    def compute(self, results: Callable[[], Sequence[torch.Tensor]]) -> OnItsWay:
        """What `results` computes on the device, on its way to the host."""
        if self._stream is None:
            began = time.perf_counter()
            return OnItsWay(tensors=list(results()), start=None, end=None, seconds=time.perf_counter() - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        tensors = [_to_pinned(tensor) for tensor in results()]
        end.record()
        return OnItsWay(tensors=tensors, start=start, end=end, seconds=0.0)


def _to_pinned(values: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return pinned.copy_(values, non_blocking=True)
