"""What training on a stream needs of its surroundings, and what a kind of probe must offer: plain torch.

Shape legend: B images, H W pixels, K heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from harness.core import Encoder, Predictions, Sample, Tokens
from harness.device import Compute
from harness.errors import ProbeError

State = Mapping[str, torch.Tensor]
Proposal = tuple[str, float | None]
"""Readout and learning rate of one head."""
E = TypeVar("E")


class Network:
    """A frozen encoder on its device, fed in batches of one size, padded, so that an image's tokens do not depend on its batch."""

    def __init__(self, encoder: Encoder, compute: Compute, batch_size: int) -> None:
        self.info = encoder.info
        self.device = compute.device
        self.batch_size = batch_size
        self.seconds = 0.0
        self.images = 0
        self.encoder, self.compute = encoder, compute

    def __call__(
        self, images: torch.Tensor, pick: Callable[[Tokens], Sequence[torch.Tensor]], *, blocks: Sequence[int] = (), projection: bool = False
    ) -> list[torch.Tensor]:
        """What `pick` takes of the tokens of images [B, 3, H, W], float32 [B, ...] each, on the device."""
        start = time.perf_counter()
        parts = []
        for first in range(0, len(images), self.batch_size):
            batch = images[first : first + self.batch_size]
            padding = batch[:1].expand(self.batch_size - len(batch), -1, -1, -1)
            with torch.inference_mode(), self.compute.autocast():
                tokens = self.encoder.encode(torch.cat([batch, padding]).to(self.device), blocks=blocks, projection=projection)
                found = [values[: len(batch)].float() for values in pick(tokens)]
            parts.append([values.clone() for values in found])  # what inference mode made cannot take part in training
        self.count(len(images), time.perf_counter() - start)
        return [torch.cat(one) for one in zip(*parts, strict=True)]

    def count(self, images: int, seconds: float) -> None:
        """Note what a pass took."""
        self.images += images
        self.seconds += seconds


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a kind of probe is trained and scored under."""

    network: Network
    protocol: Mapping[str, Any]
    classes: int
    seed: int
    scored_classes: int = 0
    """Of the samples that are scored, where they are of another data set than the heads; 0 where they are of the same one."""


class Trainer(Protocol[E]):
    """K heads in training. `E` is what becomes of a sample; its `shown` are the labels that are trained on with it."""

    batch_size: int
    epochs: int | None
    """None where the protocol counts iterations."""

    def steps(self, per_epoch: int) -> int:
        """Steps in all, at so many an epoch."""

    def draw(self, sample: Sample, generator: np.random.Generator) -> E:
        """The training view. Raises ShardError where the sample has not what the task needs."""

    def step(self, batch: Sequence[E], step: int, steps: int) -> None: ...

    def state(self) -> list[dict[str, torch.Tensor]]:
        """Everything that the next step depends on, one a head."""

    def load(self, states: Sequence[State]) -> None: ...

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        """What a head is scored from, one a head."""


class Scorer(Protocol[E]):
    """K fitted heads."""

    def view(self, sample: Sample) -> E:
        """The deterministic view. Raises ShardError where the sample has not what the task needs."""

    def inputs(self, example: E) -> int:
        """Images that the encoder sees for it."""

    def predict(self, keys: Sequence[str], batch: Sequence[E]) -> list[Predictions | ProbeError]:
        """One a head."""


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[E]):
    """A probe that can be streamed."""

    trainer: Callable[[Setting, Sequence[Proposal]], Trainer[E]]
    scorer: Callable[[Setting, Sequence[tuple[str, State]]], Scorer[E]]
    """From (readout, what `fitted` gave) of each head."""
    together: Callable[[Setting], int] = lambda setting: setting.network.batch_size
    """Inputs of the encoder that a scorer is given at once, where there are so many left."""
