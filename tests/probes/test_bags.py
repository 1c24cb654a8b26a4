"""Means of patches, the probes on them, their convergence to the whole image, and patches' nearest neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from harness.core import Predictions, Rows
from harness.errors import ProbeError, RequestError
from harness.metrics.bootstrap import interval
from harness.probes import is_decided, linear, metric, probe
from harness.probes.convergence import NAMES as CONVERGENCE
from harness.probes.convergence import others
from harness.probes.lib.bags import bags
from harness.probes.locality import NAMES as LOCALITY
from harness.probes.locality import LocalityFields

CLASSES, WIDTH = 3, 8
HOW: dict[str, Any] = {"classes": CLASSES, "seed": 0, "device": torch.device("cpu")}


def patches(images: int = 30, draws: int = 2, count: int = 4, seed: int = 0, prefix: str = "i") -> Rows:
    """Patch rows of images whose class is the direction of their features; the classes alternate."""
    rng = np.random.default_rng(seed)
    targets = np.arange(images) % CLASSES
    centres = 1.5 * np.eye(CLASSES, WIDTH)[targets]
    features = (centres[:, None] + rng.standard_normal((images, draws * count, WIDTH))).astype(np.float32)
    names = [f"{prefix}{image}" for image in range(images)]
    return Rows(
        keys=[f"{name}#{draw}.{index}" for name in names for draw in range(draws) for index in range(count)],
        groups=[name for name in names for _ in range(draws * count)],
        targets=np.repeat(targets, draws * count).astype(np.int64),
        features=features.reshape(-1, WIDTH),
    )


def images_of(count: int = 30, seed: int = 5, prefix: str = "i") -> Rows:
    """Rows of whole images."""
    rows = patches(count, draws=1, count=1, seed=seed, prefix=prefix)
    return replace(rows, keys=rows.groups)


def shuffled(rows: Rows, seed: int = 0) -> Rows:
    order = np.random.default_rng(seed).permutation(len(rows))
    return Rows(
        keys=[rows.keys[i] for i in order], groups=[rows.groups[i] for i in order], targets=rows.targets[order], features=rows.features[order]
    )


# --- means ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("normalize", ["none", "each", "after"])
def test_means_of_the_first_patches_equal_those_computed_apart(size: int, normalize: Any) -> None:
    rows = patches()
    for draw, means in bags("any", rows, size, normalize).items():
        for image, key in enumerate(means.keys):
            members = [rows.features[rows.keys.index(f"i{image}#{draw}.{index}")].astype(np.float64) for index in range(size)]
            if normalize == "each":
                members = [member / np.linalg.norm(member) for member in members]
            mean = sum(members) / size
            mean = mean / np.linalg.norm(mean) if normalize == "after" else mean
            assert key == f"i{image}#{draw}"
            np.testing.assert_allclose(means.features[image], mean, rtol=0, atol=1e-6)
        assert means.groups == [f"i{image}" for image in range(30)]
        np.testing.assert_array_equal(means.targets, np.arange(30) % CLASSES)


def test_means_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = patches()
    for draw, means in bags("any", shuffled(rows), 3, "none").items():
        expected = bags("any", rows, 3, "none")[draw]
        places = [means.keys.index(key) for key in expected.keys]
        np.testing.assert_array_equal(means.features[places], expected.features)


def test_rows_of_whole_images_stay_as_they_are() -> None:
    rows = images_of()
    ((draw, means),) = bags("any", rows, 7, "none").items()
    assert draw is None
    assert list(means.keys) == list(rows.keys)
    np.testing.assert_array_equal(means.features, rows.features)


def test_zero_features_stay_zero_at_unit_length() -> None:
    rows = replace(patches(3, 1, 2), features=np.zeros((6, WIDTH), np.float32))
    for normalize in ("each", "after"):
        assert not bags("any", rows, 2, normalize)[0].features.any()


def test_rows_that_are_no_bags_are_refused() -> None:
    rows = patches()
    with pytest.raises(ProbeError, match="expected 5 patches of every image, got fewer in draw 0"):
        bags("any", rows, 5, "none")
    with pytest.raises(ProbeError, match="other rows"):
        bags("any", replace(rows, keys=["i", *rows.keys[1:]]), 2, "none")
    with pytest.raises(ProbeError, match="bag size 0"):
        bags("any", rows, 0, "none")
    lost = [index for index, key in enumerate(rows.keys) if key != "i3#1.1"]
    incomplete = Rows(
        keys=[rows.keys[i] for i in lost], groups=[rows.groups[i] for i in lost], targets=rows.targets[lost], features=rows.features[lost]
    )
    with pytest.raises(ProbeError, match="got fewer in draw 1"):
        bags("any", incomplete, 2, "none")


# --- probes on means --------------------------------------------------------------------------------------------------


QUICK = {"bag_knn": {"k": 5}, "bag_linear": {"epochs": 3}}


def fields(name: str, **overrides: Any) -> Any:
    return probe(name).fields(**{"patches": 4, "draws": 2, "bag_size": 3, **overrides})


@pytest.mark.parametrize(("name", "inner", "lrs"), [("bag_knn", "knn", [None]), ("bag_linear", "linear", [0.1, 1.0])])
def test_each_draw_is_learnt_and_predicted_as_by_the_probe_alone(name: str, inner: str, lrs: list[float | None]) -> None:
    train, test, protocol = patches(), patches(24, seed=1, prefix="t"), fields(name, **QUICK[name])
    stack = probe(name).fit(train, lrs, protocol=protocol, **HOW)
    for head in range(len(lrs)):
        predictions = stack.predict(test, head)
        assert list(predictions.keys) == [f"t{image}#{draw}" for draw in range(2) for image in range(24)]
        for draw in range(2):
            alone = probe(inner).fit(bags("any", train, 3, "none")[draw], lrs, protocol=protocol, **HOW)
            expected = alone.predict(bags("any", test, 3, "none")[draw], head)
            np.testing.assert_array_equal(predictions.predictions[24 * draw : 24 * (draw + 1)], expected.predictions)
            np.testing.assert_array_equal(predictions.scores[24 * draw : 24 * (draw + 1)], expected.scores)
        again = probe(name).restore(stack.state(head), train, protocol=protocol, **HOW)
        np.testing.assert_array_equal(again.predict(test, 0).scores, predictions.scores)


@pytest.mark.parametrize(("name", "inner", "lrs"), [("bag_knn", "knn", [None]), ("bag_linear", "linear", [0.1, 1.0])])
def test_what_whole_images_taught_predicts_bags_and_whole_images(name: str, inner: str, lrs: list[float | None]) -> None:
    train, test, protocol = images_of(), patches(24, seed=1, prefix="t"), fields(name, **QUICK[name], gallery="whole")
    stack = probe(name).fit(train, lrs, protocol=protocol, **HOW)
    alone = probe(inner).fit(train, lrs, protocol=protocol, **HOW)
    whole = images_of(24, seed=2, prefix="t")
    head = len(lrs) - 1
    for rows, expected in ((test, list(bags("any", test, 3, "none").values())), (whole, [whole])):
        predictions = stack.predict(rows, head)
        np.testing.assert_array_equal(predictions.scores, np.concatenate([alone.predict(table, head).scores for table in expected]))
        again = probe(name).restore(stack.state(head), train, protocol=protocol, **HOW)
        np.testing.assert_array_equal(again.predict(rows, 0).predictions, predictions.predictions)


def test_the_linear_probe_trains_by_its_own_numbers_where_a_protocol_is_silent() -> None:
    train, test = patches(), patches(24, seed=1, prefix="t")
    predictions = probe("bag_linear").fit(train, [0.03], protocol=probe("bag_linear").fields(patches=4, bag_size=4), **HOW).predict(test, 0)
    published = linear.LinearFields(epochs=100, batch_size=100, momentum=0.9, weight_decay=5e-5)
    alone = linear.PROBE.fit(bags("any", train, 4, "none")[0], [0.03], protocol=published, **HOW)
    np.testing.assert_array_equal(predictions.scores[:24], alone.predict(bags("any", test, 4, "none")[0], 0).scores)
    assert (fields("bag_knn").k, fields("bag_knn").temperature) == (20, 0.07)


def test_draws_that_were_not_learnt_are_not_predicted() -> None:
    stack = probe("bag_knn").fit(patches(draws=1), [None], protocol=fields("bag_knn"), **HOW)
    with pytest.raises(ProbeError, match="expected draws 0, got 1"):
        stack.predict(patches(draws=2), 0)


@pytest.mark.parametrize("name", ["bag_knn", "bag_linear", "convergence"])
@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"bag_size": 5}, "bag_size: .*at most the 4 patches.* got 5"),
        ({"bag_size": -1}, "bag_size: .*got -1"),
        ({"patches": 5, "placement": "grid", "draws": 1}, "placement: .*square number.*patches 5"),
        ({"placement": "grid"}, "placement: .*one draw.*draws 2"),
        ({"patch_area": 1.5}, "patch_area: .*got 1.5"),
        ({"patch_side": 300.0}, "patch_side.*got 300"),
        ({"frame": 0.0}, "frame: .*got 0.0"),
        ({"normalize": "before"}, "normalize: .*got 'before'"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(name: str, wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError, match=rf"protocol\.{expected}"):
        fields(name).replaced(**wrong)


# --- the spread over draws --------------------------------------------------------------------------------------------


def drawn(right: np.ndarray, suffix: bool = True) -> Predictions:
    """`right` bool [draws, images]."""
    draws, images = right.shape
    return Predictions(
        keys=[f"i{image}#{draw}" if suffix else f"i{image}" for draw in range(draws) for image in range(images)],
        groups=[f"i{image}" for _ in range(draws) for image in range(images)],
        targets=np.ones(draws * images, np.int64),
        predictions=right.reshape(-1).astype(np.int64),
        scores=np.ones(draws * images),
    )


def test_the_spread_is_the_standard_deviation_of_the_draws_accuracies() -> None:
    right = np.random.default_rng(0).random((5, 40)) < 0.6
    estimate = interval(metric("accuracy_sd"), drawn(right), 2)
    assert estimate.value == pytest.approx(np.std(right.mean(axis=1), ddof=1), abs=1e-12)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.high
    assert interval(metric("accuracy"), drawn(right), 2).value == pytest.approx(right.mean())
    rng = np.random.default_rng(0)
    resampled = [np.std(right[:, rng.integers(0, 40, 40)].mean(axis=1), ddof=1) for _ in range(2000)]
    np.testing.assert_allclose([estimate.low, estimate.high], np.percentile(resampled, [2.5, 97.5]), atol=0.02)


@pytest.mark.parametrize("suffix", [True, False])
def test_one_draw_has_no_spread(suffix: bool) -> None:
    estimate = interval(metric("accuracy_sd"), drawn(np.ones((1, 10), bool), suffix), 2)
    assert (estimate.value, estimate.reason) == (None, "the spread over draws needs at least two of them")


# --- convergence ------------------------------------------------------------------------------------------------------


def convergence(rows: Rows, whole: Rows, **overrides: Any) -> Predictions:
    protocol = fields("convergence", **overrides)
    return probe("convergence").fit(None, [None], protocol=protocol, **HOW).predict(replace(rows, reference=whole), 0)


def quantity(predictions: Predictions, name: str) -> np.ndarray:
    names = CONVERGENCE if name in CONVERGENCE else LOCALITY
    return predictions.scores[predictions.targets == names.index(name)]


@pytest.mark.parametrize("size", [1, 4])
def test_convergence_by_hand(size: int) -> None:
    rows, whole = patches(), images_of()
    predictions = convergence(rows, shuffled(whole), bag_size=size)
    assert len(predictions) == 4 * 2 * 30
    partners = others(whole.targets, HOW["seed"])
    for draw in range(2):
        means = [np.mean([rows.features[rows.keys.index(f"i{image}#{draw}.{index}")] for index in range(size)], axis=0) for image in range(30)]
        for image in range(30):
            mean_of_own, foreign, target = means[image], means[partners[image]], whole.features[image]
            row = 30 * draw + image
            for suffix, mean in (("", mean_of_own), ("_floor", foreign)):
                cosine = mean @ target / np.linalg.norm(mean) / np.linalg.norm(target)
                assert quantity(predictions, f"cosine{suffix}")[row] == pytest.approx(cosine, abs=1e-6)
                distance = np.linalg.norm(mean - target) / np.linalg.norm(target)
                assert quantity(predictions, f"relative_distance{suffix}")[row] == pytest.approx(distance, abs=1e-6)
            assert predictions.keys[row] == f"i{image}#{draw}"
            assert predictions.groups[row] == f"i{image}"


def test_the_value_is_the_mean_over_images_and_draws() -> None:
    predictions = convergence(patches(), images_of())
    for name in CONVERGENCE:
        estimate = interval(metric(name), predictions, CLASSES)
        assert estimate.value == pytest.approx(quantity(predictions, name).mean())
        assert estimate.n_groups == 30
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high  # type: ignore[operator]


def test_patches_of_the_image_are_nearer_than_those_of_another() -> None:
    predictions = convergence(patches(), images_of(), bag_size=4)
    assert quantity(predictions, "cosine").mean() > quantity(predictions, "cosine_floor").mean() + 0.2
    assert quantity(predictions, "relative_distance").mean() < quantity(predictions, "relative_distance_floor").mean() - 0.1


def test_bags_of_the_whole_image_have_converged_and_zeros_are_undefined() -> None:
    whole = images_of()
    predictions = convergence(whole, whole, bag_size=0)
    np.testing.assert_allclose(quantity(predictions, "cosine"), 1, atol=1e-12)
    np.testing.assert_array_equal(quantity(predictions, "relative_distance"), 0)
    nothing = convergence(whole, replace(whole, features=np.zeros_like(whole.features)))
    for name in CONVERGENCE:
        estimate = interval(metric(name), nothing, CLASSES)
        assert estimate.value is None
        assert estimate.reason
        assert "zero" in estimate.reason


def test_a_single_image_has_no_floor() -> None:
    predictions = convergence(patches(1), images_of(1))
    assert np.isfinite(quantity(predictions, "cosine")).all()
    assert np.isnan(quantity(predictions, "cosine_floor")).all()
    assert interval(metric("cosine_floor"), predictions, CLASSES).value is None


def test_convergence_needs_the_whole_images() -> None:
    with pytest.raises(ProbeError, match="got none; give the bank of the whole images"):
        probe("convergence").fit(None, [None], protocol=fields("convergence"), **HOW).predict(patches(), 0)
    with pytest.raises(ProbeError, match="got none of 'i29#0'"):
        convergence(patches(30), images_of(29))


@pytest.mark.parametrize("targets", [[0, 0, 1], [0, 1, 0], [0, 1, 1, 0, 0, 2, 2, 0], [-1, 3, 3]])
def test_another_image_is_of_another_class_and_any_of_these_as_often(targets: list[int]) -> None:
    drawn = np.stack([others(np.array(targets), seed) for seed in range(3000)])
    for image, target in enumerate(targets):
        candidates = [other for other, label in enumerate(targets) if label != target]
        assert set(drawn[:, image]) == set(candidates)
        counts, share = np.bincount(drawn[:, image])[candidates], 1 / len(candidates)
        assert np.abs(counts - 3000 * share).max() <= 5 * (3000 * share * (1 - share)) ** 0.5


def test_images_sorted_by_class_are_not_all_compared_with_one_image() -> None:
    partners = others(np.repeat(np.arange(4), 50), 0)
    assert (partners // 50 != np.repeat(np.arange(4), 50)).all()
    assert all(len(set(partners[start : start + 50].tolist())) > 30 for start in range(0, 200, 50))
    assert partners.tolist() == others(np.repeat(np.arange(4), 50), 0).tolist()


@pytest.mark.parametrize("targets", [[0, 0, 0], [-1, -1]])
def test_of_one_class_another_image_is_any_other(targets: list[int]) -> None:
    drawn = np.stack([others(np.array(targets), seed) for seed in range(50)])
    for image in range(len(targets)):
        assert set(drawn[:, image]) == set(range(len(targets))) - {image}


# --- locality ---------------------------------------------------------------------------------------------------------


def parts(seed: int = 0, images: int = 12, count: int = 3) -> tuple[Rows, Rows]:
    """Patches whose target is their part, and their whole images, whose target is the class."""
    rng = np.random.default_rng(seed)
    names = [f"i{image}" for image in range(images)]
    rows = Rows(
        keys=[f"{name}#{part}:p{part}" for name in names for part in range(count)],
        groups=[name for name in names for _ in range(count)],
        targets=np.tile(np.arange(count), images),
        features=rng.standard_normal((images * count, WIDTH)).astype(np.float32),
    )
    whole = Rows(keys=names, groups=names, targets=np.arange(images) // 4, features=np.zeros((images, 1), np.float32))
    return rows, whole


@pytest.mark.parametrize("exclude", ["query", "image"])
def test_neighbours_and_chance_by_brute_force(exclude: str) -> None:
    rows, whole = parts()
    compared = replace(rows, reference=shuffled(whole))
    predictions = probe("locality").fit(None, [None], protocol=LocalityFields(exclude=exclude), **HOW).predict(compared, 0)
    unit = rows.features / np.linalg.norm(rows.features, axis=1, keepdims=True)
    image = np.repeat(np.arange(12), 3)
    kinds = {"part": np.asarray(rows.targets), "image": image, "class": image // 4}
    for query in range(36):
        gallery = [other for other in range(36) if other != query and (exclude == "query" or image[other] != image[query])]
        nearest = gallery[int(np.argmax(unit[gallery] @ unit[query]))]
        for name, kind in kinds.items():
            same, chance = quantity(predictions, f"same_{name}")[query], quantity(predictions, f"same_{name}_chance")[query]
            if (name, exclude) == ("image", "image"):
                assert np.isnan([same, chance]).all()
                continue
            assert same == (kind[nearest] == kind[query])
            assert chance == pytest.approx(np.mean(kind[gallery] == kind[query]))
    assert list(predictions.keys[:36]) == list(rows.keys)
    for name in LOCALITY:
        values = quantity(predictions, name)
        value = interval(metric(name), predictions, 3).value
        assert value is None if np.isnan(values).all() else value == pytest.approx(np.nanmean(values))


def test_patches_without_parts_have_classes_alone() -> None:
    predictions = probe("locality").fit(None, [None], protocol=LocalityFields(), **HOW).predict(patches(draws=1), 0)
    assert interval(metric("same_part"), predictions, CLASSES).value is None
    assert interval(metric("same_part"), predictions, CLASSES).reason == "these patches have no parts, or there is no other patch"
    share, chance = (interval(metric(name), predictions, CLASSES).value for name in ("same_class", "same_class_chance"))
    assert share is not None
    assert chance == pytest.approx(39 / 119)
    assert share > chance + 0.1
    assert interval(metric("same_image_chance"), predictions, CLASSES).value == pytest.approx(3 / 119)


def test_unlabelled_images_and_lone_patches_are_undefined() -> None:
    rows, whole = parts()
    unlabelled = replace(whole, targets=np.full(12, -1))
    predictions = probe("locality").fit(None, [None], protocol=LocalityFields(), **HOW).predict(replace(rows, reference=unlabelled), 0)
    assert np.isnan(quantity(predictions, "same_class")).all()
    assert np.isfinite(quantity(predictions, "same_part")).all()
    lone = patches(1, 1, 1)
    assert np.isnan(probe("locality").fit(None, [None], protocol=LocalityFields(), **HOW).predict(lone, 0).scores).all()


def test_fewer_queries_are_some_of_them_and_the_gallery_stays() -> None:
    rows, whole = parts()
    rows = replace(rows, reference=whole)
    every = probe("locality").fit(None, [None], protocol=LocalityFields(), **HOW).predict(rows, 0)
    fewer = probe("locality").fit(None, [None], protocol=LocalityFields(max_queries=10), **HOW).predict(rows, 0)
    scores = {(key, target): score for key, target, score in zip(every.keys, every.targets, every.scores, strict=True)}
    assert len(set(fewer.keys)) == 10
    assert [scores[key, target] for key, target in zip(fewer.keys, fewer.targets, strict=True)] == fewer.scores.tolist()


def test_nothing_is_left_to_choose() -> None:
    for name in ("convergence", "locality"):
        assert is_decided(probe(name), ("cls",), probe(name).fields())
