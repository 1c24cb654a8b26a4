"""k-NN against faiss: seconds of CPU and peak memory, each in a process of its own on one thread.

`python -m bench.knn --full` does it at full size: the gallery has ImageNet's 1,281,167 rows and there are 10,000 queries.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from bench.rows import Row, table
from harness.core import Rows
from harness.probes import row_probe
from harness.probes.knn import KNNFields

K, TEMPERATURE, CLASSES = 20, 0.07, 20
ROUNDS = 3
SIZES = {"tiny": (300, 40, 16), "default": (200_000, 2_000, 384), "full": (1_281_167, 10_000, 384)}
"""Gallery rows, queries, features."""


def run(tiny: bool, full: bool = False) -> list[Row]:
    """Rows of time and of peak memory, the gallery itself included. Raises AssertionError where one prediction in a hundred differs."""
    size = SIZES["tiny" if tiny else "full" if full else "default"]
    seconds, peak, predictions = (dict[str, Any]() for _ in range(3))
    for name in ("probe", "faiss"):
        results = [alone(name, size) for _ in range(1 if tiny or full else ROUNDS)]
        seconds[name] = statistics.median(result[0] for result in results)
        peak[name] = statistics.median(result[1] for result in results)
        predictions[name] = results[0][2]
    assert np.mean(predictions["probe"] == predictions["faiss"]) > 0.99
    about = f"k-NN probe, {size[1]:,} queries in {size[0]:,} rows × {size[2]}, k = {K}, one thread"
    return [
        Row(
            row=f"k-NN / faiss, {quantity}",
            what=about,
            against="faiss IndexFlatIP and the vote",
            ratio=values["probe"] / values["faiss"],
            target=1.1,
            lower_is_better=True,
            measured={f"{name}, {unit}": value for name, value in values.items()},
        )
        for quantity, unit, values in (("time", "s", seconds), ("peak memory", "MB", peak))
    ]


def alone(name: str, size: tuple[int, int, int]) -> tuple[float, float, np.ndarray]:
    """Seconds of CPU, the peak of resident memory in MB, and predictions, of a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, name, size).result()


def measured(name: str, size: tuple[int, int, int]) -> tuple[float, float, np.ndarray]:
    rows, queries, width = size
    torch.set_num_threads(1)
    rivals: dict[str, Callable[[Rows, Rows], np.ndarray]] = {"probe": by_probe, "faiss": by_faiss}
    with threadpool_limits(1):
        rivals[name](made(100, width, 1), made(10, width, 2))  # imports, and what a library sets up at its first call
        train, test = made(rows, width, 1), made(queries, width, 2)
        start = time.process_time()  # one thread: on a quiet machine the same as the clock's
        predictions = rivals[name](train, test)
        seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, predictions


def made(count: int, width: int, seed: int) -> Rows:
    """Rows around the means of their classes, made in parts that take little memory beside them."""
    means, rng = np.random.default_rng(0).standard_normal((CLASSES, width), dtype=np.float32) * np.float32(0.2), np.random.default_rng(seed)
    targets, features = rng.integers(0, CLASSES, count), np.empty((count, width), np.float32)
    for start in range(0, count, 10_000):
        part = features[start : start + 10_000]
        rng.standard_normal(dtype=np.float32, out=part)
        part += means[targets[start : start + 10_000]]
    names = [str(i) for i in range(count)]
    return Rows(keys=names, groups=names, targets=targets, features=features)


def by_probe(train: Rows, test: Rows) -> np.ndarray:
    protocol = KNNFields(k=K, temperature=TEMPERATURE)
    stack = row_probe("knn").fit(train, [None], classes=CLASSES, protocol=protocol, seed=0, device=torch.device("cpu"))
    return stack.predict(test, 0).predictions


def by_faiss(train: Rows, test: Rows) -> np.ndarray:
    """The rows normalised, copied into an index, searched, and the votes."""
    import faiss  # a peer, which other benchmarks do without

    faiss.omp_set_num_threads(1)
    gallery, queries = (rows.features[:] / np.linalg.norm(rows.features[:], axis=1, keepdims=True) for rows in (train, test))
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    similarity, near = index.search(queries, K)
    votes = np.zeros((len(queries), CLASSES))
    np.add.at(votes, (np.arange(len(queries))[:, None], train.targets[near]), np.exp(similarity / TEMPERATURE))
    predictions: np.ndarray = votes.argmax(axis=1)
    return predictions


if __name__ == "__main__":
    print(table(run(False, "--full" in sys.argv)))
