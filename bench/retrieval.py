"""Retrieval against the bare matrix product and scikit-learn's average precision: `python bench/retrieval.py [--rows N] [--queries Q] [--threads T]`.

faiss finds the nearest k of a query; an average precision needs the place of every relevant row, so its exhaustive search for k = 1 is shown as
what it is: another bare product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import faiss
import numpy as np
import torch
from _timing import median_of, show
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

from harness.core import Rows
from harness.probes import probe
from harness.probes.retrieval import RetrievalFields

CLASSES, WIDTH = 20, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(arguments.rows)]
    targets = rng.integers(0, CLASSES, arguments.rows)
    features = rng.standard_normal((CLASSES, WIDTH), dtype=np.float32)[targets] * np.float32(0.2)
    features += rng.standard_normal((arguments.rows, WIDTH), dtype=np.float32)
    rows = Rows(keys=names, groups=names, targets=targets, features=features)
    stack = probe("retrieval").fit(
        None, [None], classes=CLASSES, protocol=RetrievalFields(exclude="query", max_queries=arguments.queries), seed=0, device=torch.device("cpu")
    )
    asked = np.array([int(key) for key in stack.predict(rows, 0).keys])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    found: dict[str, np.ndarray] = {}

    def product() -> None:
        torch.from_numpy(unit[asked]) @ torch.from_numpy(unit).T

    def ours() -> None:
        found["retrieval probe"] = stack.predict(rows, 0).scores

    def scikit() -> None:
        scores = []
        for query, line in zip(asked, unit[asked] @ unit.T, strict=True):
            kept = np.arange(len(rows)) != query
            scores.append(average_precision_score((targets == targets[query])[kept], line[kept]))
        found["product and scikit-learn average_precision_score"] = np.array(scores)

    rivals: dict[str, Callable[[], None]] = {
        "bare product": product,
        "retrieval probe": ours,
        "faiss IndexFlatIP, k = 1 (no average precision)": faiss_rival(unit, asked, arguments.threads),
        "product and scikit-learn average_precision_score": scikit,
    }
    with threadpool_limits(arguments.threads):
        seconds = median_of(rivals)
    show(f"{arguments.queries} queries, {arguments.rows} rows x {WIDTH}, {arguments.threads} thread(s)", seconds, "bare product")
    for name, scores in found.items():
        print(f"  {name}: mean {scores.mean():.6f}, largest difference from the probe {abs(scores - found['retrieval probe']).max():.1e}")


def faiss_rival(unit: np.ndarray, asked: np.ndarray, threads: int) -> Callable[[], None]:
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(unit)
    return lambda: index.search(unit[asked], 1)


if __name__ == "__main__":
    main()
