"""A copy of an encoder that gradients pass through: the same tokens as its `encode`, from weights that may be trained.

Encoders themselves are frozen and say so: `encode` runs in inference mode. The copy leaves the encoder as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from harness.core import Encoder, Tokens
from harness.encoders.map import MapEncoder
from harness.encoders.resize import SizedCopies
from harness.encoders.vit import VitEncoder, _final_norm
from harness.errors import EncoderError


class TrainableEncoder:
    """`trunk` holds all parameters that the tokens depend on, requiring gradients; a pretraining head is left out.

    Absolute positions keep the grid that they were made for, and are resized within every pass; networks whose sizes are built in (window attention,
    relative position tables) are resized once, to the size of the encoder's preprocessing, and take no other.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Raises EncoderError where the encoder is of a kind that this does not know."""
        if not isinstance(encoder, VitEncoder | MapEncoder):
            raise EncoderError(f"encoder {encoder.info.name}: cannot be trained: expected a network of timm's making, got {type(encoder).__name__}")
        self._own = copy.deepcopy(encoder)
        self.info = encoder.info
        self._resize()
        self.trunk: nn.Module = self._own._network.trunk
        self.trunk.requires_grad_(True)

    def __call__(self, images: torch.Tensor, *, blocks: Sequence[int] = ()) -> Tokens:
        """Tokens of `images`, float [B, 3, H, W], already normalised, as `Encoder.encode` gives them."""
        own = self._own
        if isinstance(own, VitEncoder):
            own._position_cache.clear()  # it remembers what was made of positions that have moved since
            return own._encode(images, tuple(blocks), False, None, None)
        with own._precision(images.device.type):
            cls, final, stages = own._run(images, tuple(blocks))
            return Tokens(cls=cls, patches=final, blocks={block: Tokens(cls=None, patches=stage) for block, stage in stages.items()})

    def _resize(self) -> None:
        """Put a network resized to the input size in the place of one whose size is built in."""
        own, size = self._own, self.info.preprocessing.size
        if isinstance(own, VitEncoder) and own._stepped and own._positions != "relative":
            return
        trunk = own._copies.at(own._network.trunk, size)
        own._copies = SizedCopies(self.info.name, size)
        if trunk is own._network.trunk:
            return
        own._network.trunk = trunk
        if isinstance(own, VitEncoder):
            own._norm, _ = _final_norm(trunk)
