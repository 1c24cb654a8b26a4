"""The linear probe against torch's SGD, against scikit-learn at convergence, and a stack against its heads alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from harness.core import Rows
from harness.errors import ProbeError
from harness.probes import linear
from harness.probes.heads import HeadStack
from harness.probes.linear import PROBE, LinearFields, LinearHead

CPU = torch.device("cpu")


def blobs(n: int = 150, classes: int = 5, width: int = 24, spread: float = 0.6, seed: int = 0) -> Rows:
    fixed, rng = np.random.default_rng(1), np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    features = fixed.standard_normal((classes, width))[targets] * spread + rng.standard_normal((n, width))
    return Rows(keys=[f"k{i}" for i in range(n)], groups=[f"k{i}" for i in range(n)], targets=targets, features=features.astype(np.float32))


def fit(rows: Rows, lrs: list[float], *, classes: int = 5, seed: int = 0, **protocol: Any) -> HeadStack[LinearFields]:
    fitted = PROBE.fit(rows, lrs, classes=classes, protocol=LinearFields(**protocol), seed=seed, device=CPU)
    assert isinstance(fitted, HeadStack)
    return fitted


LADDER = np.geomspace(1e-4, 1e4, 16).tolist()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "classes", "width", "norm"), [(150, 5, 24, "none"), (333, 11, 100, "l2"), (97, 2, 7, "standardize")])
def test_a_head_of_a_stack_of_16_equals_the_same_head_alone(threads: int, n: int, classes: int, width: int, norm: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = blobs(n, classes, width)
        protocol: dict[str, Any] = {"epochs": 30, "batch_size": 64, "weight_decay": 1e-4, "feature_norm": norm}
        stack = fit(rows, LADDER, classes=classes, **protocol)
        for head, lr in enumerate(LADDER):
            alone = fit(rows, [lr], classes=classes, **protocol)
            difference = (stack.state(head)["weight"] - alone.state(0)["weight"]).norm() / alone.state(0)["weight"].norm()
            assert difference <= 1e-5, f"learning rate {lr:g}"
            assert stack.state(head)["bias"].tolist() == pytest.approx(alone.state(0)["bias"].tolist(), rel=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("weight_decay", "anneal"), [(0.0, "step"), (0.01, "step"), (0.0, "epoch")])
def test_training_is_that_of_torch_sgd_with_a_cosine_per_iteration_or_epoch(weight_decay: float, anneal: str) -> None:
    rows = blobs()
    stack = fit(rows, [0.3, 3.0], epochs=7, batch_size=64, weight_decay=weight_decay, anneal=anneal, seed=5)
    for head, lr in enumerate([0.3, 3.0]):
        generator = torch.Generator().manual_seed(5)
        layer = torch.nn.Linear(24, 5)
        with torch.no_grad():
            layer.weight.copy_(torch.empty(5, 24).normal_(0, 0.01, generator=generator))
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
        steps, step = 7 * 3, 0
        for epoch in range(7):
            order = torch.randperm(150, generator=generator)
            for batch in (order[:64], order[64:128], order[128:]):
                done = step / steps if anneal == "step" else epoch / 7
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(torch.from_numpy(rows.features[batch])), torch.from_numpy(rows.targets[batch])).backward()
                optimizer.step()
                step += 1
        assert torch.allclose(stack.state(head)["weight"], layer.weight, rtol=1e-4, atol=1e-5)
        assert torch.allclose(stack.state(head)["bias"], layer.bias, rtol=1e-4, atol=1e-5)


def test_at_convergence_it_is_scikit_learns_logistic_regression() -> None:
    train, test = blobs(300), blobs(200, seed=9)
    # scikit-learn minimises C times the summed loss plus half the squared weights: a weight decay of 1 / (C n) on the mean loss. A column of ones
    # stands for the bias, which decays here.
    decay = 0.02
    reference = LogisticRegression(C=1 / (decay * 300), fit_intercept=False, tol=1e-10, max_iter=10_000)
    reference.fit(np.c_[train.features, np.ones(300)].astype(np.float64), train.targets)
    stack = fit(train, [0.3], epochs=3000, batch_size=300, weight_decay=decay)
    assert stack.state(0)["weight"].numpy() == pytest.approx(reference.coef_[:, :-1], abs=1e-4)
    assert stack.state(0)["bias"].numpy() == pytest.approx(reference.coef_[:, -1], abs=1e-4)
    inputs = np.c_[test.features, np.ones(200)]
    assert PROBE.probabilities(stack, torch.from_numpy(test.features), 0).numpy() == pytest.approx(reference.predict_proba(inputs), abs=1e-4)
    predictions = stack.predict(test, 0)
    assert (predictions.predictions == test.targets).mean() == pytest.approx(reference.score(inputs, test.targets), abs=1e-12)
    assert predictions.scores == pytest.approx(reference.predict_proba(inputs).max(axis=1), abs=1e-4)
    assert (list(predictions.keys), predictions.targets.tolist()) == (list(test.keys), test.targets.tolist())


def test_a_head_that_diverges_is_undefined_and_leaves_the_others_as_they_were() -> None:
    rows = blobs(spread=50.0)
    protocol: dict[str, Any] = {"epochs": 20, "batch_size": 64, "momentum": 0.99, "weight_decay": 1.0}
    stack = fit(rows, [1e-3, 1e9, 1e-2], **protocol)
    with pytest.raises(ProbeError, match=r"learning rate 1e\+09"):
        stack.predict(rows, 1)
    for head, lr in ((0, 1e-3), (2, 1e-2)):
        assert torch.equal(stack.state(head)["weight"], fit(rows, [lr], **protocol).state(0)["weight"])
        assert stack.predict(rows, head).scores.min() > 0


def test_the_seed_and_nothing_else_decides() -> None:
    rows = blobs()
    first = fit(rows, [0.1], epochs=3)
    torch.manual_seed(123)
    assert torch.equal(first.state(0)["weight"], fit(rows, [0.1], epochs=3).state(0)["weight"])
    assert not torch.equal(first.state(0)["weight"], fit(rows, [0.1], epochs=3, seed=1).state(0)["weight"])


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("classes", "width", "batch", "decay"), [(10, 384, 1024, 0), (3, 65, 100, 1e-3), (100, 192, 333, 0), (257, 384, 160, 1e-3)])
def test_a_step_of_many_heads_gives_each_the_bits_of_its_own_step(
    monkeypatch: pytest.MonkeyPatch, classes: int, width: int, batch: int, decay: float
) -> None:
    """Groups of several sizes, and the whole softmax beside the one by columns."""
    generator, fields = torch.Generator().manual_seed(0), LinearFields(weight_decay=decay)
    drawn = LinearHead.drawn(width, classes, fields, generator)
    alone, together = ([LinearHead({name: tensor.clone() for name, tensor in drawn.items()}, fields) for _ in range(7)] for _ in range(2))
    heads, lrs = LinearHead.together(together), np.geomspace(1e-3, 1e3, 7).tolist()
    for step, grouped in enumerate((7, 3, 2)):
        inputs, target = torch.randn(batch, width, generator=generator), torch.randint(0, classes, (batch,), generator=generator)
        monkeypatch.setattr(linear, "GROUPED_LOGITS", grouped * classes * batch)
        monkeypatch.setattr(linear, "SOFTMAX_CLASSES", 64)
        heads.step(inputs, target, lrs, (0, step))
        monkeypatch.setattr(linear, "SOFTMAX_CLASSES", classes)
        for head, lr in zip(alone, lrs, strict=True):
            head.step(inputs, target, lr, (0, step))
    assert linear.rounds_alike(7, classes, width, batch, CPU)
    for first, second in zip(alone, heads.heads, strict=True):
        assert all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())


@pytest.mark.usefixtures("_one_thread")
def test_heads_whose_products_round_otherwise_together_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sizes = blobs(), list[int]()
    monkeypatch.setattr(linear, "rounds_alike", lambda heads, *_: bool(sizes.append(heads)))
    monkeypatch.setattr(linear.LinearHeads, "step_in_one", None)
    stack, alone = fit(rows, LADDER, epochs=2), fit(rows, LADDER[8:9], epochs=2)
    assert set(sizes) == {len(LADDER)}
    assert torch.equal(stack.state(8)["weight"], alone.state(0)["weight"])


@pytest.mark.parametrize("norm", ["none", "l2", "standardize"])
def test_a_restored_head_predicts_the_same(norm: str) -> None:
    train, test = blobs(), blobs(seed=3)
    stack = fit(train, [0.01, 0.1], epochs=5, feature_norm=norm)
    back = PROBE.restore(stack.state(1), None, classes=5, protocol=LinearFields(feature_norm=norm), seed=0, device=CPU)
    before, after = stack.predict(test, 1), back.predict(test, 0)
    assert before.predictions.tolist() == after.predictions.tolist()
    assert before.scores.tolist() == after.scores.tolist()
    with pytest.raises(ProbeError, match="expected weights of 4 classes, got 5"):
        PROBE.restore(stack.state(1), None, classes=4, protocol=LinearFields(), seed=0, device=CPU)


def test_normalised_features_do_not_feel_what_normalisation_removes() -> None:
    rows = blobs()
    scaled = Rows(keys=rows.keys, groups=rows.groups, targets=rows.targets, features=rows.features * np.float32(4))
    shifted = Rows(keys=rows.keys, groups=rows.groups, targets=rows.targets, features=rows.features * np.float32(4) + np.float32(3))
    for other, norm in ((scaled, "l2"), (shifted, "standardize")):
        expected = fit(rows, [0.1], epochs=5, feature_norm=norm).predict(rows, 0).scores
        assert fit(other, [0.1], epochs=5, feature_norm=norm).predict(other, 0).scores == pytest.approx(expected, abs=1e-4)


def test_features_may_be_a_read_only_map_and_half_precision() -> None:
    rows = blobs()
    half = rows.features.astype(np.float16)
    half.flags.writeable = False
    frozen = Rows(keys=rows.keys, groups=rows.groups, targets=rows.targets, features=half)
    single = Rows(keys=rows.keys, groups=rows.groups, targets=rows.targets, features=half.astype(np.float32))
    assert torch.equal(fit(frozen, [0.1], epochs=3).state(0)["weight"], fit(single, [0.1], epochs=3).state(0)["weight"])


def test_a_class_without_training_rows_is_possible_and_unlikely() -> None:
    rows = blobs()
    predictions = fit(rows, [1.0], classes=7).predict(rows, 0)
    assert set(predictions.predictions.tolist()) <= set(range(5))
