"""Weighted k-NN against scikit-learn, ties, and chunks that change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from harness.core import Predictions, Rows
from harness.probes import knn
from harness.probes.knn import PROBE, KNNFields
from harness.probes.lib import similarity

CPU = torch.device("cpu")


def made(features: np.ndarray, targets: np.ndarray) -> Rows:
    keys = [f"k{i}" for i in range(len(targets))]
    return Rows(keys=keys, groups=keys, targets=targets, features=features.astype(np.float32))


def random_rows(n: int, classes: int, width: int = 16, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return made(rng.standard_normal((n, width)), rng.integers(0, classes, n))


def signs(n: int, seed: int = 0) -> Rows:
    """Entries +-1 in 16 dimensions: cosines are exact multiples of 1/16, hence full of exact ties."""
    rng = np.random.default_rng(seed)
    return made(rng.choice([-1.0, 1.0], (n, 16)), rng.integers(0, 4, n))


def predict(train: Rows, test: Rows, classes: int, **protocol: Any) -> Predictions:
    return PROBE.fit(train, [None], classes=classes, protocol=KNNFields(**protocol), seed=0, device=CPU).predict(test, 0)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (5, 1.0), (200, 0.2)])
def test_it_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    train, test = random_rows(200, 6), random_rows(80, 6, seed=1)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature))
    reference.fit(train.features.astype(np.float64), train.targets)
    predictions = predict(train, test, 6, k=k, temperature=temperature)
    shares = reference.predict_proba(test.features.astype(np.float64))
    assert predictions.predictions.tolist() == reference.predict(test.features.astype(np.float64)).tolist()
    assert predictions.scores == pytest.approx(shares.max(axis=1), abs=1e-4)
    assert (list(predictions.keys), predictions.targets.tolist()) == (list(test.keys), test.targets.tolist())


def test_fewer_training_rows_than_k_all_vote() -> None:
    train, test = random_rows(7, 3), random_rows(10, 3, seed=1)
    assert predict(train, test, 3, k=20).scores.tolist() == predict(train, test, 3, k=7).scores.tolist()


def test_no_temperature_overflows() -> None:
    train, test = random_rows(50, 3), random_rows(10, 3, seed=1)
    predictions = predict(train, test, 3, k=5, temperature=1e-6)
    assert predictions.predictions.tolist() == predict(train, test, 3, k=1).predictions.tolist()
    assert predictions.scores == pytest.approx(1)


def test_tied_neighbours_go_by_gallery_order() -> None:
    train = made(np.array([[0.0, 1.0]] + [[1.0, 0.0]] * 40), np.array([0] + [2] * 3 + [1] * 37))
    assert predict(train, made(np.array([[1.0, 0.0]]), np.array([2])), 3, k=5).scores == pytest.approx(3 / 5)
    assert predict(train, made(np.array([[1.0, 0.0]]), np.array([2])), 3, k=3).scores == pytest.approx(1)


def test_the_nearest_rows_are_those_of_a_stable_sort() -> None:
    table = torch.from_numpy(np.random.default_rng(0).integers(0, 6, (50, 300)).astype(np.float32))
    full, order = table.sort(dim=1, descending=True, stable=True)
    for k in (1, 7, 60, 299, 300, 400):
        values, columns = similarity.nearest_rows(table, k)
        assert torch.equal(values, full[:, :k])
        assert torch.equal(columns, order[:, :k])


@pytest.mark.parametrize("rows", [signs, lambda n, seed=0: random_rows(n, 4, seed=seed)], ids=["ties", "distinct"])
def test_chunks_of_queries_and_gallery_change_nothing(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = rows(500), rows(90, seed=1)
    whole = predict(train, test, 4, k=17)
    monkeypatch.setattr(similarity, "GALLERY_ROWS", 13)
    monkeypatch.setattr(knn, "QUERY_ROWS", 7)
    chunked = predict(train, test, 4, k=17)
    assert chunked.predictions.tolist() == whole.predictions.tolist()
    assert chunked.scores == pytest.approx(whole.scores, abs=1e-5)


def test_a_row_of_zeros_is_as_far_from_everything() -> None:
    train = made(np.array([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]), np.array([0, 1, 2]))
    assert predict(train, made(np.array([[1.0, 0.0], [-2.0, 0.0]]), np.array([2, 1])), 3, k=1).predictions.tolist() == [2, 1]
    assert np.isfinite(predict(train, made(np.zeros((1, 2)), np.array([0])), 3, k=3).scores).all()


def test_it_is_restored_from_the_training_rows_alone() -> None:
    train, test = random_rows(60, 3), random_rows(10, 3, seed=1)
    stack = PROBE.fit(train, [None], classes=3, protocol=KNNFields(k=3), seed=0, device=CPU)
    assert stack.state(0) == {}
    back = PROBE.restore({}, train, classes=3, protocol=KNNFields(k=3), seed=0, device=CPU)
    assert back.predict(test, 0).scores.tolist() == stack.predict(test, 0).scores.tolist()
