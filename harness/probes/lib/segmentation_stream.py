"""Linear segmentation on a stream.

Shape legend: B images, C classes, D features, h w token grid, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from harness.core import Predictions, Proposal, Sample, State, StreamSetting, Tokens
from harness.data.augment import IGNORED, Scene, SceneAugmentation, as_pixels, fitting, labelled, normalised, padded, resized
from harness.errors import ProbeError, ShardError
from harness.probes.fields import learning_rates
from harness.probes.segmentation import NAME, SegmentationFields, SegmentationHead, block_indices, confusion, slide, warmed_up, windows


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """A training crop and its labels."""

    image: torch.Tensor
    """float32 [3, crop, crop]."""
    labels: torch.Tensor
    """int32 [crop, crop]."""

    @property
    def shown(self) -> list[int]:
        """The labels that a training step on it uses."""
        labels: list[int] = torch.bincount(self.labels[self.labels != IGNORED]).nonzero()[:, 0].tolist()
        return labels


@dataclass(frozen=True, kw_only=True, eq=False)
class Windowed:
    """An image cut into windows, and its labels at their own resolution."""

    windows: torch.Tensor
    """float32 [windows, 3, crop, crop]."""
    places: list[tuple[int, int]]
    """(top, left) of each window."""
    size: tuple[int, int]
    """Height and width of the rescaled image."""
    labels: torch.Tensor
    """int32 [H, W]."""
    group: str


class _TokenMaps:
    """Computes token maps of images, and reads the label map that the protocol names."""

    def __init__(self, setting: StreamSetting[SegmentationFields]) -> None:
        self.fields = setting.protocol
        self._setting, self._mask = setting, setting.protocol.mask
        self._blocks = block_indices(self.fields, setting.encoder.info)

    def scene(self, sample: Sample) -> Scene:
        mask = sample.object_mask if self._mask == "object" else sample.part_mask
        if mask is None:
            raise ShardError(f"no {self._mask} label map")
        try:
            labels = labelled(mask, self._setting.classes, self.fields.ignore_label)
        except ValueError as error:
            raise ShardError(str(error)) from None
        return Scene(pixels=as_pixels(sample.image), labels=labels)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, D, h, w] of images [B, 3, H, W]: the final tokens, or those of the chosen blocks, concatenated over D."""
        (features,) = self._setting.encoder(images, lambda tokens: [self._block_maps(tokens)], blocks=tuple(sorted(set(self._blocks))))
        return features

    def _block_maps(self, tokens: Tokens) -> torch.Tensor:
        maps = [tokens.blocks[block].patches for block in self._blocks] or [tokens.patches]
        maps = [token_map.permute(0, 3, 1, 2).float() for token_map in maps]
        size = max(tuple(token_map.shape[2:]) for token_map in maps)
        # stages of a convolutional encoder differ in size: they are resized to the finest of the chosen ones
        resized_maps = [
            token_map if tuple(token_map.shape[2:]) == size else interpolate(token_map, size=size, mode="bilinear", align_corners=False)
            for token_map in maps
        ]
        return torch.cat(resized_maps, dim=1)


class SegmentationTrainer:
    """Trains 1x1 convolutions on augmented crops."""

    def __init__(self, setting: StreamSetting[SegmentationFields], proposals: Sequence[Proposal]) -> None:
        self._setting, self._token_maps = setting, _TokenMaps(setting)
        self._fields = fields = self._token_maps.fields
        self._rates = learning_rates(NAME, [rate for _, rate in proposals])
        plain: dict[str, Any] = {} if fields.augment else {"ratio": (1.0, 1.0), "max_share": 1.0, "flip": 0.0, "photometric": False}
        self._augment = SceneAugmentation(scale=fields.train_scale, crop=fields.crop, **plain)
        self._heads: list[SegmentationHead] = []
        self.batch_size = fields.batch_size
        self.epochs: int | None = None

    def steps(self, per_epoch: int) -> int:
        return self._fields.iterations

    def draw(self, sample: Sample, generator: np.random.Generator) -> Labelled:
        """A random crop of the randomly scaled image."""
        image, labels = self._augment(self._token_maps.scene(sample), self._setting.encoder.info.preprocessing, generator)
        return Labelled(image=image, labels=labels)

    def step(self, batch: Sequence[Labelled], step: int, steps: int) -> None:
        """One step of every head."""
        features = self._token_maps(torch.stack([crop.image for crop in batch]))
        self._start(features.shape[1])
        labels = torch.stack([crop.labels for crop in batch]).to(features.device, torch.int64)
        for head in self._heads:
            head.step(features, labels, warmed_up(step, steps, self._fields.warmup_steps))

    def state(self) -> list[dict[str, torch.Tensor]]:
        return [head.state() for head in self._heads]

    def load(self, states: Sequence[State]) -> None:
        self._start(states[0]["weight"].shape[1])
        for head, state in zip(self._heads, states, strict=True):
            head.load(state)

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        return [
            {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu(), "lr": torch.tensor(head.lr, dtype=torch.float64)}
            for head in self._heads
        ]

    def _start(self, width: int) -> None:
        if self._heads:
            return
        generator = torch.Generator().manual_seed(self._setting.seed)
        first = torch.empty(self._setting.classes, width).normal_(0, self._fields.init_std, generator=generator)
        self._heads = [SegmentationHead(first.to(self._setting.encoder.device, copy=True), rate, self._fields) for rate in self._rates]


class SegmentationScorer:
    """Fitted 1x1 convolutions by a sliding window, at the label map's own resolution."""

    def __init__(self, setting: StreamSetting[SegmentationFields], heads: Sequence[tuple[str, State]]) -> None:
        self._setting, self._token_maps = setting, _TokenMaps(setting)
        self._heads = [{name: tensor.to(setting.encoder.device) for name, tensor in state.items()} for _, state in heads]

    def view(self, sample: Sample) -> Windowed:
        fields, scene = self._token_maps.fields, self._token_maps.scene(sample)
        size = fitting(scene.pixels.shape[1], scene.pixels.shape[2], fields.test_scale)
        image = padded(normalised(resized(scene.pixels, size), self._setting.encoder.info.preprocessing), fields.crop, 0.0)
        places = windows(image.shape[1], image.shape[2], fields.crop, fields.stride)
        cut = torch.stack([image[:, top : top + fields.crop, left : left + fields.crop] for top, left in places])
        return Windowed(windows=cut, places=places, size=size, labels=scene.labels, group=sample.group or sample.key)

    def inputs(self, example: Windowed) -> int:
        return len(example.places)

    def predict(self, keys: Sequence[str], batch: Sequence[Windowed]) -> list[Predictions | ProbeError]:
        features = self._token_maps(torch.cat([image.windows for image in batch]))
        image_features = torch.split(features, [len(image.places) for image in batch])
        return [self._cells(head, keys, batch, image_features) for head in self._heads]

    def _cells(self, head: State, keys: Sequence[str], batch: Sequence[Windowed], features: Sequence[torch.Tensor]) -> Predictions | ProbeError:
        """Confusion cells: one row per (image, true class, predicted class) that occurs, with its pixel count as the score."""
        if not (bool(head["weight"].isfinite().all()) and bool(head["bias"].isfinite().all())):
            rate = float(head["lr"])
            return ProbeError(f"{NAME} probe: expected finite weights, got NaN or infinity at learning rate {rate:g}; search below it")
        tables = torch.stack([self._confusion(head, windowed, maps) for windowed, maps in zip(batch, features, strict=True)]).cpu().numpy()
        image, target, predicted = np.nonzero(tables)
        places = image.tolist()
        return Predictions(
            keys=[keys[i] for i in places],
            groups=[batch[i].group for i in places],
            targets=target,
            predictions=predicted,
            scores=tables[image, target, predicted].astype(np.float64),
        )

    def _confusion(self, head: State, windowed: Windowed, features: torch.Tensor) -> torch.Tensor:
        fields = self._token_maps.fields
        height, width = (max(side, fields.crop) for side in windowed.size)
        logits = slide(features, head["weight"], head["bias"], windowed.places, (height, width), fields)[:, : windowed.size[0], : windowed.size[1]]
        logits = interpolate(logits[None], size=tuple(windowed.labels.shape), mode="bilinear", align_corners=False)[0]
        return confusion(logits.argmax(dim=0), windowed.labels.to(logits.device), self._setting.classes)
