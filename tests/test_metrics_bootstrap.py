"""The clustered bootstrap against a direct resampling of whole images."""

from __future__ import annotations

import numpy as np
import pytest

from harness.core import Predictions
from harness.errors import ProbeError
from harness.metrics import bootstrap, metric
from harness.metrics.bootstrap import interval, paired_interval


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
    """The given rows, with repeats, as a table of its own."""
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
    found = interval(metric(name), table, 4, resamples=200, seed=7)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_other_draws_give_a_close_interval() -> None:
    table = answers(1)
    found = interval(metric("accuracy"), table, 4, resamples=2000, seed=0)
    low, high = np.percentile(direct_resamples("accuracy", table, 4, 2000, seed=12345), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)


def test_the_interval_is_wider_when_items_of_an_image_agree() -> None:
    right = np.repeat(np.arange(20) % 2, 25)
    widths = []
    for groups in ([f"g{i // 25}" for i in range(500)], [f"g{i}" for i in range(500)]):
        table = Predictions(keys=groups, groups=groups, targets=np.zeros(500, np.int64), predictions=right, scores=np.ones(500))
        found = interval(metric("accuracy"), table, 2)
        assert found.low is not None
        assert found.high is not None
        widths.append(found.high - found.low)
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
    found = paired_interval(metric("accuracy"), first, second, 4, resamples=200, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])), abs=1e-12)


def test_pairing_goes_by_group_and_not_by_position() -> None:
    first, second = answers(1), answers(2, skill=0.3)
    shuffled = take(second, np.random.default_rng(0).permutation(len(second)).tolist())
    assert paired_interval(metric("mAP"), first, shuffled, 4) == paired_interval(metric("mAP"), first, second, 4)
    itself = paired_interval(metric("accuracy"), first, take(first, list(range(len(first)))[::-1]), 4)
    assert (itself.value, itself.low, itself.high) == (0, 0, 0)


def test_tables_of_other_keys_are_not_paired() -> None:
    first = answers(1)
    with pytest.raises(ProbeError, match="'k0' in one only"):
        paired_interval(metric("accuracy"), first, take(first, list(range(1, len(first)))), 4)


def test_undefined_is_none_with_a_reason() -> None:
    empty = interval(metric("accuracy"), take(answers(1), []), 4)
    assert (empty.value, empty.low, empty.high, empty.n_groups) == (None, None, None, 0)
    assert empty.reason
    alone = answers(1, groups=1)
    found = interval(metric("accuracy"), alone, 4)
    assert found.value == pytest.approx(float((alone.targets == alone.predictions).mean()))
    assert (found.low, found.high, found.n_groups) == (None, None, 1)
    assert found.reason


def test_undefined_resamples_are_counted_and_left_out() -> None:
    table = Predictions(
        keys=["a", "b"],
        groups=["a", "b"],
        targets=np.array([0, 0]),
        predictions=np.array([0, 0]),
        scores=np.array([0.25, np.nan]),
    )
    found = interval(metric("AP"), table, 1, resamples=400)
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)
    assert 60 < found.undefined_resamples < 140


@pytest.mark.parametrize(("resamples", "level"), [(0, 0.95), (10, 0.0), (10, 1.0)])
def test_impossible_requests_are_refused(resamples: int, level: float) -> None:
    with pytest.raises(ProbeError, match="expected at least 1 resample"):
        interval(metric("accuracy"), answers(1), 4, resamples=resamples, level=level)
