"""Label maps on a patch grid, stored sparsely: most patches show one class, so a dense [N, h, w, C] table would be nearly all zeros.

Shape legend: N images, H W mask pixels, h w patch grid, T = h w tokens of an image, B images of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from harness.data.augment import counted

PatchTarget = Literal["soft", "majority"]


def patch_of_pixel(height: int, width: int, grid: tuple[int, int]) -> np.ndarray:
    """int64 [H, W]: the index of the patch, in row-major order, that contains each pixel's centre."""
    rows = (np.arange(height) * 2 + 1) * grid[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * grid[1] // (2 * width)
    return rows[:, None] * grid[1] + columns[None, :]


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchLabels:
    """Per image, the class shares of each patch's pixels; ignored pixels have no class, so shares may sum to less than 1."""

    tokens: Sequence[torch.Tensor]
    """Per image int64 [cells]."""
    classes: Sequence[torch.Tensor]
    """Per image int64 [cells]."""
    shares: Sequence[torch.Tensor]
    """Per image float32 [cells], in (0, 1]."""
    grid_size: int

    @classmethod
    def of(cls, masks: np.ndarray, grid: tuple[int, int], classes: int, ignored: Sequence[int], target: PatchTarget) -> PatchLabels:
        """From label maps [N, H, W] with values below `classes` or in `ignored`."""
        patch, size = patch_of_pixel(masks.shape[1], masks.shape[2], grid), grid[0] * grid[1]
        pixels = np.bincount(patch.ravel(), minlength=size)
        cells = [_cells(mask, patch, size, classes, ignored, target) for mask in masks]
        return cls(
            tokens=[torch.from_numpy(token) for token, _, _ in cells],
            classes=[torch.from_numpy(label) for _, label, _ in cells],
            shares=[torch.from_numpy((count / pixels[token]).astype(np.float32)) for token, _, count in cells],
            grid_size=size,
        )

    def batch(self, images: torch.Tensor, classes: int) -> torch.Tensor:
        """float32 [C, B T] targets of the chosen images [B]."""
        chosen = images.tolist()
        target = torch.zeros(classes, len(chosen) * self.grid_size)
        columns = torch.cat([self.tokens[image] + place * self.grid_size for place, image in enumerate(chosen)])
        target[torch.cat([self.classes[image] for image in chosen]), columns] = torch.cat([self.shares[image] for image in chosen])
        return target


def _cells(
    mask: np.ndarray, patch: np.ndarray, size: int, classes: int, ignored: Sequence[int], target: PatchTarget
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token, class and number of pixels of every (token, class) pair that occurs."""
    labelled = counted(mask, ignored)
    counts = np.bincount(patch[labelled] * classes + mask[labelled], minlength=size * classes).reshape(size, classes)
    if target == "majority":
        # the lowest of equal classes takes the whole labelled share
        counts = np.where(np.arange(classes) == counts.argmax(axis=1)[:, None], counts.sum(axis=1, keepdims=True), 0)
    token, label = np.nonzero(counts)
    return token, label, counts[token, label]
