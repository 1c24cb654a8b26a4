"""The stack of linear heads against its bare products, its heads one by one, and scikit-learn, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from bench._timing import median_of, one_thread
from bench.rows import Row
from harness.core import Rows
from harness.probes import row_probe
from harness.probes.linear import LinearFields

EPOCHS, BATCH = 90, 1024
WIDE, STACK, SINGLY = "bare products, all heads in one", "stack", "heads one by one"


def run(tiny: bool) -> list[Row]:
    n, width, classes, heads = (60, 8, 3, 2) if tiny else (5_000, 384, 11, 16)
    with one_thread():
        seconds = measured(n, width, classes, heads)
    about = f"{heads} linear heads in a stack, {n:,} rows × {width}, {classes} classes, {EPOCHS} epochs of batches of {BATCH:,}, one thread"
    return [
        Row(
            row=f"stack / {rival}",
            what=about,
            against=rival,
            ratio=seconds[STACK] / seconds[rival],
            target=target,
            lower_is_better=True,
            measured={f"{name}, s": value for name, value in seconds.items()},
        )
        for rival, target in ((WIDE, 2.0), (SINGLY, None))
    ]


def measured(n: int, width: int, classes: int, heads: int) -> dict[str, float]:
    """Seconds of the stack and its rivals."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, n)
    features = (rng.standard_normal((classes, width))[targets] * 0.3 + rng.standard_normal((n, width))).astype(np.float32)
    names = [str(i) for i in range(n)]
    rows = Rows(keys=names, groups=names, targets=targets, features=features)
    lrs = np.geomspace(1e-3, 10, heads).tolist()

    def fit(rates: list[float]) -> object:
        protocol = LinearFields(epochs=EPOCHS, batch_size=BATCH)
        return row_probe("linear").fit(rows, rates, classes=classes, protocol=protocol, seed=0, device=torch.device("cpu"))

    def products(columns: int, times: int) -> None:
        weight, table = torch.randn(columns, width), torch.from_numpy(features)
        for _ in range(EPOCHS):
            for batch in torch.split(table, BATCH):
                for _ in range(times):
                    (weight @ batch.T) @ batch

    rivals: dict[str, Callable[[], object]] = {
        WIDE: lambda: products(heads * classes, 1),
        "bare products, head by head": lambda: products(classes, heads),
        STACK: lambda: fit(lrs),
        SINGLY: lambda: list(map(fit, ([lr] for lr in lrs))),
        "scikit-learn LogisticRegression, one fit": lambda: LogisticRegression(max_iter=1000).fit(features, targets),
    }
    return median_of(rivals)
