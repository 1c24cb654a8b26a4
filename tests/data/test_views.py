"""Views: what becomes of a sample."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.core import Keypoint, Sample
from harness.data.views.keypoint_patch import KeypointPatch, crop_square, nearest_distance
from harness.data.views.whole import Whole
from harness.errors import SampleError


def sample(*keypoints: Keypoint) -> Sample:
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    return Sample(key="a", image=image, label=2, keypoints=keypoints, object_mask=np.ones((20, 30), np.uint8))


HEAD = Keypoint(part="head", x=10, y=10)
FOOT = Keypoint(part="foot", x=16, y=18)
EYE = Keypoint(part="eye", x=11, y=10)
HIDDEN = Keypoint(part="tail", x=10, y=11, visible=False)


def test_the_whole_image_carries_its_label_and_masks() -> None:
    (item,) = Whole()(sample())
    assert (item.key, item.group, item.target) == ("a", "a", 2)
    assert set(item.masks) == {"object"}


def test_a_patch_for_every_visible_selected_keypoint_with_the_distance_to_the_nearest() -> None:
    items = KeypointPatch(parts=("foot", "head", "tail"), neighbours="selected")(sample(HEAD, EYE, FOOT, HIDDEN))
    assert [(item.target, item.image.shape) for item in items] == [(1, (10, 10, 3)), (0, (10, 10, 3))]
    assert {item.group for item in items} == {"a"}
    assert len({item.key for item in items}) == 2


def test_all_keypoints_count_as_neighbours_where_asked() -> None:
    head, _ = KeypointPatch(parts=("head", "foot"), neighbours="all")(sample(HEAD, EYE, FOOT))
    assert head.image.shape == (1, 1, 3)


def test_side_and_distance_limits() -> None:
    (first, _) = KeypointPatch(parts=("head", "foot"), neighbours="selected", side=0.5)(sample(HEAD, FOOT))
    assert first.image.shape == (5, 5, 3)
    assert KeypointPatch(parts=("head", "foot"), neighbours="selected", min_distance=10)(sample(HEAD, FOOT)) == []
    assert KeypointPatch(parts=("head", "foot"), neighbours="selected", max_distance=10)(sample(HEAD, FOOT)) == []
    assert KeypointPatch(parts=("head", "tail"), min_parts=2)(sample(HEAD, HIDDEN)) == []


def test_a_lone_keypoint_has_no_distance_and_no_patch() -> None:
    assert KeypointPatch(parts=("head",))(sample(HEAD)) == []
    assert nearest_distance(HEAD, [HEAD, Keypoint(part="x", x=10, y=10)]) is None
    assert nearest_distance(HEAD, [HEAD, FOOT]) == pytest.approx(math.hypot(6, 8))


def test_what_lies_outside_the_image_is_black() -> None:
    image = np.full((8, 8, 3), 9, np.uint8)
    patch = crop_square(image, 0, 0, 6)
    assert patch.shape == (6, 6, 3)
    assert (patch[3:, 3:] == 9).all()
    assert patch.sum() == 9 * 3 * 3 * 3
    assert not crop_square(image, 100, 100, 4).any()


def test_identity_names_every_parameter() -> None:
    base = KeypointPatch(parts=("head",))
    others = [
        KeypointPatch(parts=("foot",)),
        KeypointPatch(parts=("head",), side=0.5),
        KeypointPatch(parts=("head",), neighbours="selected"),
        KeypointPatch(parts=("head",), min_distance=1),
        KeypointPatch(parts=("head",), max_distance=9),
        KeypointPatch(parts=("head",), min_parts=2),
    ]
    assert len({base.identity, *(other.identity for other in others)}) == 7


def test_a_patch_far_larger_than_any_picture_costs_its_sample() -> None:
    strip = np.zeros((1, 20_000, 3), np.uint8)
    assert crop_square(strip, 5.0, 0.5, 11.0).shape == (11, 11, 3)
    with pytest.raises(SampleError, match="too large: a patch of 19,000 × 19,000 pixels, at most 178,956,970"):
        crop_square(strip, 5.0, 0.5, 19_000.0)
