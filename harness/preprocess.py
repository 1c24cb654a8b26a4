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
_EXACT_IN_FLOAT32 = 2**24  # nearest-neighbour resizing of wide integers passes through float32


def prepare(image: np.ndarray, preprocessing: Preprocessing, fit: Fit) -> torch.Tensor:
    """float32 [3, h, w], normalised, from `image`, uint8 [H, W, 3] RGB.

    `crop` resizes the shorter side to `preprocessing.resize`, keeping the aspect, and crops the centre; `resize` resizes straight to the input size.
    Resizing is antialiased, on 8-bit values, as Pillow does it. Raises ValueError where `image` is not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected an image of dtype uint8 and shape [H, W, 3], got {image.dtype} {list(image.shape)}")
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    target = _target(image.shape[0], image.shape[1], preprocessing, fit)
    pixels = F.resize(pixels, target, interpolation=_INTERPOLATION[preprocessing.interpolation], antialias=True)
    pixels = F.center_crop(pixels, list(preprocessing.size))
    scaled = F.to_dtype(pixels, torch.float32, scale=True)
    normalised: torch.Tensor = F.normalize(scaled, list(preprocessing.mean), list(preprocessing.std))
    return normalised


def prepare_mask(mask: np.ndarray, preprocessing: Preprocessing, fit: Fit) -> np.ndarray:
    """The label map [h, w] that lies on what `prepare` makes of the image that `mask`, integers [H, W], is aligned with.

    The geometry is the image's; values are those of the nearest pixel, never mixed. The dtype is kept.
    Raises ValueError where `mask` is not a two-dimensional array of integers below 2^24.
    """
    if mask.ndim != 2 or mask.dtype.kind not in "iub" or 0 in mask.shape or int(mask.max()) >= _EXACT_IN_FLOAT32:
        raise ValueError(f"expected a mask of integers below {_EXACT_IN_FLOAT32} and shape [H, W], got {mask.dtype} {list(mask.shape)}")
    labels = torch.from_numpy(mask.astype(np.int32))[None]
    target = _target(mask.shape[0], mask.shape[1], preprocessing, fit)
    labels = F.resize(labels, target, interpolation=InterpolationMode.NEAREST_EXACT)
    labels = F.center_crop(labels, list(preprocessing.size))
    cropped: np.ndarray = labels[0].numpy().astype(mask.dtype)
    return cropped


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
