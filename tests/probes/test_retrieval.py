"""Retrieval against scikit-learn's average precision, with exclusions from a query's gallery, ties, and chunks that change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from harness.core import Predictions, Rows
from harness.errors import ProbeError
from harness.probes import retrieval
from harness.probes.lib import similarity
from harness.probes.retrieval import PROBE, RetrievalFields, neighbours

CPU = torch.device("cpu")


def bank(kind: str, n: int = 120, seed: int = 0) -> Rows:
    """Rows in groups of up to several; class 7 has one row, and one row has no class."""
    rng = np.random.default_rng(seed)
    # entries +-1 in 16 dimensions make every cosine a multiple of 1/16: exact, and full of ties
    features = rng.choice([-1.0, 1.0], (n, 16)) if kind == "ties" else rng.standard_normal((n, 16))
    targets = rng.integers(0, 4, n)
    targets[11], targets[23] = 7, -1
    keys = [f"k{i}" for i in range(n)]
    return Rows(keys=keys, groups=[f"g{g}" for g in rng.integers(0, n // 3, n)], targets=targets, features=features.astype(np.float32))


def predict(rows: Rows, seed: int = 0, **protocol: Any) -> Predictions:
    return PROBE.fit(None, [None], classes=8, protocol=RetrievalFields(**protocol), seed=seed, device=CPU).predict(rows, 0)


def cosines(rows: Rows) -> np.ndarray:
    unit = rows.features / np.linalg.norm(rows.features, axis=1, keepdims=True)
    return unit @ unit.T


def gallery_of(rows: Rows, query: int, exclude: str) -> np.ndarray:
    if exclude == "none":
        return np.ones(len(rows), dtype=bool)
    if exclude == "query":
        return np.arange(len(rows)) != query
    return np.array(rows.groups) != rows.groups[query]


@pytest.mark.parametrize("kind", ["ties", "distinct"])
@pytest.mark.parametrize("exclude", ["none", "query", "image"])
def test_every_query_agrees_with_scikit_learn(kind: str, exclude: str) -> None:
    rows = bank(kind)
    predictions, table = predict(rows, exclude=exclude), cosines(rows)
    assert (list(predictions.keys), list(predictions.groups)) == (list(rows.keys), list(rows.groups))
    for query in range(len(rows)):
        gallery = gallery_of(rows, query, exclude)
        relevant = (rows.targets == rows.targets[query])[gallery] & (rows.targets[query] >= 0)
        if relevant.any():
            expected = average_precision_score(relevant, table[query][gallery])
            assert predictions.scores[query] == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(predictions.scores[query])
        nearest = np.flatnonzero(gallery)[table[query][gallery].argmax()]
        assert predictions.predictions[query] == rows.targets[nearest]


def test_a_query_with_one_relevant_row_scores_the_inverse_of_its_rank() -> None:
    angles = np.array([0.0, 0.1, 0.25, 0.45])
    rows = Rows(
        keys=list("abcd"), groups=list("abcd"), targets=np.array([0, 1, 2, 0]), features=np.c_[np.cos(angles), np.sin(angles)].astype(np.float32)
    )
    predictions = predict(rows)
    assert predictions.scores[0] == pytest.approx(1 / 3)
    assert predictions.scores[3] == pytest.approx(1 / 3)
    assert np.isnan(predictions.scores[1:3]).all()
    assert predictions.predictions.tolist() == [1, 0, 1, 2]


def test_a_query_alone_in_the_world_has_neither_neighbour_nor_score() -> None:
    rows = Rows(keys=["a", "b"], groups=["one", "one"], targets=np.array([0, 0]), features=np.eye(2, dtype=np.float32))
    predictions = predict(rows, exclude="image")
    assert predictions.predictions.tolist() == [-1, -1]
    assert np.isnan(predictions.scores).all()
    assert predict(rows, exclude="query").scores.tolist() == [1, 1]


def test_the_query_in_its_own_gallery_flatters() -> None:
    rows = bank("distinct")
    scores = [np.nanmean(predict(rows, exclude=exclude).scores) for exclude in ("none", "query")]
    assert scores[0] > scores[1]


@pytest.mark.parametrize("kind", ["ties", "distinct"])
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bank(kind)
    whole = predict(rows)
    monkeypatch.setattr(retrieval, "CELLS", {"cpu": 2000})
    monkeypatch.setattr(similarity, "GALLERY_ROWS", 47)
    chunked = predict(rows)
    assert chunked.predictions.tolist() == whole.predictions.tolist()
    assert chunked.scores == pytest.approx(whole.scores, abs=1e-12, nan_ok=True)


def test_at_most_max_queries_are_asked_of_the_whole_gallery() -> None:
    rows = bank("distinct")
    all_queries, limited = predict(rows), predict(rows, max_queries=30, seed=4)
    assert len(limited) == 30
    place = {key: i for i, key in enumerate(rows.keys)}
    index = [place[key] for key in limited.keys]
    assert index == sorted(index)
    assert 23 not in index
    assert limited.scores == pytest.approx(all_queries.scores[index], abs=1e-12, nan_ok=True)
    assert list(predict(rows, max_queries=30, seed=4).keys) == list(limited.keys)
    assert list(predict(rows, max_queries=30, seed=5).keys) != list(limited.keys)
    assert len(predict(rows, max_queries=1000)) == len(rows)


@pytest.mark.parametrize("kind", ["ties", "distinct"])
@pytest.mark.parametrize("exclude", ["none", "query", "image"])
def test_neighbours_are_those_of_a_stable_sort(kind: str, exclude: Any) -> None:
    rows, queries = bank(kind), [5, 0, 23, 5]
    indices, values = neighbours(rows, queries=queries, top=6, exclude=exclude)
    table = cosines(rows)
    for line, query in enumerate(queries):
        scores = np.where(gallery_of(rows, query, exclude), table[query], -np.inf)
        expected = np.argsort(-scores, kind="stable")[:6]
        assert indices[line].tolist() == expected.tolist()
        assert values[line] == pytest.approx(scores[expected], abs=1e-6)


def test_missing_neighbours_are_said_to_be_missing() -> None:
    rows = Rows(keys=list("abc"), groups=list("aab"), targets=np.zeros(3, np.int64), features=np.eye(3, dtype=np.float32))
    indices, values = neighbours(rows, queries=[0], top=5)
    assert indices.tolist() == [[2, -1, -1, -1, -1]]
    assert np.isnan(values[0, 1:]).all()


@pytest.mark.parametrize("wrong", [{"queries": [3]}, {"queries": [-1]}, {"queries": [0], "top": 0}, {"queries": [0], "exclude": "imag"}])
def test_neighbours_refuse_what_cannot_be(wrong: dict[str, Any]) -> None:
    rows = Rows(keys=list("abc"), groups=list("abc"), targets=np.zeros(3, np.int64), features=np.eye(3, dtype=np.float32))
    with pytest.raises(ProbeError, match="neighbours: expected"):
        neighbours(rows, **wrong)
