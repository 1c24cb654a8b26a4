"""Random augmentation that is no accident: a sample's draw is a function of (seed, epoch, key), whichever thread, process or restart makes it.

Shape legend: H W pixels of the source, h w pixels of the result.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from harness.core import Preprocessing

IGNORED = -1
"""The label of a pixel that is not counted: unlabelled, of an ignored class, or outside the image."""
UNLABELLED = 255
"""The value of an 8-bit label map that every data set leaves to pixels without a label."""
_TRIES = 10
_INTERPOLATION = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def draw(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of one sample in one epoch."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{key}".encode()).digest()[:16], "big"))


def as_pixels(image: np.ndarray) -> torch.Tensor:
    """uint8 [3, H, W] of an image, uint8 [H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def normalised(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """float32 [3, H, W] of uint8 pixels [3, H, W]: scaled to [0, 1] and normalised as the encoder wants it."""
    result: torch.Tensor = F.normalize(F.to_dtype(pixels, torch.float32, scale=True), list(preprocessing.mean), list(preprocessing.std))
    return result


# --- classification ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CropAndFlip:
    """A random-resized crop and a horizontal flip (Szegedy et al., arXiv 1409.4842; values as in torchvision's RandomResizedCrop)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Bounds of the crop's share of the image's area, uniform."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Bounds of width / height, log-uniform."""
    flip: float = 0.5
    """Probability."""

    def __call__(self, image: np.ndarray, preprocessing: Preprocessing, generator: np.random.Generator) -> torch.Tensor:
        """float32 [3, h, w], normalised, of an image, uint8 [H, W, 3]. Resized bicubically and antialiased, on 8-bit values."""
        pixels = as_pixels(image)
        (top, left, height, width), flipped = self.drawn(image.shape[0], image.shape[1], generator)
        pixels = F.resized_crop(pixels, top, left, height, width, list(preprocessing.size), interpolation=InterpolationMode.BICUBIC, antialias=True)
        if flipped:
            pixels = F.horizontal_flip(pixels)
        return normalised(pixels, preprocessing)

    def drawn(self, height: int, width: int, generator: np.random.Generator) -> tuple[tuple[int, int, int, int], bool]:
        """The crop, as `box` gives it, and whether it is flipped."""
        return self.box(height, width, generator), bool(generator.random() < self.flip)

    def box(self, height: int, width: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop within an image; after ten draws that do not fit, the largest centred one of an allowed ratio."""
        for _ in range(_TRIES):
            area = height * width * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1)), h, w
        if width / height < self.ratio[0]:
            w, h = width, max(1, min(height, round(width / self.ratio[0])))
        elif width / height > self.ratio[1]:
            w, h = max(1, min(width, round(height * self.ratio[1]))), height
        else:
            w, h = width, height
        return (height - h) // 2, (width - w) // 2, h, w


# --- segmentation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image and its labels on the same pixels."""

    pixels: torch.Tensor
    """uint8 [3, H, W]."""
    labels: torch.Tensor
    """int32 [H, W], IGNORED where a pixel does not count."""


def uncounted_labels(classes: int) -> tuple[int, ...]:
    """Values of a label map of so many classes that do not count, in training as in scoring.

    0 beside two or more classes, where it is whatever has no label; beside one class it is the ground of a figure, and a class. 255 where it is no
    class.
    """
    return (*((0,) if classes > 2 else ()), *((UNLABELLED,) if classes <= UNLABELLED else ()))


def left_out_classes(ignored: Sequence[int], classes: int) -> tuple[int, ...]:
    """Ignored values that are classes: these are neither trained nor ever predicted."""
    return tuple(value for value in ignored if value < classes)


def counted(mask: np.ndarray, ignored: Sequence[int]) -> np.ndarray:
    """bool, as `mask`: the pixels of a label map whose value is not in `ignored`."""
    is_counted = np.ones(mask.shape, dtype=bool)
    for value in ignored:
        is_counted &= mask != value
    return is_counted


def labelled(mask: np.ndarray, classes: int, ignored: Sequence[int]) -> torch.Tensor:
    """int32 [H, W] labels of a label map: classes, and IGNORED for the values in `ignored`. Raises ValueError for a value that is neither."""
    labels = torch.from_numpy(np.where(counted(mask, ignored), mask.astype(np.int32), np.int32(IGNORED)))
    top = int(labels.max()) if labels.numel() else IGNORED
    if top >= classes:
        raise ValueError(f"label map with a value {top} of {classes} classes")
    return labels


def fitting(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Height and width after the largest rescaling that keeps the aspect within `scale` (long side, short side; in either order).

    The arithmetic of mmcv.rescale_size: the factor is min(long / longer side, short / shorter side), sides are rounded half up.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def rescaled(scene: Scene, size: tuple[int, int]) -> Scene:
    """Image and labels at `size` (height, width): bilinear with antialiasing, and the nearest label. The label map may have had a size of its own."""
    return Scene(
        pixels=resized(scene.pixels, size),
        labels=F.resize(scene.labels[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0],
    )


def resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [3, h, w] of pixels [3, H, W]."""
    result: torch.Tensor = F.resize(pixels, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return result


@dataclass(frozen=True, kw_only=True)
class SceneAugmentation:
    """Random scale, crop, flip and photometric distortion, in this order, as in mmsegmentation's training pipelines for ADE20K (0.x).

    There the bilinear resize is not antialiased; here it is.
    """

    scale: tuple[int, int]
    """(long side, short side) that an image is fitted into at ratio 1."""
    crop: int
    """Side of the square crop in pixels."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Bounds of what `scale` is multiplied with, uniform."""
    max_share: float = 0.75
    """Most that one class may take of a crop's labelled pixels; after ten draws that it does, the last crop is taken as it is."""
    flip: float = 0.5
    """Probability."""
    photometric: bool = True

    def __call__(self, scene: Scene, preprocessing: Preprocessing, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [3, crop, crop], normalised, and int32 [crop, crop] labels; outside the image 0 and IGNORED."""
        scene = self.geometry(scene, generator)
        pixels = distort(scene.pixels, generator) if self.photometric else scene.pixels
        return padded(normalised(pixels, preprocessing), self.crop, 0.0), padded(scene.labels, self.crop, IGNORED)

    def geometry(self, scene: Scene, generator: np.random.Generator) -> Scene:
        """The scene after scale, crop and flip: at most crop × crop pixels."""
        ratio = generator.uniform(*self.ratio)
        height, width = scene.pixels.shape[1:]
        scene = rescaled(scene, fitting(height, width, (int(self.scale[0] * ratio), int(self.scale[1] * ratio))))
        scene = self._cropped(scene, generator)
        if generator.random() < self.flip:
            scene = Scene(pixels=F.horizontal_flip(scene.pixels), labels=F.horizontal_flip(scene.labels))
        return scene

    def _cropped(self, scene: Scene, generator: np.random.Generator) -> Scene:
        height, width = scene.labels.shape
        for _ in range(_TRIES + 1):
            top = int(generator.integers(max(height - self.crop, 0) + 1))
            left = int(generator.integers(max(width - self.crop, 0) + 1))
            labels = scene.labels[top : top + self.crop, left : left + self.crop]
            if self.max_share >= 1 or _is_mixed(labels, self.max_share):
                break
        return Scene(pixels=scene.pixels[:, top : top + self.crop, left : left + self.crop], labels=labels)


def _is_mixed(labels: torch.Tensor, share: float) -> bool:
    """Whether no class takes `share` of the labelled pixels or more."""
    counts = torch.bincount(labels[labels != IGNORED].flatten())
    counts = counts[counts > 0]
    return len(counts) > 1 and float(counts.max()) / float(counts.sum()) < share


def padded(array: torch.Tensor, side: int, value: float) -> torch.Tensor:
    """[..., H', W'] with sides of at least `side`: `value` to the right and below."""
    height, width = array.shape[-2:]
    if height >= side and width >= side:
        return array
    return torch.nn.functional.pad(array, (0, max(side - width, 0), 0, max(side - height, 0)), value=value)


BRIGHTNESS = 32.0
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18
"""In steps of 2 degrees: OpenCV's hue of 8-bit images goes round in 180."""


def distort(pixels: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """uint8 [3, H, W] after brightness, contrast, saturation and hue, each with probability 1/2, contrast second or last.

    The steps, ranges and order of mmsegmentation's PhotoMetricDistortion, which is that of SSD (arXiv 1512.02325).
    """
    if generator.random() < 0.5:
        pixels = _truncated(pixels.float() + generator.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_last = generator.random() < 0.5
    if not contrast_last:
        pixels = _contrast(pixels, generator)
    if generator.random() < 0.5:
        pixels = saturated(pixels, generator.uniform(*SATURATION))
    if generator.random() < 0.5:
        pixels = F.adjust_hue(pixels, int(generator.integers(-HUE, HUE)) / 180)
    return _contrast(pixels, generator) if contrast_last else pixels


def _contrast(pixels: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    return _truncated(pixels.float() * generator.uniform(*CONTRAST)) if generator.random() < 0.5 else pixels


def saturated(pixels: torch.Tensor, factor: float) -> torch.Tensor:
    """uint8 [3, H, W] with the saturation of HSV multiplied by `factor`, at most 1, hue and value being kept.

    With value V and saturation s, a channel c of the pixel is V - (V - c) s' / s.
    """
    channels = pixels.float()
    value = channels.amax(dim=0)
    saturation = (value - channels.amin(dim=0)) / value.clamp(min=1)
    grown = (saturation * factor).clamp(max=1) / saturation.clamp(min=torch.finfo(torch.float32).tiny)
    return (value - (value - channels) * grown).round().clamp(0, 255).to(torch.uint8)


def _truncated(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(0, 255).to(torch.uint8)
