"""On a GPU: a stack of linear heads against one head alone. Without one the row is not measured."""

from __future__ import annotations

import torch

from bench._timing import median_of
from bench.linear_stack import Size, fit, made, rates
from bench.rows import Row, not_measured

NAME, TARGET = "stack on a GPU / one head", 1.3


def run(tiny: bool) -> list[Row]:
    size = Size(60, 8, 3, 2, 90) if tiny else Size(50_000, 384, 10, 32, 90)
    what, against = f"{size.heads} linear heads in a stack, {size.rows:,} rows × {size.width}, {size.classes} classes", "one head alone"
    if not torch.cuda.is_available() and not tiny:
        return [not_measured(NAME, "no GPU", what=what, against=against, target=TARGET)]
    seconds = measured(size, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return [
        Row(
            row=NAME,
            what=what,
            against=against,
            ratio=seconds["stack"] / seconds["one head"],
            target=TARGET,
            lower_is_better=True,
            measured={f"{name}, s": value for name, value in seconds.items()},
        )
    ]


def measured(size: Size, device: torch.device) -> dict[str, float]:
    """Seconds of a stack and of one head, each until the device has done its work."""
    _, rows = made(size)

    def finished(lrs: list[float]) -> None:
        fit(rows, lrs, size, device)
        if device.type == "cuda":
            torch.cuda.synchronize()

    lrs = rates(size)
    finished(lrs[:1])  # the first call loads kernels
    return median_of({"stack": lambda: finished(lrs), "one head": lambda: finished(lrs[:1])})
