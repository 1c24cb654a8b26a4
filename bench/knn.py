"""k-NN against the bare matrix product, scikit-learn and faiss, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from bench._timing import median_of, one_thread
from bench.rows import Row
from harness.core import Rows
from harness.probes import row_probe
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


def run(tiny: bool) -> list[Row]:
    rows, queries = (500, 50) if tiny else (200_000, 2_000)
    with one_thread():
        seconds = measured(rows, queries)
    about = f"{queries:,} queries, {rows:,} rows × {WIDTH}, k = {K}, one thread"
    probe_seconds = seconds["k-NN probe"]
    return [
        Row(
            row=f"k-NN / {rival}",
            what=f"k-NN probe, {about}",
            against=rival,
            ratio=probe_seconds / seconds[rival],
            target=target,
            lower_is_better=True,
            measured={f"{name}, s": value for name, value in seconds.items()},
        )
        for rival, target in (("bare product", None), ("faiss IndexFlatIP and the vote", 1.1), ("scikit-learn KNeighborsClassifier", None))
    ]


def measured(rows: int, count: int) -> dict[str, float]:
    """Seconds of the probe and its rivals. Raises AssertionError where their predictions differ in more than a hundredth."""
    train, test = made(rows, 1), made(count, 2)
    gallery, queries = torch.from_numpy(train.features), torch.from_numpy(test.features)
    predictions: dict[str, np.ndarray] = {}

    def product() -> None:
        for part in torch.split(gallery, GALLERY_ROWS):
            for batch in torch.split(queries, QUERY_ROWS):
                batch @ part.T

    def ours() -> None:
        stack = row_probe("knn").fit(
            train, [None], classes=CLASSES, protocol=KNNFields(k=K, temperature=TEMPERATURE), seed=0, device=torch.device("cpu")
        )
        predictions["k-NN probe"] = stack.predict(test, 0).predictions

    def scikit() -> None:
        model = KNeighborsClassifier(K, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE))
        predictions["scikit-learn KNeighborsClassifier"] = model.fit(train.features, train.targets).predict(test.features)

    rivals: dict[str, Callable[[], None]] = {
        "bare product": product,
        "k-NN probe": ours,
        "faiss IndexFlatIP and the vote": faiss_rival(train, test, predictions),
        "scikit-learn KNeighborsClassifier": scikit,
    }
    seconds = median_of(rivals)
    for name, labels in predictions.items():
        assert np.mean(labels == predictions["k-NN probe"]) > 0.99, name
    return seconds


def faiss_rival(train: Rows, test: Rows, predictions: dict[str, np.ndarray]) -> Callable[[], None]:
    faiss.omp_set_num_threads(1)

    def call() -> None:
        gallery, queries = (rows.features[:] / np.linalg.norm(rows.features[:], axis=1, keepdims=True) for rows in (train, test))
        index = faiss.IndexFlatIP(WIDTH)
        index.add(gallery)
        similarity, near = index.search(queries, K)
        votes = np.zeros((len(queries), CLASSES))
        np.add.at(votes, (np.arange(len(queries))[:, None], train.targets[near]), np.exp(similarity / TEMPERATURE))
        predictions["faiss IndexFlatIP and the vote"] = votes.argmax(axis=1)

    return call
