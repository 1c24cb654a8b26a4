"""Tokens whose content stays and whose position is a wrong one: what DILEMMA trains encoders to detect, asked here of frozen ones.

Sameni et al., DILEMMA, AAAI 2023 (arXiv 2204.04788). Of each image a random subset of the tokens is kept, and each kept one is given the position
embedding of a dropped one with probability theta.

Shape legend: g = h w cells of the encoder's grid, row-major; n cells kept, m of them wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from harness.core import UNMARKED, Altered, EncoderInfo
from harness.data.augment import draw
from harness.data.views.dropped_tokens import check_share, kept_count, refuses_choice
from harness.errors import RequestError

MARK = "misplaced"


@dataclass(frozen=True, kw_only=True)
class MisplacedTokens:
    """Keeps `kept_share` of an image's tokens (rounded down, one at least), and misplaces each of them with probability `theta`.

    Wrong positions are those of dropped tokens, none twice. Where more tokens are wrong than were dropped, which takes a share above one half, all
    the dropped positions are given, and the rest are those of wrong tokens, exchanged so that none keeps its own. A single wrong token of an image
    of which nothing was dropped has no wrong position to go to: it is left in its place, and marked as neither wrong nor right.

    For one seed and key, what is kept at a share is kept at a larger one, and a cell that is wrong at a theta is wrong at a larger one.
    Raises RequestError where a parameter cannot be.
    """

    kept_share: float
    """Of the cells of the encoder's grid, in (0, 1]."""
    theta: float
    """Probability in [0, 1], each token's own."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("misplaced tokens", self.kept_share)
        if not 0 <= self.theta <= 1:
            raise RequestError(f"misplaced tokens: expected a theta from 0 to 1, got {self.theta:g}; 0.2 misplaces every fifth token")

    @property
    def identity(self) -> str:
        alone = ",alone=unmarked" if self.kept_share == 1 else ""  # where nothing is dropped, earlier banks mark it as right
        return f"misplaced_tokens(kept_share={self.kept_share!r},theta={self.theta!r},seed={self.seed}{alone})"

    def refuses(self, info: EncoderInfo) -> str | None:
        """Encoders without absolute positions have none that could be wrong."""
        return refuses_choice(info, "misplaced")

    def __call__(self, image: torch.Tensor, grid: tuple[int, int], key: str) -> Altered:
        """The image as it is; the cells kept, the positions given to them, and `misplaced`, uint8 [1, n]: 1 where the position is a wrong one, 0
        where it is right, UNMARKED where a wrong token had no other place to go to.

        With theta 0 no positions are given, and with nothing dropped no cells are named, so that the encoder does what it does without either.
        """
        cells = grid[0] * grid[1]
        count = kept_count(self.kept_share, cells)
        generator = draw(self.seed, 0, key)
        order, chance = generator.permutation(cells), generator.random(cells)
        kept = np.sort(order[:count])
        wrong = chance[kept] < self.theta
        positions = _misplace(kept, wrong, order[count:], generator)
        return Altered(
            image=image,
            keep=torch.from_numpy(kept) if count < cells else None,
            positions=torch.from_numpy(positions) if self.theta > 0 else None,
            marks={MARK: np.where(wrong & (positions == kept), UNMARKED, wrong).astype(np.uint8)[None]},
        )


def _misplace(kept: np.ndarray, wrong: np.ndarray, dropped: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """int64 [n]: the cells kept [n] with others in place of those that are `wrong`, bool [n]; `dropped` [g - n] in random order."""
    own = kept[wrong]
    if not len(own) or (len(own) == 1 and not len(dropped)):
        return kept
    exchanged = generator.permutation(own)[: max(0, len(own) - len(dropped))]
    others = generator.permutation(np.concatenate([dropped[: len(own)], exchanged]))
    while (others == own).any():  # at least one order in three leaves no token in its own place
        others = generator.permutation(others)
    positions = kept.copy()
    positions[wrong] = others
    return positions
