"""On a GPU: a stack of linear heads against one head alone. Without one the row is not measured."""

from __future__ import annotations

import numpy as np
import torch

from bench._timing import median_of
from bench.rows import Row, not_measured
from harness.core import Rows
from harness.probes import row_probe
from harness.probes.linear import LinearFields

NAME, TARGET = "stack on a GPU / one head", 1.3


def run(tiny: bool) -> list[Row]:
    n, width, classes, heads = (60, 8, 3, 2) if tiny else (50_000, 384, 10, 32)
    what, against = f"{heads} linear heads in a stack, {n:,} rows × {width}, {classes} classes", "one head alone"
    if not torch.cuda.is_available() and not tiny:
        return [not_measured(NAME, "no GPU", what=what, against=against, target=TARGET)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = measured(n, width, classes, heads, device)
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


def measured(n: int, width: int, classes: int, heads: int, device: torch.device) -> dict[str, float]:
    """Seconds of a stack and of one head, each until the device has done its work."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, n)
    features = (rng.standard_normal((classes, width))[targets] * 0.3 + rng.standard_normal((n, width))).astype(np.float32)
    names = [str(i) for i in range(n)]
    rows = Rows(keys=names, groups=names, targets=targets, features=features)
    rates = np.geomspace(1e-3, 10, heads).tolist()

    def fit(lrs: list[float]) -> None:
        row_probe("linear").fit(rows, lrs, classes=classes, protocol=LinearFields(epochs=90, batch_size=1024), seed=0, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()

    fit(rates[:1])  # the first call loads kernels
    return median_of({"stack": lambda: fit(rates), "one head": lambda: fit(rates[:1])})
