"""A copy of an encoder that gradients pass through: the same tokens as its `encode`, from weights that may be trained.

Encoders themselves are frozen: `encode` runs in inference mode. The encoder itself stays unchanged.
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

    Absolute positions keep the grid that they were made for and are resized in every pass; networks whose sizes are built in (window attention,
    relative position tables) are resized once, to the size of the encoder's preprocessing, and take no other.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Raises EncoderError where the encoder is of an unsupported type."""
        if not isinstance(encoder, VitEncoder | MapEncoder):
            raise EncoderError(f"encoder {encoder.info.name}: cannot be trained: expected a network of timm's making, got {type(encoder).__name__}")
        self._encoder = copy.deepcopy(encoder)
        self.info = encoder.info
        self._resize()
        self.trunk: nn.Module = self._encoder._network.trunk
        self.trunk.requires_grad_(True)

    def __call__(self, images: torch.Tensor, *, blocks: Sequence[int] = ()) -> Tokens:
        """Tokens of `images`, float [B, 3, H, W], already normalised, as `Encoder.encode` gives them."""
        encoder = self._encoder
        if isinstance(encoder, VitEncoder):
            encoder._position_cache.clear()  # its entries were made from positions that training has changed since
            return encoder._encode(images, tuple(blocks), False, None, None)
        with encoder._precision(images.device.type):
            cls, final, stages = encoder._run(images, tuple(blocks))
            return Tokens(cls=cls, patches=final, blocks={block: Tokens(cls=None, patches=stage) for block, stage in stages.items()})

    def _resize(self) -> None:
        """Replace a network whose size is built in by a copy resized to the input size."""
        encoder, size = self._encoder, self.info.preprocessing.size
        if isinstance(encoder, VitEncoder) and encoder._stepped and encoder._positions != "relative":
            return
        trunk = encoder._copies.at(encoder._network.trunk, size)
        encoder._copies = SizedCopies(self.info.name, size)
        if trunk is encoder._network.trunk:
            return
        encoder._network.trunk = trunk
        if isinstance(encoder, VitEncoder):
            encoder._norm, _ = _final_norm(trunk)
