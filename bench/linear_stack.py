"""The stack of linear heads against its bare products, its heads one by one, and scikit-learn.

`python bench/linear_stack.py [--rows N] [--width D] [--classes C] [--heads K] [--threads T]`
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from _timing import median_of, show
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from harness.core import Rows
from harness.probes import probe
from harness.probes.linear import LinearFields

EPOCHS, BATCH = 90, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    n, width, classes, heads = arguments.rows, arguments.width, arguments.classes, arguments.heads
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, n)
    features = (rng.standard_normal((classes, width))[targets] * 0.3 + rng.standard_normal((n, width))).astype(np.float32)
    names = [str(i) for i in range(n)]
    rows = Rows(keys=names, groups=names, targets=targets, features=features)
    lrs = np.geomspace(1e-3, 10, heads).tolist()

    def fit(rates: list[float]) -> None:
        protocol = LinearFields(epochs=EPOCHS, batch_size=BATCH)
        probe("linear").fit(rows, rates, classes=classes, protocol=protocol, seed=0, device=torch.device("cpu"))

    def products(columns: int, times: int) -> None:
        weight, table = torch.randn(columns, width), torch.from_numpy(features)
        for _ in range(EPOCHS):
            for batch in table.split(BATCH):
                for _ in range(times):
                    (weight @ batch.T) @ batch

    rivals = {
        "bare products, all heads in one": lambda: products(heads * classes, 1),
        "bare products, head by head": lambda: products(classes, heads),
        "stack": lambda: fit(lrs),
        "heads one by one": lambda: [fit([lr]) for lr in lrs],
        "scikit-learn LogisticRegression, one fit": lambda: LogisticRegression(max_iter=1000).fit(features, targets),
    }
    with threadpool_limits(arguments.threads):
        seconds = median_of(rivals)
    title = f"{heads} heads, {n} rows x {width}, {classes} classes, {EPOCHS} epochs of batches of {BATCH}, {arguments.threads} thread(s)"
    show(title, seconds, "bare products, all heads in one")


if __name__ == "__main__":
    main()
