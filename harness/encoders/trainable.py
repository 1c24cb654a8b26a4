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
from harness.encoders.vit import VitEncoder
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
        self.trunk: nn.Module = self._encoder.unfreeze()

    def __call__(self, images: torch.Tensor, *, blocks: Sequence[int] = ()) -> Tokens:
        """Tokens of `images`, float [B, 3, H, W], already normalised, as `Encoder.encode` gives them."""
        return self._encoder.differentiable(images, tuple(blocks))
