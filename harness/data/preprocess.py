"""An image or a label map brought to an encoder's input size, one at a time, so that no image's pixels depend on its batch.

Shape legend: H W pixels of the source, h w pixels of the encoder's input.
"""

from __future__ import annotations

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from harness.core import Fit, Preprocessing

_INTERPOLATION = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
LONGEST = 16
"""Times the crop's side that a longer side may have after resizing, and times the shorter side before it. Of pictures beyond this, only what the crop
shows is resized, so that memory does not depend on the aspect; for the usual crops that begins between 1:14 and 1:16."""
_Spans = list[tuple[int, np.ndarray]]
"""Of every pixel along a resized side: the first source pixel that it is a mean of, and the weights of that one and those after it."""
_WEIGHT_BITS = 22  # as Pillow's: sums of whole numbers are the same in any order
_EXACT_IN_FLOAT32 = 2**24  # nearest-neighbour resizing of wide integers passes through float32


def prepare(image: np.ndarray, preprocessing: Preprocessing, fit: Fit) -> torch.Tensor:
    """float32 [3, h, w], normalised, from `image`, uint8 [H, W, 3] RGB: `normalise` of `prepare_pixels`, which says what is done and raised."""
    return normalise(prepare_pixels(image, preprocessing, fit)[None], preprocessing)[0]


def prepare_pixels(image: np.ndarray, preprocessing: Preprocessing, fit: Fit) -> torch.Tensor:
    """uint8 [h, w, 3] from `image`, uint8 [H, W, 3] RGB, at the input size of an encoder, not normalised yet.

    `crop` resizes the shorter side to `preprocessing.resize`, keeping the aspect, and crops the centre; `resize` resizes straight to the input size.
    Resizing is antialiased, on 8-bit values, as Pillow does it. Raises ValueError where `image` is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected an image of dtype uint8 and shape [H, W, 3], got {image.dtype} {list(image.shape)}")
    target = _target(image.shape[0], image.shape[1], preprocessing, fit)
    return _cropped(image, target, preprocessing).permute(1, 2, 0).contiguous()


def normalise(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """float32 [B, 3, h, w], normalised, of uint8 [B, h, w, 3], on the device where they lie.

    The operations, and so the bits, are those of torchvision's `to_dtype` with `scale` and of its `normalize`, on every device. On a CPU it is done
    image by image, so that each stays in the cache.
    """
    count, height, width, channels = pixels.shape
    mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    images = torch.empty((count, channels, height, width), device=pixels.device)
    for source, image in zip(pixels, images, strict=True) if pixels.device.type == "cpu" else [(pixels, images)]:
        image.copy_(source.movedim(-1, -3)).mul_(1.0 / 255).sub_(mean).div_(std)
    return images


def prepare_mask(mask: np.ndarray, preprocessing: Preprocessing, fit: Fit) -> np.ndarray:
    """The label map [h, w] that lies on what `prepare` makes of the image that `mask`, integers [H, W], is aligned with.

    The geometry is the image's; values are those of the nearest pixel, never mixed. The dtype is kept.
    Raises ValueError where `mask` is not a two-dimensional array of integers below 2^24.
    """
    if mask.ndim != 2 or mask.dtype.kind not in "iub" or 0 in mask.shape or int(mask.max()) >= _EXACT_IN_FLOAT32:
        raise ValueError(f"expected a mask of integers below {_EXACT_IN_FLOAT32} and shape [H, W], got {mask.dtype} {list(mask.shape)}")
    target = _target(mask.shape[0], mask.shape[1], preprocessing, fit)
    if _long_axis(target, preprocessing) is not None:
        rows, columns = (_nearest(*sides) for sides in zip(mask.shape, target, preprocessing.size, strict=True))
        central: np.ndarray = mask[np.ix_(rows, columns)]
        return central
    labels = torch.from_numpy(mask.astype(np.int32))[None]
    labels = F.resize(labels, target, interpolation=InterpolationMode.NEAREST_EXACT)
    labels = F.center_crop(labels, list(preprocessing.size))
    cropped: np.ndarray = labels[0].numpy().astype(mask.dtype)
    return cropped


def _cropped(image: np.ndarray, target: list[int], preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 [3, h, w]: the centre crop of `image` [H, W, 3] resized to `target`."""
    axis = _long_axis(target, preprocessing)
    if axis == 0:
        return _cropped_tall(image, target, preprocessing)
    if axis == 1:
        return _cropped_wide(image, target, preprocessing)
    pixels = _pixels(image)
    if image.shape[0] > LONGEST * image.shape[1]:
        # torchvision widens all of a tall picture's rows before it reduces them
        pixels = _resized(pixels, [target[0], image.shape[1]], preprocessing)
    cropped: torch.Tensor = F.center_crop(_resized(pixels, target, preprocessing), list(preprocessing.size))
    return cropped


def _pixels(image: np.ndarray) -> torch.Tensor:
    """uint8 [3, H, W] of uint8 [H, W, 3], in its memory: torchvision resizes interleaved channels twice as fast as planes, to the same bits."""
    return torch.from_numpy(np.require(image, requirements=("C", "W"))).permute(2, 0, 1)


def _resized(pixels: torch.Tensor, target: list[int], preprocessing: Preprocessing) -> torch.Tensor:
    resized: torch.Tensor = F.resize(pixels, target, interpolation=_INTERPOLATION[preprocessing.interpolation], antialias=True)
    return resized


def _target(height: int, width: int, preprocessing: Preprocessing, fit: Fit) -> list[int]:
    """Height and width to resize to before the centre crop."""
    if fit == "resize":
        return list(preprocessing.size)
    shorter = preprocessing.resize
    scaled = _scaled(height, width, shorter)
    while scaled[0] < preprocessing.size[0] or scaled[1] < preprocessing.size[1]:
        # an oblong input can need more than `resize` of the shorter side: enlarge rather than pad the crop with black
        ratio = max(preprocessing.size[0] / scaled[0], preprocessing.size[1] / scaled[1])
        shorter = max(shorter + 1, int(shorter * ratio))
        scaled = _scaled(height, width, shorter)
    return scaled


def _scaled(height: int, width: int, shorter: int) -> list[int]:
    """The shorter side at `shorter`, the longer one truncated to whole pixels, as torchvision and Pillow's users do."""
    if height <= width:
        return [shorter, max(shorter, int(shorter * width / height))]
    return [max(shorter, int(shorter * height / width)), shorter]


# --- pictures of extreme aspect: the crop of what resizing all of them would give, from the pixels that it needs ---------


def _long_axis(target: list[int], preprocessing: Preprocessing) -> int | None:
    """The axis (0 height, 1 width) along which resizing the whole picture would cost far more than its crop is worth."""
    return next((axis for axis in (0, 1) if target[axis] > LONGEST * preprocessing.size[axis]), None)


def _cropped_wide(image: np.ndarray, target: list[int], preprocessing: Preprocessing) -> torch.Tensor:
    height, width = preprocessing.size
    spans = _spans(image.shape[1], target[1], width, preprocessing.interpolation)
    pixels = _pixels(_weighted(image, spans).transpose(1, 0, 2))
    cropped: torch.Tensor = F.center_crop(_resized(pixels, [target[0], width], preprocessing), [height, width])
    return cropped


def _cropped_tall(image: np.ndarray, target: list[int], preprocessing: Preprocessing) -> torch.Tensor:
    height, width = preprocessing.size
    spans = _spans(image.shape[0], target[0], height, preprocessing.interpolation)
    first, last = spans[0][0], spans[-1][0] + len(spans[-1][1])
    pixels = _resized(_pixels(image[first:last]), [last - first, target[1]], preprocessing)
    columns = F.center_crop(pixels, [last - first, width]).permute(2, 1, 0).numpy()
    return _pixels(_weighted(columns, [(start - first, weights) for start, weights in spans]))


def _spans(size: int, target: int, crop: int, interpolation: str) -> _Spans:
    """Of the central `crop` pixels of a side of `size` pixels resized to `target`: the weights of Pillow's antialiased kernels."""
    scale = size / target
    width = max(scale, 1.0)
    reach = (2.0 if interpolation == "bicubic" else 1.0) * width
    spans = []
    for place in _centre(target, crop):
        centre = (place + 0.5) * scale
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), size)
        weights = _kernel(np.abs(np.arange(first, last) - centre + 0.5) / width, interpolation)
        spans.append((first, np.floor(weights / weights.sum() * 2**_WEIGHT_BITS + 0.5).astype(np.int64)))
    return spans


def _kernel(distance: np.ndarray, interpolation: str) -> np.ndarray:
    """Weights at distances in pixels: Keys's cubic with a = -1/2, or a triangle."""
    if interpolation == "bilinear":
        triangle: np.ndarray = np.maximum(1.0 - distance, 0.0)
        return triangle
    near = (1.5 * distance - 2.5) * distance**2 + 1.0
    far = ((2.5 - 0.5 * distance) * distance - 4.0) * distance + 2.0
    weights: np.ndarray = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights


def _weighted(image: np.ndarray, spans: _Spans) -> np.ndarray:
    """uint8 [n, H, 3]: the n weighted means of the columns of uint8 [H, W, 3], rounded."""
    means = np.empty((len(spans), image.shape[0], 3), np.uint8)
    for place, (first, weights) in enumerate(spans):
        total = np.einsum("hwc,w->hc", image[:, first : first + len(weights)].astype(np.int64), weights)
        means[place] = np.clip((total + 2 ** (_WEIGHT_BITS - 1)) >> _WEIGHT_BITS, 0, 255)
    return means


def _centre(target: int, crop: int) -> range:
    """The pixels of a side of `target` pixels that a centre crop keeps, as torchvision counts."""
    start = round((target - crop) / 2)
    return range(start, start + crop)


def _nearest(size: int, target: int, crop: int) -> np.ndarray:
    """int64 [crop]: the source pixels of the central `crop` pixels of a side of `size` pixels resized to `target`, in torch's single precision."""
    places = np.arange(_centre(target, crop).start, _centre(target, crop).stop, dtype=np.float32)
    nearest: np.ndarray = np.minimum(np.floor((places + np.float32(0.5)) * np.float32(size / target)).astype(np.int64), size - 1)
    return nearest
