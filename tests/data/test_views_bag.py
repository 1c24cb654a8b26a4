"""Bags of patches: where patches lie, how large they are, and what stays the same when there are more of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.core import Item, Sample
from harness.data.views.bag import Bag, side_of_area
from harness.errors import RequestError


def sample(height: int = 60, width: int = 90, key: str = "a", group: str | None = None) -> Sample:
    """Every pixel tells its row (red) and its column (green)."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Sample(key=key, image=np.stack([rows, columns, np.zeros_like(rows)], axis=-1), label=2, group=group)


def corner(item: Item) -> tuple[int, int]:
    top, left, _ = item.image[0, 0].tolist()
    return top, left


def pixels(items: list[Item]) -> list[np.ndarray]:
    return [item.image for item in items]


def test_every_patch_has_a_key_of_its_draw_and_index_and_the_images_label_and_group() -> None:
    view = Bag(patches=3, side=32, draws=2)
    items = view(sample(group="photograph"))
    assert [item.key for item in items] == ["a#0.0", "a#0.1", "a#0.2", "a#1.0", "a#1.1", "a#1.2"]
    assert {(item.target, item.group) for item in items} == {(2, "photograph")}
    assert len(items) == view.items
    assert {item.group for item in view(sample())} == {"a"}


@pytest.mark.parametrize(("side", "frame", "expected"), [(32, 1.0, 9), (112, 1.0, 30), (112, 0.5, 15), (224, 0.5, 30), (1, 0.1, 1)])
def test_the_side_is_in_pixels_of_a_frame_of_224(side: float, frame: float, expected: int) -> None:
    for placement in ("random", "grid"):
        for item in Bag(patches=4, side=side, frame=frame, placement=placement)(sample()):
            assert item.image.shape == (expected, expected, 3)


def test_a_share_of_the_area() -> None:
    assert side_of_area(0.25) == 112
    assert side_of_area(1.0) == 224


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_patches_lie_in_the_central_square_and_reach_its_edges(shape: tuple[int, int]) -> None:
    # the shorter side is 60: a frame of 48, beginning 6 from the edge of the shorter side and 21 from that of the longer one; a patch of 24
    first = (6, 21) if shape[0] < shape[1] else (21, 6)
    places = np.array([corner(item) for item in Bag(patches=2000, side=112, frame=0.8)(sample(*shape))]) - first
    for axis in (0, 1):
        assert (places[:, axis].min(), places[:, axis].max()) == (0, 24)
        counts = np.bincount(places[:, axis], minlength=25)
        assert counts.min() > 40, "80 are expected at each of the 25 places"


def test_the_first_patches_are_the_same_for_any_number_of_them() -> None:
    many, few = (Bag(patches=patches, side=50, draws=2, seed=3)(sample()) for patches in (16, 5))
    by_key = {item.key: item for item in many}
    for item in few:
        np.testing.assert_array_equal(item.image, by_key[item.key].image)


def test_draws_seeds_and_samples_give_other_patches_and_the_same_ones_again() -> None:
    view = Bag(patches=8, side=50, draws=2)
    places = [corner(item) for item in view(sample())]
    assert places[:8] != places[8:]
    assert places == [corner(item) for item in view(sample())]
    assert places != [corner(item) for item in view(sample(key="b"))]
    assert places != [corner(item) for item in Bag(patches=8, side=50, draws=2, seed=1)(sample())]
    assert places[:8] == [corner(item) for item in Bag(patches=8, side=50, draws=1)(sample())]


def test_a_grid_of_touching_patches_covers_the_frame_once() -> None:
    items = Bag(patches=16, side=56, placement="grid", frame=1.0)(sample(64, 64))
    seen = np.zeros((64, 64), int)
    for item in items:
        top, left = corner(item)
        seen[top : top + 16, left : left + 16] += 1
    assert np.all(seen == 1)


def test_a_grid_reaches_from_edge_to_edge_and_a_single_patch_is_central() -> None:
    places = {corner(item) for item in Bag(patches=9, side=112, placement="grid", frame=1.0)(sample(64, 64))}
    assert places == {(top, left) for top in (0, 16, 32) for left in (0, 16, 32)}
    (single,) = Bag(patches=1, side=112, placement="grid", frame=1.0)(sample(64, 64))
    assert corner(single) == (16, 16)


def test_the_order_of_a_grid_is_the_seeds_alone() -> None:
    def order(key: str, seed: int) -> list[tuple[int, int]]:
        return [corner(item) for item in Bag(patches=16, side=56, placement="grid", seed=seed, frame=1.0)(sample(64, 64, key=key))]

    assert order("a", 0) == order("b", 0) != order("a", 1)
    assert order("a", 0) != sorted(order("a", 0)), "a prefix in reading order would be the top of the image"


def test_a_patch_of_the_whole_frame_is_the_frame() -> None:
    for item in Bag(patches=4, side=224, frame=1.0)(sample(40, 40)):
        np.testing.assert_array_equal(item.image, sample(40, 40).image)


def test_whatever_changes_a_patch_changes_the_identity() -> None:
    base: dict[str, Any] = {"patches": 16, "side": 56.0}
    others = ({"patches": 4}, {"side": 57.0}, {"placement": "grid"}, {"seed": 1}, {"draws": 2}, {"frame": 1.0})
    assert len({Bag(**base).identity} | {Bag(**base | other).identity for other in others}) == 7
    assert Bag(**base | {"side": side_of_area(1 / 16)}).identity == Bag(**base).identity
    assert (Bag(**base).fit, Bag(**base).alteration) == ("resize", None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"patches": 0},
        {"draws": 0},
        {"side": 0.0},
        {"side": 225.0},
        {"frame": 0.0},
        {"frame": 1.1},
        {"patches": 5, "placement": "grid"},
        {"draws": 2, "placement": "grid"},
    ],
)
def test_bags_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"bag: expected .* got .*; "):
        Bag(**{"patches": 4, "side": 56.0, **wrong})
