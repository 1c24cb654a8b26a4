"""Augmentation is a function of (seed, epoch, key), and image and labels stay on each other."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from harness.core import Preprocessing
from harness.data.augment import (
    IGNORED,
    CropAndFlip,
    Scene,
    SceneAugmentation,
    as_pixels,
    distort,
    draw,
    fitting,
    labelled,
    saturated,
)

PREPROCESSING = Preprocessing(size=(32, 32), resize=36)
GEOMETRY_ONLY = {"photometric": False}


def painted(seed: int = 0, height: int = 60, width: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """An image of large rectangles, and the map of their colours: the red channel is 40 times the label."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for label in range(1, 6):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        mask[top : top + 20, left : left + 20] = label
    image = np.stack([mask * 40, np.full_like(mask, 90), 255 - mask * 40], axis=-1)
    return image, mask


def scene(seed: int = 0) -> Scene:
    image, mask = painted(seed)
    return Scene(pixels=as_pixels(image), labels=labelled(mask, 6, ()))


def test_a_draw_depends_on_seed_epoch_and_key_alone() -> None:
    augment, image = CropAndFlip(), painted()[0]

    def view(seed: int, epoch: int, key: str) -> torch.Tensor:
        return augment(image, PREPROCESSING, draw(seed, epoch, key))

    first = view(0, 0, "a")
    view(3, 1, "x")  # what others drew in between does not matter
    assert torch.equal(first, view(0, 0, "a"))
    assert all(not torch.equal(first, view(*other)) for other in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")))


def test_a_scene_is_drawn_the_same_again() -> None:
    augment = SceneAugmentation(scale=(90, 60), crop=48)
    first, again = (augment(scene(), PREPROCESSING, draw(0, 2, "k")) for _ in range(2))
    assert all(torch.equal(tensor, repeated) for tensor, repeated in zip(first, again, strict=True))
    assert first[0].shape == (3, 48, 48)
    assert first[1].shape == (48, 48)


def test_crops_have_the_areas_and_ratios_that_were_asked_for() -> None:
    augment, rng = CropAndFlip(), np.random.default_rng(0)
    boxes = np.array([augment.box(300, 400, rng) for _ in range(500)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    share, ratio = height * width / 120_000, width / height
    assert share.min() >= 0.08 * 0.97
    assert share.min() < 0.12
    assert share.max() > 0.75
    assert ratio.min() >= 3 / 4 * 0.97
    assert ratio.max() <= 4 / 3 * 1.03


def test_an_image_too_narrow_for_any_ratio_is_cropped_in_its_centre() -> None:
    assert CropAndFlip(scale=(1.0, 1.0)).box(400, 30, np.random.default_rng(0)) == (180, 0, 40, 30)
    assert CropAndFlip(scale=(1.0, 1.0)).box(30, 400, np.random.default_rng(0)) == (0, 180, 30, 40)


@pytest.mark.parametrize("key", [f"k{index}" for index in range(8)])
def test_labels_lie_on_the_pixels_that_they_name(key: str) -> None:
    cut = SceneAugmentation(scale=(90, 60), crop=48, **GEOMETRY_ONLY).geometry(scene(), draw(0, 0, key))
    assert cut.pixels.shape[1:] == cut.labels.shape
    # away from edges, where pixels are mixed, the red channel is 40 times the label
    inside = torch.nn.functional.max_pool2d(cut.labels[None].float(), 5, 1, 2) == -torch.nn.functional.max_pool2d(-cut.labels[None].float(), 5, 1, 2)
    agree = (cut.pixels[0].int() - cut.labels * 40).abs() <= 2
    assert inside.float().mean() > 0.3
    assert agree[inside[0]].float().mean() > 0.99  # slivers of a pixel may vanish from one of the two


def test_a_label_map_of_another_size_covers_the_same_image() -> None:
    image, mask = painted()
    augment = SceneAugmentation(scale=(180, 120), crop=4096, ratio=(1.0, 1.0), flip=0.0, max_share=1.0, **GEOMETRY_ONLY)
    small = labelled(mask, 6, ())
    large = small.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    maps = [augment.geometry(Scene(pixels=as_pixels(image), labels=labels), draw(0, 0, "k")).labels for labels in (small, large)]
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], large)


def test_what_lies_outside_the_image_is_zero_and_ignored() -> None:
    augment = SceneAugmentation(scale=(45, 30), crop=64, ratio=(1.0, 1.0), max_share=1.0)
    image, labels = augment(scene(), PREPROCESSING, draw(0, 0, "k"))
    assert (labels[30:] == IGNORED).all()
    assert (labels[:, 45:] == IGNORED).all()
    assert (labels[:30, :45] != IGNORED).all()
    assert (image[:, 30:] == 0).all()
    assert (image[:, :, 45:] == 0).all()


def test_crops_avoid_one_class_where_they_can() -> None:
    mask = np.zeros((40, 400), np.uint8)
    mask[:, 200:] = 1
    halves = Scene(pixels=torch.zeros(3, 40, 400, dtype=torch.uint8), labels=labelled(mask, 2, ()))

    def mixed(share: float) -> int:
        augment = SceneAugmentation(scale=(400, 40), crop=40, ratio=(1.0, 1.0), max_share=share, **GEOMETRY_ONLY)
        shares = [augment.geometry(halves, draw(0, 0, str(key))).labels.float().mean() for key in range(60)]
        return sum(0.25 < float(share) < 0.75 for share in shares)

    assert mixed(0.75) > 2 * mixed(1.0)


def test_ignored_values_are_ignored_and_unknown_ones_refused() -> None:
    mask = np.array([[0, 1, 255]], np.uint8)
    assert labelled(mask, 2, (0, 255)).tolist() == [[IGNORED, 1, IGNORED]]
    with pytest.raises(ValueError, match="255 of 2 classes"):
        labelled(mask, 2, (0,))


def test_the_largest_size_within_a_scale() -> None:
    # min(2048 / 640, 512 / 480) = 1.0667: 512 x 683
    assert fitting(480, 640, (2048, 512)) == (512, 683)
    assert fitting(640, 480, (512, 2048)) == (683, 512)
    assert fitting(100, 1000, (2048, 512)) == (205, 2048)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_saturation_is_that_of_hsv(factor: float) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 6, 6), dtype=np.uint8))
    changed = saturated(pixels, factor)
    for y in range(6):
        for x in range(6):
            hue, saturation, value = colorsys.rgb_to_hsv(*(float(c) / 255 for c in pixels[:, y, x]))
            expected = [255 * c for c in colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)]
            assert changed[:, y, x].tolist() == pytest.approx(expected, abs=0.51)


def test_distortion_stays_within_its_ranges() -> None:
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = [float(distort(grey, draw(0, 0, str(key)))[0, 0, 0]) for key in range(300)]
    assert min(values) >= (100 - 32) * 0.5 - 2
    assert max(values) <= (100 + 32) * 1.5 + 1
    assert min(values) < 60
    assert max(values) > 160
    assert 100.0 in values
