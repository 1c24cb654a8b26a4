"""The encoder for a stream of images.

Shape legend: B images, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from harness.core import Encoder, Tokens
from harness.features.device import Compute


class PaddedEncoder:
    """An encoder on its device, with padded batches of one size, so that an image's tokens do not depend on its batch."""

    def __init__(self, encoder: Encoder, compute: Compute, batch_size: int) -> None:
        self.info = encoder.info
        self.device = compute.device
        self.batch_size = batch_size
        self.seconds = 0.0
        self.images = 0
        self.precision: str = compute.precision
        self.encoder, self._compute = encoder, compute

    def __call__(
        self, images: torch.Tensor, pick: Callable[[Tokens], Sequence[torch.Tensor]], *, blocks: Sequence[int] = (), projection: bool = False
    ) -> list[torch.Tensor]:
        """The tensors that `pick` selects from the tokens of images [B, 3, H, W], float32 [B, ...], on the device."""
        start = time.perf_counter()
        parts = []
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            padding = batch[:1].expand(self.batch_size - len(batch), -1, -1, -1)
            with torch.inference_mode(), self._compute.autocast():
                tokens = self.encoder.encode(torch.cat([batch, padding]).to(self.device), blocks=blocks, projection=projection)
                picked = [values[: len(batch)].float() for values in pick(tokens)]
            parts.append([values.clone() for values in picked])  # tensors made in inference mode cannot take part in training
        self.count(len(images), time.perf_counter() - start)
        return [torch.cat(values) for values in zip(*parts, strict=True)]

    def count(self, images: int, seconds: float) -> None:
        """Add a pass to the images and seconds so far."""
        self.images += images
        self.seconds += seconds

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass."""
        return self._compute.autocast()
