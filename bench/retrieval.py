"""Retrieval against the bare matrix product and scikit-learn's average precision, on one thread.

faiss finds the nearest k of a query; an average precision needs the place of every relevant row, so its exhaustive search for k = 1 is shown as
what it is: another bare product.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import torch
from sklearn.metrics import average_precision_score

from bench._timing import median_of, one_thread
from bench.rows import Row
from harness.core import Rows
from harness.probes import row_probe
from harness.probes.retrieval import RetrievalFields

CLASSES, WIDTH = 20, 384


def run(tiny: bool) -> list[Row]:
    count, queries = (300, 20) if tiny else (200_000, 2_000)
    with one_thread():
        seconds = measured(count, queries)
    return [
        Row(
            row=f"retrieval / {rival}",
            what=f"retrieval probe, exact average precision of {queries:,} queries in {count:,} rows × {WIDTH}, one thread",
            against=rival,
            ratio=seconds["retrieval probe"] / seconds[rival],
            target=target,
            lower_is_better=True,
            measured={f"{name}, s": value for name, value in seconds.items()},
        )
        for rival, target in (("bare product", 2.5), ("product and scikit-learn average_precision_score", None))
    ]


def measured(count: int, queries: int) -> dict[str, float]:
    """Seconds of the probe and its rivals. Raises AssertionError where average precisions differ by more than 1e-4."""
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(count)]
    targets = rng.integers(0, CLASSES, count)
    features = rng.standard_normal((CLASSES, WIDTH), dtype=np.float32)[targets] * np.float32(0.2)
    features += rng.standard_normal((count, WIDTH), dtype=np.float32)
    rows = Rows(keys=names, groups=names, targets=targets, features=features)
    stack = row_probe("retrieval").fit(
        None, [None], classes=CLASSES, protocol=RetrievalFields(exclude="query", max_queries=queries), seed=0, device=torch.device("cpu")
    )
    chosen = np.array([int(key) for key in stack.predict(rows, 0).keys])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    precisions: dict[str, np.ndarray] = {}

    def product() -> None:
        torch.from_numpy(unit[chosen]) @ torch.from_numpy(unit).T

    def ours() -> None:
        precisions["retrieval probe"] = stack.predict(rows, 0).scores

    def scikit() -> None:
        scores = []
        for query, line in zip(chosen, unit[chosen] @ unit.T, strict=True):
            gallery = np.arange(len(rows)) != query
            scores.append(average_precision_score((targets == targets[query])[gallery], line[gallery]))
        precisions["product and scikit-learn average_precision_score"] = np.array(scores)

    rivals: dict[str, Callable[[], object]] = {
        "bare product": product,
        "retrieval probe": ours,
        "faiss IndexFlatIP, k = 1 (no average precision)": faiss_rival(unit, chosen),
        "product and scikit-learn average_precision_score": scikit,
    }
    seconds = median_of(rivals)
    for name, scores in precisions.items():
        assert abs(scores - precisions["retrieval probe"]).max() < 1e-4, name
    return seconds


def faiss_rival(unit: np.ndarray, chosen: np.ndarray) -> Callable[[], object]:
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(unit)
    return lambda: index.search(unit[chosen], 1)
