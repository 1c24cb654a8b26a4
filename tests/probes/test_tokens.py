"""The detector of misplaced tokens, k-NN on altered images, and their metrics, against scikit-learn and torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from harness.core import UNMARKED, Predictions, Rows
from harness.errors import ProbeError, RequestError
from harness.metrics import metric
from harness.metrics.bootstrap import interval, paired_interval
from harness.metrics.detection import AUROC, MOST_BINS, bins_for, score_bins
from harness.probes import knn
from harness.probes.detector import PROBE, DetectorFields
from harness.probes.heads import HeadStack
from harness.probes.perturbed import PROBE as PERTURBED
from harness.probes.perturbed import PerturbedFields, cosine_to

CPU = torch.device("cpu")
DETECTION = ("AUROC", "balanced_accuracy", "bce", "bce_chance")


def table(targets: np.ndarray, scores: np.ndarray, images: int = 10) -> Predictions:
    keys = [f"k{i}" for i in range(len(targets))]
    groups = [f"g{i % images}" for i in range(len(targets))]
    return Predictions(keys=keys, groups=groups, targets=targets, predictions=(scores >= 0).astype(np.int64), scores=scores)


def value(name: str, predictions: Predictions, classes: int = 2) -> float:
    named_metric = metric(name)
    return float(named_metric.value(named_metric.counts(predictions, classes).sum(axis=0)))


def drawn(n: int, *, levels: int | None = None, share: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Targets, and scores correlated with them; with few levels for ties."""
    rng = np.random.default_rng(seed)
    targets = (rng.random(n) < share).astype(np.int64)
    scores = rng.standard_normal(n) + targets
    return targets, scores if levels is None else np.round(scores * levels / 6)


# --- metrics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 1, 3, 20])
@pytest.mark.parametrize("n", [50, 1000, MOST_BINS])
def test_auroc_is_scikit_learns_ties_or_not(n: int, levels: int | None) -> None:
    targets, scores = drawn(n, levels=levels)
    assert value("AUROC", table(targets, scores)) == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("bins", [64, 335, MOST_BINS])
@pytest.mark.parametrize("levels", [None, 2000])
def test_binned_auroc_is_within_its_bound(share: float, bins: int, levels: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, scores = drawn(30_000, share=share, levels=levels)
    monkeypatch.setattr("harness.metrics.detection.MOST_BINS", bins)
    binned, exact = value("AUROC", table(targets, scores)), roc_auc_score(targets, scores)
    assert abs(binned - exact) <= 1 / (2 * bins * targets.mean() * (1 - targets.mean()))
    assert (binned != exact) == (levels is None or levels > bins)


def test_bins_are_few_where_images_are_many_and_depend_on_nothing_else() -> None:
    assert bins_for(100, 10) == 100
    assert bins_for(10**6, 2000) == 4096
    assert bins_for(10**6, 20_000) == 419
    assert bins_for(10**7, 10**6) == 64
    assert score_bins(np.array([3.0, 1.0, 3.0, 2.0]), 4).tolist() == [2, 0, 2, 1]
    assert score_bins(np.array([3.0, 1.0, 3.0, 2.0]), 2).tolist() == [1, 0, 1, 0]


def test_two_detectors_can_be_paired_whatever_their_ties() -> None:
    targets, scores = drawn(400)
    first, second = table(targets, scores), table(targets, np.round(scores))
    difference = paired_interval(AUROC(), first, second, 2)
    assert difference.value == pytest.approx(roc_auc_score(targets, scores) - roc_auc_score(targets, np.round(scores)))
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < difference.value < difference.high


def test_the_interval_of_auroc_is_that_of_resampled_images() -> None:
    targets, scores = drawn(600, levels=5)
    predictions = table(targets, scores, images=30)
    bounds = interval(AUROC(), predictions, 2, resamples=300, seed=3)
    rng, groups = np.random.default_rng(3), np.array(predictions.groups)
    draws = rng.integers(0, 30, size=(300, 30))
    of_group = {number: np.flatnonzero(groups == f"g{number}") for number in range(30)}
    again = []
    for draw in draws:
        rows = np.concatenate([of_group[number] for number in draw.tolist()])
        again.append(roc_auc_score(targets[rows], scores[rows]))
    assert (bounds.low, bounds.high) == pytest.approx(tuple(np.percentile(again, [2.5, 97.5])))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_balanced_accuracy_and_cross_entropy_are_scikit_learns(share: float) -> None:
    targets, scores = drawn(500, share=share)
    predictions = table(targets, scores)
    assert value("balanced_accuracy", predictions) == pytest.approx(balanced_accuracy_score(targets, scores >= 0))
    assert value("bce", predictions) == pytest.approx(log_loss(targets, 1 / (1 + np.exp(-scores))))
    assert value("bce_chance", predictions) == pytest.approx(log_loss(targets, np.full(500, targets.mean())))


def test_at_a_share_of_one_fifth_chance_is_half_a_nat() -> None:
    assert value("bce_chance", table(np.array([1, 0, 0, 0, 0]), np.zeros(5))) == pytest.approx(0.5004, abs=1e-4)


@pytest.mark.parametrize("only", [0, 1])
def test_one_class_alone_is_undefined_and_said(only: int) -> None:
    predictions = table(np.full(20, only), np.linspace(-1, 1, 20))
    for name in ("AUROC", "balanced_accuracy"):
        undefined = interval(metric(name), predictions, 2)
        assert (undefined.value, undefined.reason) == (None, "items of both classes are needed")
    assert value("bce_chance", predictions) == 0.0


def test_items_without_a_target_are_left_out() -> None:
    targets, scores = drawn(200)
    predictions = table(np.concatenate([targets, np.full(50, -1)]), np.concatenate([scores, np.linspace(-9, 9, 50)]))
    for name in DETECTION:
        assert value(name, predictions) == pytest.approx(value(name, table(targets, scores)))


def test_certain_errors_cost_what_they_cost_and_no_infinity() -> None:
    assert value("bce", table(np.array([1, 0]), np.array([-800.0, 800.0]))) == pytest.approx(800.0)
    assert value("bce", table(np.array([0, 1]), np.array([-800.0, 800.0]))) == 0.0


def test_detection_metrics_refuse_what_is_no_detection() -> None:
    with pytest.raises(ProbeError, match=r"targets from -1 \(none\) to 1, got 2"):
        value("AUROC", table(np.array([0, 2]), np.zeros(2)))
    with pytest.raises(ProbeError, match="got NaN"):
        value("AUROC", table(np.array([0, 1]), np.array([0.0, np.nan])))


# --- detector -------------------------------------------------------------------------------------------------------------


def tokens(images: int = 40, per_image: int = 12, width: int = 16, *, spread: float = 1.0, seed: int = 0) -> Rows:
    """Tokens; the wrong ones are shifted along one direction."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng(seed)
    marks = (rng.random((images, 1, per_image)) < 0.2).astype(np.uint8)
    features = rng.standard_normal((images, 1, per_image, width)) + spread * marks[..., None] * fixed.standard_normal(width)
    names = [f"image-{i}" for i in range(images)]
    return Rows(
        keys=names, groups=[f"photo-{i // 2}" for i in range(images)], targets=np.zeros(images), features=features.astype(np.float32), masks=marks
    )


def fit(rows: Rows, lrs: list[float], *, seed: int = 0, **protocol: Any) -> HeadStack[DetectorFields]:
    fitted = PROBE.fit(rows, lrs, classes=2, protocol=DetectorFields(**protocol), seed=seed, device=CPU)
    assert isinstance(fitted, HeadStack)
    return fitted


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("norm", ["none", "standardize"])
def test_a_head_of_a_stack_is_the_head_alone_to_the_bit(optimizer: str, norm: str) -> None:
    rows, rates = tokens(), np.geomspace(1e-4, 1e3, 8).tolist()
    protocol = {"optimizer": optimizer, "feature_norm": norm, "epochs": 8, "batch_size": 16}
    stack = fit(rows, rates, **protocol)
    for head, rate in enumerate(rates):
        alone = fit(rows, [rate], **protocol)
        assert torch.equal(stack.state(head)["weight"], alone.state(0)["weight"])
        assert torch.equal(stack.state(head)["bias"], alone.state(0)["bias"])


@pytest.mark.parametrize(("optimizer", "decay", "rate"), [("sgd", 0.0, 0.5), ("sgd", 0.01, 0.5), ("adamw", 0.05, 0.01)])
def test_training_is_torchs_on_the_mean_cross_entropy_of_all_tokens(optimizer: str, decay: float, rate: float) -> None:
    rows = tokens()
    stack = fit(rows, [rate], optimizer=optimizer, weight_decay=decay, feature_norm="none", epochs=5, batch_size=16, seed=3)
    generator = torch.Generator().manual_seed(3)
    layer = torch.nn.Linear(16, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.empty(16).normal_(0, 0.01, generator=generator)[None])
        layer.bias.fill_(math.log(0.2 / 0.8))
    torch_sgd = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    reference = torch_sgd if optimizer == "sgd" else torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=decay)
    assert rows.masks is not None
    features, marks, step = torch.from_numpy(rows.features), torch.from_numpy(rows.masks).float(), 0
    for _ in range(5):
        order = torch.randperm(40, generator=generator)
        for batch in (order[:16], order[16:32], order[32:]):
            reference.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 15))
            reference.zero_grad()
            odds = layer(features[batch].flatten(0, 2))[:, 0]
            torch.nn.functional.binary_cross_entropy_with_logits(odds, marks[batch].flatten()).backward()
            reference.step()
            step += 1
    torch.testing.assert_close(stack.state(0)["weight"], layer.weight[0].detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack.state(0)["bias"], layer.bias.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [16, 1])
def test_tokens_without_a_mark_are_neither_trained_on_nor_scored(batch_size: int) -> None:
    rows = tokens(6, 4)
    assert rows.masks is not None
    marks = rows.masks.copy()
    marks[0], marks[3, 0, 1] = UNMARKED, UNMARKED
    shown = Rows(**{**vars(rows), "masks": marks})
    protocol = {"feature_norm": "none", "batch_size": batch_size, "epochs": 5}
    stack = fit(shown, [0.1], **protocol)
    changed = rows.features.copy()
    changed[0], changed[3, 0, 1] = 100.0, 100.0
    again = fit(Rows(**{**vars(shown), "features": changed}), [0.1], **protocol)
    assert torch.equal(stack.state(0)["weight"], again.state(0)["weight"]), "what such tokens hold changes nothing"
    assert not torch.equal(stack.state(0)["weight"], fit(rows, [0.1], **protocol).state(0)["weight"])
    predictions = stack.predict(shown, 0)
    assert np.flatnonzero(predictions.targets == -1).tolist() == [0, 1, 2, 3, 13]
    marked = np.flatnonzero(predictions.targets >= 0)
    assert value("bce", predictions) == pytest.approx(log_loss(marks.ravel()[marked], 1 / (1 + np.exp(-predictions.scores[marked]))))


def test_at_convergence_it_is_scikit_learns_logistic_regression() -> None:
    train, test = tokens(60, spread=0.5), tokens(seed=5, spread=0.5)
    stack = fit(train, [1.0], epochs=300, batch_size=60)
    predictions = stack.predict(test, 0)
    assert train.masks is not None
    reference = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(train.features.reshape(-1, 16), train.masks.ravel())
    np.testing.assert_allclose(predictions.scores, reference.decision_function(test.features.reshape(-1, 16)), rtol=1e-3, atol=1e-3)


def test_a_row_a_token_named_by_its_place_and_told_at_the_base_rate() -> None:
    rows = tokens(6, 4)
    stack = fit(rows, [0.1], theta=0.3)
    predictions = stack.predict(rows, 0)
    assert list(predictions.keys[:5]) == ["image-0#0", "image-0#1", "image-0#2", "image-0#3", "image-1#0"]
    assert list(predictions.groups[:9]) == ["photo-0"] * 8 + ["photo-1"]
    assert rows.masks is not None
    assert predictions.targets.tolist() == rows.masks.ravel().tolist()
    probability = 1 / (1 + np.exp(-predictions.scores))
    assert predictions.predictions.tolist() == (probability >= 0.3).astype(int).tolist()
    assert 0 < predictions.predictions.sum() < 24


def test_grids_of_tokens_and_rows_of_them_are_the_same() -> None:
    flat = tokens(20, 12)
    assert flat.masks is not None
    grid = Rows(**{**vars(flat), "features": flat.features.reshape(20, 3, 4, 16)})
    np.testing.assert_array_equal(fit(flat, [0.1]).predict(flat, 0).scores, fit(grid, [0.1]).predict(grid, 0).scores)


def test_state_gives_the_same_predictions() -> None:
    rows = tokens()
    protocol = {"epochs": 3, "theta": 0.25}
    stack = fit(rows, [0.01, 0.3], **protocol)
    again = PROBE.restore(stack.state(1), None, classes=2, protocol=DetectorFields(**protocol), seed=0, device=CPU)
    first, second = stack.predict(rows, 1), again.predict(rows, 0)
    np.testing.assert_array_equal(first.scores, second.scores)
    np.testing.assert_array_equal(first.predictions, second.predictions)


def test_where_tokens_are_too_many_whole_images_are_chosen_by_the_seed() -> None:
    rows = tokens()
    every = fit(rows, [0.1]).predict(rows, 0)
    limited = fit(rows, [0.1], max_tokens=130).predict(rows, 0)
    assert len(limited) == 10 * 12
    place = {key: index for index, key in enumerate(every.keys)}
    order = [place[key] for key in limited.keys]
    assert order == sorted(order)
    np.testing.assert_allclose(limited.scores, every.scores[order], rtol=1e-5)
    other = fit(rows, [0.1], max_tokens=130, seed=1).predict(rows, 0)
    assert set(other.keys) != set(limited.keys)


def test_a_head_that_diverges_says_so() -> None:
    rows = tokens(spread=3.0)
    stack = fit(rows, [1e38], weight_decay=1.0, feature_norm="none")
    with pytest.raises(ProbeError, match="learning rate 1e\\+38; search below it"):
        stack.predict(rows, 0)


def test_what_has_no_marks_is_refused() -> None:
    rows = tokens()
    with pytest.raises(ProbeError, match="one mark for each of 12 tokens of 40 images, got none"):
        fit(Rows(**{**vars(rows), "masks": None}), [0.1])
    with pytest.raises(ProbeError, match="got shape \\(40, 1, 11\\)"):
        fit(Rows(**{**vars(rows), "masks": rows.masks[:, :, 1:] if rows.masks is not None else None}), [0.1])
    with pytest.raises(ProbeError, match="marks of 0 and 1, or 255 for none, got 7"):
        fit(Rows(**{**vars(rows), "masks": np.full((40, 1, 12), 7, np.uint8)}), [0.1])


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_where_nothing_or_everything_is_wrong_there_is_nothing_to_tell(theta: float) -> None:
    with pytest.raises(RequestError, match=r"protocol\.theta"):
        DetectorFields().replaced(theta=theta)


# --- k-NN on altered images -------------------------------------------------------------------------------------------------


def vectors(n: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    names = [f"image-{i}" for i in range(n)]
    return Rows(keys=names, groups=names, targets=rng.integers(0, 3, n), features=rng.standard_normal((n, 8)).astype(np.float32))


def test_it_tells_what_knn_tells_and_how_far_features_went() -> None:
    train, test, intact = vectors(50, 0), vectors(20, 1), vectors(20, 2)
    how: dict[str, Any] = {"classes": 3, "protocol": PerturbedFields(k=5), "seed": 0, "device": CPU}
    back = np.arange(20)[::-1]
    reference = Rows(
        keys=[intact.keys[i] for i in back], groups=[intact.groups[i] for i in back], targets=intact.targets[back], features=intact.features[back]
    )
    predictions = PERTURBED.fit(train, [None], **how).predict(Rows(**{**vars(test), "reference": reference}), 0)
    plain = knn.PROBE.fit(train, [None], **how).predict(test, 0)
    np.testing.assert_array_equal(predictions.predictions, plain.predictions)
    np.testing.assert_allclose(predictions.scores, cosine_similarity(test.features, intact.features).diagonal(), rtol=1e-5)
    assert value("cosine_to_intact", predictions, classes=3) == pytest.approx(predictions.scores.mean())


def test_without_a_reference_there_is_no_cosine() -> None:
    how: dict[str, Any] = {"classes": 3, "protocol": PerturbedFields(), "seed": 0, "device": CPU}
    predictions = PERTURBED.fit(vectors(9, 0), [None], **how).predict(vectors(5, 1), 0)
    assert np.isnan(predictions.scores).all()
    assert np.isnan(value("cosine_to_intact", predictions, classes=3))


def test_features_of_zeros_have_no_cosine_and_are_left_out() -> None:
    rows = vectors(3, 0)
    rows.features[1] = 0
    cosines = cosine_to(vectors(3, 1), rows)
    assert np.isnan(cosines).tolist() == [False, True, False]


def test_an_image_without_its_intact_self_is_named() -> None:
    with pytest.raises(ProbeError, match="intact image of every row, got none of 'image-3'"):
        cosine_to(vectors(3, 0), vectors(5, 0))
