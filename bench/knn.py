"""k-NN against the bare matrix product, scikit-learn and faiss.

`python bench/knn.py [--rows N] [--queries Q] [--threads T]`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import faiss
import numpy as np
import torch
from _timing import median_of, show
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from harness.core import Rows
from harness.probes import probe
from harness.probes.knn import QUERY_ROWS, KNNFields
from harness.probes.lib.similarity import GALLERY_ROWS

K, TEMPERATURE, CLASSES, WIDTH = 20, 0.07, 20, 384


def made(n: int, seed: int) -> Rows:
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, n)
    features = fixed.standard_normal((CLASSES, WIDTH), dtype=np.float32)[targets] * np.float32(0.2) + rng.standard_normal(
        (n, WIDTH), dtype=np.float32
    )
    names = [str(i) for i in range(n)]
    return Rows(keys=names, groups=names, targets=targets, features=features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train, test = made(arguments.rows, 1), made(arguments.queries, 2)
    gallery, queries = torch.from_numpy(train.features), torch.from_numpy(test.features)
    found: dict[str, np.ndarray] = {}

    def product() -> None:
        for part in gallery.split(GALLERY_ROWS):
            for some in queries.split(QUERY_ROWS):
                some @ part.T

    def ours() -> None:
        stack = probe("knn").fit(train, [None], classes=CLASSES, protocol=KNNFields(k=K, temperature=TEMPERATURE), seed=0, device=torch.device("cpu"))
        found["k-NN probe"] = stack.predict(test, 0).predictions

    def scikit() -> None:
        model = KNeighborsClassifier(K, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
        found["scikit-learn KNeighborsClassifier"] = model.fit(train.features, train.targets).predict(test.features)

    rivals: dict[str, Callable[[], None]] = {
        "bare product": product,
        "k-NN probe": ours,
        "faiss IndexFlatIP and the vote": faiss_rival(train, test, arguments.threads, found),
        "scikit-learn KNeighborsClassifier": scikit,
    }
    with threadpool_limits(arguments.threads):
        seconds = median_of(rivals)
    show(f"{arguments.queries} queries, {arguments.rows} rows x {WIDTH}, k = {K}, {arguments.threads} thread(s)", seconds, "bare product")
    for name, predictions in found.items():
        print(f"  {name}: {np.mean(predictions == found['k-NN probe']):.4f} of its predictions are the probe's")


def faiss_rival(train: Rows, test: Rows, threads: int, found: dict[str, np.ndarray]) -> Callable[[], None]:
    faiss.omp_set_num_threads(threads)

    def call() -> None:
        gallery, queries = (rows.features / np.linalg.norm(rows.features, axis=1, keepdims=True) for rows in (train, test))
        index = faiss.IndexFlatIP(WIDTH)
        index.add(gallery)
        similarity, near = index.search(queries, K)
        votes = np.zeros((len(queries), CLASSES))
        np.add.at(votes, (np.arange(len(queries))[:, None], train.targets[near]), np.exp(similarity / TEMPERATURE))
        found["faiss IndexFlatIP and the vote"] = votes.argmax(axis=1)

    return call


if __name__ == "__main__":
    main()
