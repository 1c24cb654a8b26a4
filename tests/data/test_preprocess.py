"""Preparing images and label maps."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from harness.core import Preprocessing
from harness.data import preprocess as module
from harness.data.preprocess import prepare, prepare_mask

SQUARE = Preprocessing(size=(32, 32), resize=40)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("height", "width"), [(50, 90), (90, 50), (64, 64), (33, 200), (20, 24)])
def test_agrees_with_pillow(height: int, width: int) -> None:
    image = smooth(height, width)
    short = 40 / min(height, width)
    target = (40, int(40 * width / height)) if height <= width else (int(40 * height / width), 40)
    resized = Image.fromarray(image).resize((target[1], target[0]), Image.Resampling.BICUBIC)
    top, left = round((target[0] - 32) / 2), round((target[1] - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(np.float32) / 255
    got = prepare(image, SQUARE, "crop")
    restored = got.permute(1, 2, 0).numpy() * np.array(SQUARE.std) + np.array(SQUARE.mean)
    assert short > 0
    assert got.dtype == torch.float32
    assert got.shape == (3, 32, 32)
    assert np.abs(restored - expected).max() <= 2.01 / 255  # two 8-bit levels: rounding of the two implementations


def test_resize_fit_takes_in_the_whole_image() -> None:
    image = np.zeros((30, 120, 3), np.uint8)
    image[:, :10] = 255
    cropped, resized = prepare(image, SQUARE, "crop"), prepare(image, SQUARE, "resize")
    assert float(cropped.max()) < 0  # the bright edge is outside the centre crop
    assert float(resized[:, :, 0].min()) > 1
    assert resized.shape == (3, 32, 32)


@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_same_bits_whatever_comes_with_it(fit: str) -> None:
    images = [smooth(50, 70, seed) for seed in range(3)]
    alone = [prepare(image, SQUARE, fit) for image in images]  # type: ignore[arg-type]
    again = [prepare(image.copy(), SQUARE, fit) for image in reversed(images)][::-1]  # type: ignore[arg-type]
    view = prepare(np.asfortranarray(images[0]), SQUARE, fit)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, repeated) for tensor, repeated in zip(alone, again, strict=True))
    assert torch.equal(view, alone[0])


@pytest.mark.parametrize("size", [(32, 32), (32, 80), (80, 32)])
@pytest.mark.parametrize(("height", "width"), [(100, 60), (60, 100), (64, 64)])
@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_mask_lies_where_the_image_does(size: tuple[int, int], height: int, width: int, fit: str) -> None:
    preprocessing = Preprocessing(size=size, resize=40, mean=(0, 0, 0), std=(1, 1, 1))
    image = np.zeros((height, width, 3), np.uint8)
    image[20:45, 25:50] = 255
    mask = (image[..., 0] > 0).astype(np.uint8) * 7
    shown = prepare(image, preprocessing, fit)[0].numpy() > 0.5  # type: ignore[arg-type]
    labels = prepare_mask(mask, preprocessing, fit)  # type: ignore[arg-type]
    assert labels.shape == size
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 7}
    overlap = np.logical_and(shown, labels == 7).sum() / np.logical_or(shown, labels == 7).sum()
    assert overlap > 0.9


def test_oblong_input_is_never_padded() -> None:
    image = np.full((60, 60, 3), 200, np.uint8)
    prepared = prepare(image, Preprocessing(size=(32, 96), resize=40, mean=(0, 0, 0), std=(1, 1, 1)), "crop")
    assert torch.allclose(prepared, torch.tensor(200 / 255))


def test_wide_labels_survive() -> None:
    mask = np.full((50, 50), 60000, np.uint16)
    assert prepare_mask(mask, SQUARE, "crop").dtype == np.uint16
    assert (prepare_mask(mask, SQUARE, "crop") == 60000).all()


def test_what_is_no_image_or_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 and shape \[H, W, 3\]"):
        prepare(np.zeros((4, 4, 3), np.float32), SQUARE, "crop")
    with pytest.raises(ValueError, match=r"got uint8 \[4, 4, 4\]"):
        prepare(np.zeros((4, 4, 4), np.uint8), SQUARE, "crop")
    with pytest.raises(ValueError, match="mask of integers"):
        prepare_mask(np.zeros((4, 4), np.float32), SQUARE, "crop")


NOISE = np.random.default_rng(3)
LEVEL = 1 / 255
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resize all of a picture, whatever its aspect."""
    monkeypatch.setattr(module, "LONGEST", 10**9)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(7, 700), (700, 7), (1, 400), (400, 1), (30, 1500), (1500, 30), (90, 1800), (1800, 90)])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32)])
def test_an_extreme_aspect_gives_what_resizing_all_of_it_gives(
    height: int, width: int, size: tuple[int, int], interpolation: Literal["bicubic", "bilinear"], monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessing = Preprocessing(size=size, resize=48, interpolation=interpolation, **PLAIN)
    image = NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = NOISE.integers(0, 60000, (height, width)).astype(np.uint16)
    got, labels = prepare(image, preprocessing, "crop"), prepare_mask(mask, preprocessing, "crop")
    whole(monkeypatch)
    assert (got - prepare(image, preprocessing, "crop")).abs().max() <= 1.01 * LEVEL
    assert np.array_equal(labels, prepare_mask(mask, preprocessing, "crop"))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 400), (400, 100), (50, 600), (600, 50), (40, 520), (520, 40)])
@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_an_ordinary_aspect_keeps_its_bits(height: int, width: int, fit: Literal["crop", "resize"], monkeypatch: pytest.MonkeyPatch) -> None:
    image = NOISE.integers(0, 256, (height, width, 3), dtype=np.uint8)
    got, labels = prepare(image, SQUARE, fit), prepare_mask(image[..., 0], SQUARE, fit)
    whole(monkeypatch)
    assert torch.equal(got, prepare(image, SQUARE, fit))
    assert np.array_equal(labels, prepare_mask(image[..., 0], SQUARE, fit))


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (1, 1_000_000), (1_000_000, 1), (3, 400_000), (400_000, 3)])
@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_memory_does_not_depend_on_the_aspect(shape: tuple[int, int], fit: Literal["crop", "resize"], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, resize = [0], module.F.resize

    def counted(pixels: torch.Tensor, size: list[int], **options: Any) -> torch.Tensor:
        resized: torch.Tensor = resize(pixels, size, **options)
        between = 3 * pixels.shape[1] * size[1] if options.get("antialias") else 0  # rows are widened before they are reduced
        sizes.append(max(resized.numel(), between))
        return resized

    monkeypatch.setattr(module.F, "resize", counted)
    usual = Preprocessing(size=(224, 224), resize=256)
    assert prepare(np.full((*shape, 3), 200, np.uint8), usual, fit).shape == (3, 224, 224)
    assert prepare_mask(np.full(shape, 3, np.uint8), usual, fit).shape == (224, 224)
    assert max(sizes) <= 3 * shape[0] * shape[1] + 3 * 256 * 16 * 224


def test_a_long_side_reduced_first_is_the_mean_that_it_was() -> None:
    image = smooth(2000, 20)
    plain = Preprocessing(size=(32, 32), resize=40, **PLAIN)
    reduced = Image.fromarray(image).resize((20, 32), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    got = prepare(image, plain, "resize").permute(1, 2, 0).numpy()
    assert np.abs(got - np.asarray(reduced, np.float32) / 255).max() <= 2.01 * LEVEL
