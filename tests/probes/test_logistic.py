"""L-BFGS logistic regression against scikit-learn, and few-shot subsets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from harness.core import Rows
from harness.errors import ProbeError, RequestError
from harness.probes import grid, logistic
from harness.probes.knn import KNNFields
from harness.probes.lib.softmax import SoftmaxStack
from harness.probes.logistic import PROBE, LogisticFields
from harness.probes.lowshot import low_shot

CPU = torch.device("cpu")


def blobs(n: int = 300, classes: int = 4, width: int = 20, seed: int = 0) -> Rows:
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    features = fixed.standard_normal((classes, width))[targets] + 1.5 * rng.standard_normal((n, width)) + 2
    keys = [f"k{i}" for i in range(n)]
    return Rows(keys=keys, groups=keys, targets=targets, features=features.astype(np.float32))


def fit(rows: Rows, values: list[float], **protocol: Any) -> SoftmaxStack:
    fitted = PROBE.fit(rows, values, classes=4, protocol=LogisticFields(**protocol), seed=0, device=CPU)
    assert isinstance(fitted, SoftmaxStack)
    return fitted


@pytest.mark.parametrize("norm", ["none", "standardize"])
def test_every_value_of_c_agrees_with_scikit_learn(norm: str) -> None:
    train, test, values = blobs(), blobs(100, seed=7), [1e-3, 1.0, 100.0]
    stack = fit(train, values, feature_norm=norm, tolerance=1e-8)
    scaler = StandardScaler(with_mean=norm == "standardize", with_std=norm == "standardize").fit(train.features.astype(np.float64))
    inputs, outputs = (scaler.transform(rows.features.astype(np.float64)) for rows in (train, test))
    for head, value in enumerate(values):
        reference = LogisticRegression(C=value, tol=1e-10, max_iter=10_000).fit(inputs, train.targets)
        assert stack.weights[head].numpy() == pytest.approx(reference.coef_, abs=1e-3 * abs(reference.coef_).max())
        assert stack.probabilities(test, head).numpy() == pytest.approx(reference.predict_proba(outputs), abs=1e-3)
        assert stack.predict(test, head).predictions.tolist() == reference.predict(outputs).tolist()


def test_a_head_is_what_it_is_alone_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs()
    stack = fit(rows, [0.01, 1.0])
    assert torch.equal(stack.weights[1], fit(rows, [1.0]).weights[0])
    monkeypatch.setattr(logistic, "CHUNK", 37)
    assert torch.allclose(fit(rows, [1.0]).weights[0], stack.weights[1], atol=1e-4)


def test_the_grid_is_a_field_and_gives_the_heads() -> None:
    fields = LogisticFields()
    assert grid("logistic", fields) == fields.c_grid
    assert grid("logistic", fields.replaced(c_grid=[0.5, 2.0])) == (0.5, 2.0)
    assert grid("logistic", fields.replaced(c_grid=3.0)) == (3.0,)
    assert grid("knn", KNNFields()) == (None,)
    for wrong in ((), (0.0,), ("1",), "1"):
        with pytest.raises(RequestError, match=r"protocol\.c_grid"):
            fields.replaced(c_grid=wrong)


@pytest.mark.parametrize("values", [[None], [], [0.0], [-1.0], [float("nan")], [1.0, None]])
def test_values_of_c_that_cannot_be_are_refused(values: list[float | None]) -> None:
    with pytest.raises(ProbeError, match="expected positive values of C"):
        PROBE.fit(blobs(), values, classes=4, protocol=LogisticFields(), seed=0, device=CPU)


def test_a_restored_head_predicts_the_same() -> None:
    train, test = blobs(), blobs(50, seed=3)
    stack = fit(train, [0.01, 1.0])
    back = PROBE.restore(stack.state(1), None, classes=4, protocol=LogisticFields(), seed=0, device=CPU)
    assert back.predict(test, 0).scores.tolist() == stack.predict(test, 1).scores.tolist()


def images(n: int = 200, seed: int = 0) -> Rows:
    """Two rows per image, with a class per row; class 3 is rare."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(4, n, p=[0.4, 0.3, 0.28, 0.02])
    return Rows(
        keys=[f"k{i}" for i in range(n)], groups=[f"g{i // 2}" for i in range(n)], targets=targets, features=rng.random((n, 3), dtype=np.float32)
    )


def test_shots_are_images_of_each_class() -> None:
    rows = images()
    few = low_shot(rows, shots=5, seed=1)
    for target in range(4):
        drawn = {group for group, row_target in zip(few.groups, few.targets, strict=True) if row_target == target}
        whole = {group for group, row_target in zip(rows.groups, rows.targets, strict=True) if row_target == target}
        assert len(drawn) == min(5, len(whole))
        # all rows of a drawn image that have the class
        expected = [
            key for key, group, row_target in zip(rows.keys, rows.groups, rows.targets, strict=True) if row_target == target and group in drawn
        ]
        assert [key for key, row_target in zip(few.keys, few.targets, strict=True) if row_target == target] == expected
    place = {key: i for i, key in enumerate(rows.keys)}
    assert np.array_equal(few.features, rows.features[[place[key] for key in few.keys]])


def test_a_share_is_stratified_and_keeps_every_class() -> None:
    rows = blobs(1000)
    for share in (0.01, 0.1):
        few = low_shot(rows, share=share, seed=2)
        for target in range(4):
            assert (few.targets == target).sum() == max(1, round(share * (rows.targets == target).sum()))
    assert list(low_shot(rows, share=1.0).keys) == list(rows.keys)


def test_subsets_are_nested_seeded_and_blind_to_order() -> None:
    rows = blobs(1000)
    one_percent, ten_percent = low_shot(rows, share=0.01, seed=3), low_shot(rows, share=0.1, seed=3)
    assert set(one_percent.keys) < set(ten_percent.keys)
    assert set(low_shot(rows, share=0.1, seed=4).keys) != set(ten_percent.keys)
    back = Rows(keys=rows.keys[::-1], groups=rows.groups[::-1], targets=rows.targets[::-1], features=rows.features[::-1])
    assert set(low_shot(back, share=0.1, seed=3).keys) == set(ten_percent.keys)


def test_masks_come_along() -> None:
    rows = blobs(10)
    masks = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    dense = Rows(keys=rows.keys, groups=rows.groups, targets=np.full(10, -1), features=rows.features, masks=masks)
    few = low_shot(dense, shots=3)
    assert few.masks is not None
    assert [f"k{value}" for value in few.masks[:, 0, 0]] == list(few.keys)


@pytest.mark.parametrize("wrong", [{}, {"share": 0.1, "shots": 1}, {"share": 0.0}, {"share": 1.5}, {"shots": 0}])
def test_subsets_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProbeError, match="low shot: expected either"):
        low_shot(blobs(10), **wrong)
