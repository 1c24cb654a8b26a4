"""The clustered bootstrap against a direct resampling of whole images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from harness.core import Metric, Predictions
from harness.errors import ProbeError
from harness.metrics import bootstrap, metric
from harness.metrics.bootstrap import interval, paired_interval
from harness.metrics.quantities import means_of
from harness.probes import locality


def answers(seed: int, groups: int = 30, rows: int = 200, classes: int = 4, skill: float = 0.6) -> Predictions:
    """Items of the same keys, groups and targets at any skill; only the predictions differ."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    targets, group = fixed.integers(0, classes, rows), fixed.integers(0, groups, rows)
    return Predictions(
        keys=[f"k{i}" for i in range(rows)],
        groups=[f"g{g}" for g in group],
        targets=targets,
        predictions=np.where(rng.random(rows) < skill, targets, rng.integers(0, classes, rows)),
        scores=rng.random(rows),
    )


def take(table: Predictions, rows: list[int]) -> Predictions:
    """The given rows, with repeats, as a new table."""
    return Predictions(
        keys=[table.keys[i] for i in rows],
        groups=[table.groups[i] for i in rows],
        targets=table.targets[rows],
        predictions=table.predictions[rows],
        scores=table.scores[rows],
    )


def direct_resamples(name: str, table: Predictions, classes: int, resamples: int, seed: int) -> list[float]:
    """Whole images drawn with replacement, their rows repeated, and the metric computed on the longer table."""
    images = list(dict.fromkeys(table.groups))
    rows = {image: [i for i, group in enumerate(table.groups) if group == image] for image in images}
    draws = np.random.default_rng(seed).integers(0, len(images), size=(resamples, len(images)))
    values = []
    for draw in draws:
        resampled = take(table, [i for g in draw for i in rows[images[g]]])
        values.append(float(metric(name).value(metric(name).counts(resampled, classes).sum(axis=0))))
    return values


@pytest.mark.parametrize("name", ["accuracy", "mean_class_accuracy", "AP", "mAP", "mIoU", "aAcc"])
def test_same_draws_give_the_same_interval_as_resampling_whole_images(name: str) -> None:
    table = answers(1)
    low, high = np.percentile(direct_resamples(name, table, 4, 200, seed=7), [2.5, 97.5])
    estimate = interval(metric(name), table, 4, resamples=200, seed=7)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-12)


def test_other_draws_give_a_close_interval() -> None:
    table = answers(1)
    estimate = interval(metric("accuracy"), table, 4, resamples=2000, seed=0)
    low, high = np.percentile(direct_resamples("accuracy", table, 4, 2000, seed=12345), [2.5, 97.5])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.015)


def test_the_interval_is_wider_when_items_of_an_image_agree() -> None:
    right = np.repeat(np.arange(20) % 2, 25)
    widths = []
    for groups in ([f"g{i // 25}" for i in range(500)], [f"g{i}" for i in range(500)]):
        table = Predictions(keys=groups, groups=groups, targets=np.zeros(500, np.int64), predictions=right, scores=np.ones(500))
        estimate = interval(metric("accuracy"), table, 2)
        assert estimate.low is not None
        assert estimate.high is not None
        widths.append(estimate.high - estimate.low)
    # the standard error of 20 images is 5 times that of 500 independent items
    assert widths[0] / widths[1] == pytest.approx(5, rel=0.2)


def test_the_interval_is_a_function_of_the_seed_and_not_of_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = answers(2)
    whole = interval(metric("mIoU"), table, 4, resamples=300, seed=3)
    monkeypatch.setattr(bootstrap, "CELLS", 97)
    assert interval(metric("mIoU"), table, 4, resamples=300, seed=3) == whole
    assert interval(metric("mIoU"), table, 4, resamples=300, seed=4) != whole


def test_the_difference_of_paired_tables_uses_the_same_draws_for_both() -> None:
    first, second = answers(1, skill=0.7), answers(2, skill=0.5)
    differences = np.array(direct_resamples("accuracy", first, 4, 200, 5)) - np.array(direct_resamples("accuracy", second, 4, 200, 5))
    estimate = paired_interval(metric("accuracy"), first, second, 4, resamples=200, seed=5)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])), abs=1e-12)


def test_pairing_goes_by_group_and_not_by_position() -> None:
    first, second = answers(1), answers(2, skill=0.3)
    shuffled = take(second, np.random.default_rng(0).permutation(len(second)).tolist())
    assert paired_interval(metric("mAP"), first, shuffled, 4) == paired_interval(metric("mAP"), first, second, 4)
    itself = paired_interval(metric("accuracy"), first, take(first, list(range(len(first)))[::-1]), 4)
    # nothing differs in any resample, which says nothing of other images
    assert (itself.value, itself.low, itself.high) == (0, None, None)
    assert itself.reason


def test_tables_of_other_keys_are_not_paired() -> None:
    first = answers(1)
    with pytest.raises(ProbeError, match="'k0' in one only"):
        paired_interval(metric("accuracy"), first, take(first, list(range(1, len(first)))), 4)


def test_undefined_is_none_with_a_reason() -> None:
    empty = interval(metric("accuracy"), take(answers(1), []), 4)
    assert (empty.value, empty.low, empty.high, empty.n_groups) == (None, None, None, 0)
    assert empty.reason
    alone = answers(1, groups=1)
    estimate = interval(metric("accuracy"), alone, 4)
    assert estimate.value == pytest.approx(float((alone.targets == alone.predictions).mean()))
    assert (estimate.low, estimate.high, estimate.n_groups) == (None, None, 1)
    assert estimate.reason


def test_undefined_resamples_are_counted_and_left_out() -> None:
    table = Predictions(
        keys=["a", "b"],
        groups=["a", "b"],
        targets=np.array([0, 0]),
        predictions=np.array([0, 0]),
        scores=np.array([0.25, np.nan]),
    )
    estimate = interval(metric("AP"), table, 1, resamples=400)
    assert (estimate.value, estimate.low, estimate.high) == (0.25, None, None)  # one image alone is left to draw from
    assert 60 < estimate.undefined_resamples < 140


@pytest.mark.parametrize(("resamples", "level"), [(0, 0.95), (10, 0.0), (10, 1.0)])
def test_impossible_requests_are_refused(resamples: int, level: float) -> None:
    with pytest.raises(ProbeError, match="expected at least 1 resample"):
        interval(metric("accuracy"), answers(1), 4, resamples=resamples, level=level)


# --- where the bootstrap has no width ---------------------------------------------------------------------------------


def all_alike(value: int, groups: int, items: int = 1, unlabelled: int = 0) -> Predictions:
    """Items of two classes in `groups` images, all wrong (0) or all right (1), and images of one unlabelled item."""
    names = [*(f"g{i}" for i in range(groups) for _ in range(items)), *(f"u{i}" for i in range(unlabelled))]
    targets = np.array([*(i % 2 for i in range(groups * items)), *[-1] * unlabelled], np.int64)
    return Predictions(
        keys=[f"k{i}" for i in range(len(names))],
        groups=names,
        targets=targets,
        predictions=np.where(targets < 0, 0, targets if value else 1 - targets),
        scores=np.full(len(names), float(value)),
    )


def wilson_by_hand(share: float, groups: int) -> tuple[float, float]:
    """Wilson (1927): (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n), z the 97.5 % point of the normal distribution."""
    z = 1.959963984540054
    middle, reach = share + z**2 / (2 * groups), z * np.sqrt(share * (1 - share) / groups + z**2 / (4 * groups**2))
    return max(0.0, (middle - reach) / (1 + z**2 / groups)), min(1.0, (middle + reach) / (1 + z**2 / groups))


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize(("groups", "items"), [(1, 1), (1, 4), (2, 1), (7, 3), (54, 1), (5000, 1)])
def test_an_accuracy_of_0_or_1_has_wilsons_interval_by_groups(value: int, groups: int, items: int) -> None:
    estimate = interval(metric("accuracy"), all_alike(value, groups, items), 2)
    assert estimate.value == value
    assert (estimate.low, estimate.high) == pytest.approx(wilson_by_hand(value, groups), abs=1e-9)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low <= value <= estimate.high
    assert estimate.reason is None


def test_groups_of_which_nothing_is_counted_make_no_interval_narrower() -> None:
    assert interval(metric("accuracy"), all_alike(1, 5, unlabelled=90), 2).low == pytest.approx(wilson_by_hand(1, 5)[0], abs=1e-9)


def test_accuracy_at_a_level_is_a_mean_of_outcomes_too() -> None:
    estimate = interval(metric("accuracy@coarse", {"coarse": (0, 0)}), all_alike(0, 6), 2)
    assert (estimate.value, estimate.high) == (1, 1)
    assert estimate.low == pytest.approx(wilson_by_hand(1, 6)[0], abs=1e-9)


def test_pixel_accuracy_is_a_mean_of_outcomes_too() -> None:
    estimate = interval(metric("aAcc"), all_alike(1, 6), 2)
    assert (estimate.low, estimate.high) == pytest.approx(wilson_by_hand(1, 6), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("number", range(len(locality.NAMES)))
def test_whether_the_nearest_is_the_same_is_an_outcome_and_its_chance_is_none(number: int, value: float) -> None:
    share = means_of(locality.QUANTITIES)[number]
    columns = {"targets": np.full(8, number, np.int64), "predictions": np.full(8, -1, np.int64), "scores": np.full(8, value)}
    keys = [f"k{i}" for i in range(8)]
    estimate = interval(share, Predictions(keys=keys, groups=[f"g{i // 2}" for i in range(8)], **columns), 1)
    assert (estimate.low, estimate.high) == ((None, None) if share.name.endswith("_chance") else pytest.approx(wilson_by_hand(value, 4), abs=1e-9))


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("name", ["AP", "mAP", "mIoU", "mAcc", "mean_class_accuracy"])
def test_other_metrics_of_0_or_1_have_no_interval_and_say_why(name: str, value: int) -> None:
    table = all_alike(value, 12)
    if name in ("mIoU", "mAcc"):
        table = Predictions(keys=table.keys, groups=table.groups, targets=table.targets, predictions=table.predictions, scores=np.full(12, 9.0))
    estimate = interval(metric(name), table, 2)
    assert (estimate.value, estimate.low, estimate.high) == (value, None, None)
    assert estimate.reason == "every resample has the same value"


def test_what_decides_is_the_metrics_own_word_and_not_its_name() -> None:
    @dataclass(frozen=True)
    class TopTwo(Metric):
        name: str = "top-2"
        is_mean_of_outcomes: ClassVar[bool] = True

        def counts(self, predictions: Predictions, classes: int) -> np.ndarray:
            return metric("accuracy").counts(predictions, classes)

        def value(self, sums: np.ndarray) -> np.ndarray:
            return metric("accuracy").value(sums)

    assert interval(TopTwo(), all_alike(1, 9), 2).low == pytest.approx(wilson_by_hand(1, 9)[0], abs=1e-9)


def test_images_that_all_have_one_value_between_0_and_1_tell_no_interval() -> None:
    table = all_alike(1, 10, items=2)
    half = Predictions(keys=table.keys, groups=table.groups, targets=table.targets, predictions=np.zeros(20, np.int64), scores=table.scores)
    estimate = interval(metric("accuracy"), half, 2)
    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)
    assert estimate.reason


def test_one_image_short_of_1_the_bootstrap_has_its_say() -> None:
    table = all_alike(1, 40)
    wrong = table.predictions.copy()
    wrong[3] = 1 - wrong[3]
    estimate = interval(metric("accuracy"), Predictions(**{**vars(table), "predictions": wrong}), 2)
    draws = direct_resamples("accuracy", Predictions(**{**vars(table), "predictions": wrong}), 2, 2000, 0)
    assert (estimate.low, estimate.high) == tuple(np.percentile(draws, [2.5, 97.5]))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (0, 0), (1, 0)])
def test_a_difference_between_extremes_has_no_interval_either(first: int, second: int) -> None:
    estimate = paired_interval(metric("accuracy"), all_alike(first, 8), all_alike(second, 8), 2)
    assert (estimate.value, estimate.low, estimate.high) == (first - second, None, None)
    assert estimate.reason
