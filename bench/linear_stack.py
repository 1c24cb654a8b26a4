"""The stack of linear heads against its bare products, one head, and its heads one by one, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bench._timing import median_of, one_thread
from bench.rows import Row
from harness.core import Rows
from harness.probes import row_probe
from harness.probes.linear import LinearFields

BATCH = 1024
CPU = torch.device("cpu")
WIDE, SINGLY, STACK, ALONE = "bare products, all heads in one", "bare products, head by head", "stack", "one learning rate"


@dataclass(frozen=True)
class Size:
    """What is trained."""

    rows: int
    width: int
    classes: int
    heads: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.heads} linear heads, {self.rows:,} rows × {self.width}, {self.classes:,} classes, epochs of batches of {BATCH:,}, one thread"


SIZES = ((Size(50_000, 384, 10, 32, 3), 2.0), (Size(50_000, 384, 100, 32, 2), 1.2), (Size(50_000, 384, 1000, 32, 1), 1.0))
"""Each with the most that the stack may take of what the bare products of all heads in one take."""
TINY = ((Size(70, 8, 3, 2, 1), 2.0),)
OF_ONE_RATE = 7.0
"""The most that the stack may take of what one learning rate takes, at the fewest classes."""


def run(tiny: bool) -> list[Row]:
    """Rows of the stack against the bare products, and against one learning rate."""
    rows: list[Row] = []
    for place, (size, target) in enumerate(TINY if tiny else SIZES):
        with one_thread():
            seconds = measured(size)
        for rival, most in ((WIDE, target), (ALONE, OF_ONE_RATE if place == 0 else None)):
            rows.append(
                Row(
                    row=f"heads, {size.classes:,} classes / {rival}",
                    what=str(size),
                    against=rival,
                    ratio=seconds[STACK] / seconds[rival],
                    target=most,
                    lower_is_better=True,
                    measured={f"{name}, s": value for name, value in seconds.items()},
                )
            )
    return rows


def measured(size: Size) -> dict[str, float]:
    """Seconds of the stack and its rivals. The products write to the tables that a loop would use again: no page faults are counted in."""
    features, rows = made(size)
    lrs = rates(size)
    rivals: dict[str, Callable[[], object]] = {
        WIDE: lambda: products(features, size.heads * size.classes, 1, size.epochs),
        SINGLY: lambda: products(features, size.classes, size.heads, size.epochs),
        STACK: lambda: fit(rows, lrs, size),
        ALONE: lambda: fit(rows, lrs[:1], size),
    }
    fit(rows, lrs, size)  # what is tried once per shape is no part of a step
    return median_of(rivals)


def made(size: Size) -> tuple[np.ndarray, Rows]:
    """Features around the means of their classes, and the rows of them."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, size.classes, size.rows)
    features = (rng.standard_normal((size.classes, size.width))[targets] * 0.3 + rng.standard_normal((size.rows, size.width))).astype(np.float32)
    names = [str(i) for i in range(size.rows)]
    return features, Rows(keys=names, groups=names, targets=targets, features=features)


def rates(size: Size) -> list[float]:
    """A learning rate per head."""
    return [float(rate) for rate in np.geomspace(1e-3, 10, size.heads)]


def fit(rows: Rows, lrs: list[float], size: Size, device: torch.device = CPU) -> object:
    protocol = LinearFields(epochs=size.epochs, batch_size=BATCH)
    return row_probe("linear").fit(rows, lrs, classes=size.classes, protocol=protocol, seed=0, device=device)


def products(features: np.ndarray, outputs: int, times: int, epochs: int) -> None:
    """The two products of every step, of heads with so many outputs, so many times."""
    weight, table = torch.randn(outputs, features.shape[1]), torch.from_numpy(features)
    gradient, logits = torch.empty_like(weight), torch.empty(outputs, BATCH)
    for _ in range(epochs):
        for batch in torch.split(table, BATCH):
            out = logits if len(batch) == BATCH else torch.empty(outputs, len(batch))
            for _ in range(times):
                torch.mm(torch.mm(weight, batch.T, out=out), batch, out=gradient)
