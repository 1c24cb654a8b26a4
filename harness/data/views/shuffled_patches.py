"""Images cut into cells and reassembled in another order: texture stays, shape goes.

The patch shuffle of Naseer et al., Intriguing Properties of Vision Transformers, NeurIPS 2021 (arXiv 2105.10497), and, for convolutional networks, of
Zhang and Zhu, Interpreting Adversarially Trained Convolutional Neural Networks, ICML 2019 (arXiv 1905.09797).

Shape legend: H W pixels, h w cells of a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.core import Altered, EncoderInfo
from harness.data.augment import draw
from harness.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ShuffledPatches:
    """Cuts the prepared image into cells of whole pixels and puts them in a random order, in which a cell may keep its place.

    Where the image's sides are not multiples of the grid's, the rows and columns of pixels that are left over, fewer than the grid has cells along
    that side, stay where they are, half of them on either side. Raises RequestError for a parameter out of range.
    """

    grid: int
    """Cells along each side; 1 leaves the image as it is. 0 is for the encoder's own grid, whose cells are its patches."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grid < 0:
            raise RequestError(f"shuffled patches: expected a grid of 1 or more cells a side, or 0 for the encoder's own, got {self.grid}; take 4")

    @property
    def identity(self) -> str:
        return f"shuffled_patches(grid={self.grid or 'tokens'},seed={self.seed})"

    def refuses(self, info: EncoderInfo) -> str | None:
        """Only where a cell would be smaller than a pixel."""
        height, width = info.preprocessing.size
        return f"an image of {height}x{width} pixels cannot be cut in {self.grid}x{self.grid} cells" if self.grid > min(height, width) else None

    def __call__(self, image: torch.Tensor, grid: tuple[int, int], key: str) -> Altered:
        """The image shuffled; all its tokens are encoded, in their places. See harness.core.Alteration."""
        h, w = (self.grid, self.grid) if self.grid else grid
        if h * w == 1:
            return Altered(image=image)
        order = torch.from_numpy(draw(self.seed, 0, key).permutation(h * w))
        height, width = image.shape[1] // h, image.shape[2] // w
        top, left = (image.shape[1] - h * height) // 2, (image.shape[2] - w * width) // 2
        within = (slice(None), slice(top, top + h * height), slice(left, left + w * width))
        cells = image[within].reshape(3, h, height, w, width).permute(1, 3, 0, 2, 4).flatten(0, 1)[order]
        shuffled = image.clone()
        shuffled[within] = cells.reshape(h, w, 3, height, width).permute(2, 0, 3, 1, 4).reshape(3, h * height, w * width)
        return Altered(image=shuffled)
