"""Tokens that an encoder never sees: dropped before its first block, or, where it cannot drop tokens, painted grey in the image.

Which tokens stay follows the occlusion studies of transformers (Naseer et al., Intriguing Properties of Vision Transformers, NeurIPS 2021,
arXiv 2105.10497: random patches, salient and other ones). No other network decides here what is salient: `centre` hides the place where
photographs usually have their object, `block` one region anywhere.

Shape legend: g = h w cells of the encoder's grid, row-major; n cells kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from harness.core import Altered, EncoderInfo
from harness.data.augment import draw
from harness.errors import RequestError

Mode = Literal["random", "centre", "block"]
How = Literal["drop", "grey"]
_ROUNDING = 1e-9


def kept_count(share: float, cells: int) -> int:
    """`share` of `cells`, rounded down, at least one: at a share of one half no more are kept than are dropped."""
    return max(1, math.floor(share * cells + _ROUNDING))


def check_share(name: str, share: float) -> None:
    """Raise RequestError unless 0 < share <= 1."""
    if not 0 < share <= 1:
        raise RequestError(f"{name}: expected a kept_share above 0 and at most 1, got {share:g}; 0.25 keeps every fourth token")


def refuses_choice(info: EncoderInfo, verb: str) -> str | None:
    """Why this encoder cannot have its tokens `verb` (dropped, misplaced), or None where it can."""
    if info.chooses_tokens:
        return None
    if info.positions == "absolute":
        return f"{info.architecture} does not take a choice of its tokens: they cannot be {verb}"
    has = "no position embeddings" if info.positions == "none" else f"{info.positions} positions"
    return f"{info.architecture} has {has}: tokens can be {verb} where each is given an absolute position"


@dataclass(frozen=True, kw_only=True)
class DroppedTokens:
    """Keeps `kept_share` of an image's cells (rounded down, at least one); the others are dropped, or painted grey.

    Raises RequestError for a parameter out of range.
    """

    kept_share: float
    """Of the cells of the encoder's grid, in (0, 1]; 1 leaves the image as it is."""
    mode: Mode = "random"
    """Which cells go.

    random: any; cells kept at a smaller share are also kept at a larger one. centre: those nearest the image's centre, with distances in units of
    its sides and ties in row-major order; the same for every image. block: one rectangle of the image's proportions, to rounding, at a random place;
    where the number of cells is not a multiple of its width, its last row is shorter."""
    how: How = "drop"
    """drop: the tokens do not enter the encoder. grey: all do, and the pixels of the cells that go take the mean that the encoder's input is
    normalised by (0 after normalisation)."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("dropped tokens", self.kept_share)
        for name, value, choices in (("mode", self.mode, get_args(Mode)), ("how", self.how, get_args(How))):
            if value not in choices:
                raise RequestError(f"dropped tokens: expected {name} to be one of {', '.join(choices)}, got {value!r}; correct it in the protocol")

    @property
    def identity(self) -> str:
        seed = "" if self.mode == "centre" else f",seed={self.seed}"
        return f"dropped_tokens(kept_share={self.kept_share!r},mode={self.mode},how={self.how}{seed})"

    def refuses(self, info: EncoderInfo) -> str | None:
        """Encoders without absolute positions cannot drop tokens, however many; any can see grey."""
        return None if self.how == "grey" else refuses_choice(info, "dropped")

    def kept_cells(self, grid: tuple[int, int], key: str) -> np.ndarray:
        """int64 [n], ascending: the cells that stay; a function of the arguments alone."""
        cells = grid[0] * grid[1]
        count = kept_count(self.kept_share, cells)
        if self.mode == "random":
            return np.sort(draw(self.seed, 0, key).permutation(cells)[:count])
        gone = _central(grid, cells - count) if self.mode == "centre" else _block(grid, cells - count, draw(self.seed, 0, key))
        return np.setdiff1d(np.arange(cells), gone)

    def __call__(self, image: torch.Tensor, grid: tuple[int, int], key: str) -> Altered:
        """The image with its kept cells named, or with the others grey; see harness.core.Alteration."""
        cells = self.kept_cells(grid, key)
        if len(cells) == grid[0] * grid[1]:
            return Altered(image=image)
        if self.how == "drop":
            return Altered(image=image, keep=torch.from_numpy(cells))
        return Altered(image=torch.where(_pixels_of(cells, grid, image.shape[1:]), image, torch.zeros_like(image)))


def _central(grid: tuple[int, int], count: int) -> np.ndarray:
    """The `count` cells whose centres are nearest the image's."""
    down, right = ((np.arange(side) + 0.5) / side - 0.5 for side in grid)
    # rounded, so that cells that mirror each other are equally far to the bit
    distance = np.round(down[:, None] ** 2 + right[None, :] ** 2, 12)
    return np.argsort(distance.ravel(), kind="stable")[:count]


def _block(grid: tuple[int, int], count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` cells in one rectangle, row by row."""
    height, width = grid
    columns = min(width, max(1, math.ceil(width * math.sqrt(count / (height * width)) - _ROUNDING)))
    rows = -(-count // columns)
    top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
    within = np.arange(count)
    cells: np.ndarray = (top + within // columns) * width + left + within % columns
    return cells


def _pixels_of(cells: np.ndarray, grid: tuple[int, int], size: torch.Size) -> torch.Tensor:
    """bool [H, W]: the pixels that lie in one of `cells`."""
    chosen = np.zeros(grid, dtype=bool)
    chosen.reshape(-1)[cells] = True
    rows, columns = (np.arange(pixels) * count // pixels for pixels, count in zip(size, grid, strict=True))
    return torch.from_numpy(chosen[rows[:, None], columns[None, :]])
