"""Tokens that keep their content and get a wrong position: DILEMMA trains encoders to detect them, and here frozen encoders are probed for it.

Sameni et al., DILEMMA, AAAI 2023 (arXiv 2204.04788). A random subset of each image's tokens is kept, and every kept token gets the
position embedding of a dropped token with probability theta.

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
    """Keeps `kept_share` of an image's tokens (rounded down, at least one) and misplaces each of them with probability `theta`.

    Wrong positions are those of dropped tokens, none twice. Where more tokens are wrong than were dropped, which takes a share above one half, all
    dropped positions are used, and the rest are those of wrong tokens, exchanged so that none keeps its own. A single wrong token of an image
    without dropped tokens has no wrong position to go to: it stays in its place, marked as neither wrong nor right.

    For one seed and key, cells kept at one share are also kept at a larger one, and cells that are wrong at one theta are wrong at a larger one.
    Raises RequestError for a parameter out of range.
    """

    kept_share: float
    """Of the cells of the encoder's grid, in (0, 1]."""
    theta: float
    """Probability in [0, 1] per token."""
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

        With theta 0 no positions are given, and with nothing dropped no cells are named, so that the encoder runs as without either.
        """
        cells = grid[0] * grid[1]
        count = kept_count(self.kept_share, cells)
        generator = draw(self.seed, 0, key)
        order, chance = generator.permutation(cells), generator.random(cells)
        chosen = np.sort(order[:count])
        wrong = chance[chosen] < self.theta
        positions = _misplace(chosen, wrong, order[count:], generator)
        return Altered(
            image=image,
            keep=torch.from_numpy(chosen) if count < cells else None,
            positions=torch.from_numpy(positions) if self.theta > 0 else None,
            marks={MARK: np.where(wrong & (positions == chosen), UNMARKED, wrong).astype(np.uint8)[None]},
        )


def _misplace(chosen: np.ndarray, wrong: np.ndarray, dropped: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """int64 [n]: the `chosen` cells [n] with others in place of those that are `wrong`, bool [n]; `dropped` [g - n] in random order."""
    displaced = chosen[wrong]
    if not len(displaced) or (len(displaced) == 1 and not len(dropped)):
        return chosen
    exchanged = generator.permutation(displaced)[: max(0, len(displaced) - len(dropped))]
    others = generator.permutation(np.concatenate([dropped[: len(displaced)], exchanged]))
    while (others == displaced).any():  # at least one order in three leaves no token in its own place
        others = generator.permutation(others)
    positions = chosen.copy()
    positions[wrong] = others
    return positions
