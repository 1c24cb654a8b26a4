"""What a stream of images does to a stack of heads: draw a training view, take a step, score a batch. Plain torch, one class a kind of probe.

Shape legend: B images, C classes, D features, h w token grid, H W pixels, K heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.functional import interpolate, one_hot

from harness.augment import CropAndFlip, Scene, SceneAugmentation, as_pixels, fitting, labelled, normalised, padded, resized
from harness.core import Encoder, Predictions, Rows, Sample, Tokens
from harness.device import Compute
from harness.errors import ProbeError, ShardError
from harness.preprocess import prepare
from harness.probes import linear
from harness.probes.augmented import AugmentedFields
from harness.probes.features import Normaliser
from harness.probes.fields import learning_rates
from harness.probes.linear import LinearFields
from harness.probes.schedule import cosine
from harness.probes.segmentation import NAME as SEGMENTATION
from harness.probes.segmentation import SegmentationFields, SegmentationHead, block_indices, confusion, slide, warmed_up, windows
from harness.probes.softmax import SoftmaxStack, restored
from harness.readouts import blocks_needed, parse_readout, read

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


class Trainer(Protocol[E]):
    """K heads in training. `E` is what becomes of a sample."""

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


# --- classification ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictured:
    """An image ready for the encoder, and its class."""

    image: torch.Tensor
    """float32 [3, h, w]."""
    target: int
    group: str


def label_of(sample: Sample, classes: int) -> int:
    """The sample's class. Raises ShardError where it has none of these."""
    if sample.label is None:
        raise ShardError("no label")
    if not 0 <= sample.label < classes:
        raise ShardError(f"label {sample.label} of {classes} classes")
    return sample.label


class _Pooled:
    """Rows of several readouts from one pass."""

    def __init__(self, network: Network, readouts: Sequence[str]) -> None:
        self._network, self._names = network, list(dict.fromkeys(readouts))
        self._readouts = [parse_readout(name) for name in self._names]

    def __call__(self, batch: Sequence[Pictured]) -> dict[str, torch.Tensor]:
        """Readout to float32 [B, D]."""
        info = self._network.info
        rows = self._network(
            torch.stack([one.image for one in batch]),
            lambda tokens: [read(tokens, readout, info) for readout in self._readouts],
            blocks=blocks_needed(self._readouts, info),
            projection=any(readout.pooling == "projection" for readout in self._readouts),
        )
        return dict(zip(self._names, rows, strict=True))


class LinearTrainer:
    """The linear probe's heads, for all readouts at once."""

    def __init__(self, setting: Setting, proposals: Sequence[Proposal]) -> None:
        self._fields = LinearFields.read(linear.NAME, setting.protocol)
        own = AugmentedFields.read(linear.NAME, setting.protocol)
        self._augment = CropAndFlip(scale=own.crop_scale, flip=own.flip) if own.augment == "crop-flip" else None
        self._normaliser = Normaliser(kind=own.feature_norm)
        self._setting = setting
        self._proposals = list(proposals)
        self._rates = learning_rates(linear.NAME, [rate for _, rate in proposals])
        self._rows = _Pooled(setting.network, [readout for readout, _ in proposals])
        self._heads: list[linear.Head] = []
        self.batch_size = self._fields.batch_size
        self.epochs: int | None = self._fields.epochs

    def steps(self, per_epoch: int) -> int:
        return self._fields.epochs * per_epoch

    def draw(self, sample: Sample, generator: np.random.Generator) -> Pictured:
        """A random crop, or the encoder's own view where the protocol says so."""
        target, preprocessing = label_of(sample, self._setting.classes), self._setting.network.info.preprocessing
        image = prepare(sample.image, preprocessing, "crop") if self._augment is None else self._augment(sample.image, preprocessing, generator)
        return Pictured(image=image, target=target, group=sample.group or sample.key)

    def step(self, batch: Sequence[Pictured], step: int, steps: int) -> None:
        """One step of every head."""
        rows, device = {name: self._normaliser(each) for name, each in self._rows(batch).items()}, self._setting.network.device
        self._start({name: each.shape[1] for name, each in rows.items()})
        onehot = one_hot(torch.tensor([one.target for one in batch]), self._setting.classes).T.to(device, torch.float32).contiguous()
        for head, (readout, _), rate in zip(self._heads, self._proposals, self._rates, strict=True):
            head.step(rows[readout], onehot, rate * cosine(step, steps))

    def state(self) -> list[dict[str, torch.Tensor]]:
        return [head.state() for head in self._heads]

    def load(self, states: Sequence[State]) -> None:
        self._start({readout: state["weight"].shape[1] for (readout, _), state in zip(self._proposals, states, strict=True)})
        for head, state in zip(self._heads, states, strict=True):
            head.load(state)

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        return [
            SoftmaxStack(
                probe=linear.NAME,
                knob=linear.KNOB,
                values=(rate,),
                weights=(head.weight_CD,),
                biases=(head.bias_C1[:, 0],),
                normaliser=self._normaliser,
            ).state(0)
            for head, rate in zip(self._heads, self._rates, strict=True)
        ]

    def _start(self, widths: Mapping[str, int]) -> None:
        """Make the heads, as the banked probe does for each readout."""
        if self._heads:
            return
        first = {
            readout: torch.empty(self._setting.classes, width).normal_(
                0, self._fields.init_std, generator=torch.Generator().manual_seed(self._setting.seed)
            )
            for readout, width in widths.items()
        }
        self._heads = [
            linear.Head(
                first[readout].to(self._setting.network.device, copy=True), momentum=self._fields.momentum, weight_decay=self._fields.weight_decay
            )
            for readout, _ in self._proposals
        ]


class LinearScorer:
    """Fitted softmax classifiers on the encoder's own resize and centre crop."""

    def __init__(self, setting: Setting, heads: Sequence[tuple[str, State]]) -> None:
        norm = AugmentedFields.read(linear.NAME, setting.protocol).feature_norm
        self._setting = setting
        self._rows = _Pooled(setting.network, [readout for readout, _ in heads])
        self._heads = [
            (
                readout,
                restored(state, probe=linear.NAME, knob=linear.KNOB, norm=norm, classes=setting.classes, device=setting.network.device),
            )
            for readout, state in heads
        ]

    def view(self, sample: Sample) -> Pictured:
        target = label_of(sample, self._setting.classes)
        image = prepare(sample.image, self._setting.network.info.preprocessing, "crop")
        return Pictured(image=image, target=target, group=sample.group or sample.key)

    def inputs(self, example: Pictured) -> int:
        return 1

    def predict(self, keys: Sequence[str], batch: Sequence[Pictured]) -> list[Predictions | ProbeError]:
        features = {name: each.cpu().numpy() for name, each in self._rows(batch).items()}
        targets = np.array([one.target for one in batch], np.int64)
        groups = [one.group for one in batch]
        found: list[Predictions | ProbeError] = []
        for readout, stack in self._heads:
            try:
                found.append(stack.predict(Rows(keys=keys, groups=groups, targets=targets, features=features[readout]), 0))
            except ProbeError as error:
                found.append(error)
        return found


# --- segmentation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """A training crop and its labels."""

    image: torch.Tensor
    """float32 [3, crop, crop]."""
    labels: torch.Tensor
    """int32 [crop, crop]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Windowed:
    """An image cut into windows, and its labels at their own resolution."""

    windows: torch.Tensor
    """float32 [windows, 3, crop, crop]."""
    places: list[tuple[int, int]]
    """(top, left) of each."""
    size: tuple[int, int]
    """Height and width of the rescaled image."""
    labels: torch.Tensor
    """int32 [H, W]."""
    group: str


class _Dense:
    """Token maps, and the label map that the protocol names."""

    def __init__(self, setting: Setting) -> None:
        self.fields = SegmentationFields.read(SEGMENTATION, setting.protocol)
        self._setting, self._mask = setting, setting.protocol["mask"]
        self._blocks = block_indices(self.fields, setting.network.info)

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
        """float32 [B, D, h, w] of images [B, 3, H, W]: the final tokens, or the chosen blocks' one after the other."""
        (features,) = self._setting.network(images, lambda tokens: [self._joined(tokens)], blocks=tuple(sorted(set(self._blocks))))
        return features

    def _joined(self, tokens: Tokens) -> torch.Tensor:
        maps = [tokens.blocks[block].patches for block in self._blocks] or [tokens.patches]
        maps = [one.permute(0, 3, 1, 2).float() for one in maps]
        size = max(tuple(one.shape[2:]) for one in maps)
        # stages of a convolutional encoder differ in size: they are brought to the finest of those chosen
        same = [one if tuple(one.shape[2:]) == size else interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps]
        return torch.cat(same, dim=1)


class SegmentationTrainer:
    """1x1 convolutions under augmented crops."""

    def __init__(self, setting: Setting, proposals: Sequence[Proposal]) -> None:
        self._setting, self._dense = setting, _Dense(setting)
        self._fields = fields = self._dense.fields
        self._rates = learning_rates(SEGMENTATION, [rate for _, rate in proposals])
        plain: dict[str, Any] = {} if fields.augment else {"ratio": (1.0, 1.0), "max_share": 1.0, "flip": 0.0, "photometric": False}
        self._augment = SceneAugmentation(scale=fields.train_scale, crop=fields.crop, **plain)
        self._heads: list[SegmentationHead] = []
        self.batch_size = fields.batch_size
        self.epochs: int | None = None

    def steps(self, per_epoch: int) -> int:
        return self._fields.iterations

    def draw(self, sample: Sample, generator: np.random.Generator) -> Labelled:
        """A random crop of the randomly scaled image."""
        image, labels = self._augment(self._dense.scene(sample), self._setting.network.info.preprocessing, generator)
        return Labelled(image=image, labels=labels)

    def step(self, batch: Sequence[Labelled], step: int, steps: int) -> None:
        """One step of every head."""
        features = self._dense(torch.stack([one.image for one in batch]))
        self._start(features.shape[1])
        labels = torch.stack([one.labels for one in batch]).to(features.device, torch.int64)
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
        self._heads = [SegmentationHead(first.to(self._setting.network.device, copy=True), rate, self._fields) for rate in self._rates]


class SegmentationScorer:
    """Fitted 1x1 convolutions by a sliding window, at the label map's own resolution."""

    def __init__(self, setting: Setting, heads: Sequence[tuple[str, State]]) -> None:
        self._setting, self._dense = setting, _Dense(setting)
        self._heads = [{name: tensor.to(setting.network.device) for name, tensor in state.items()} for _, state in heads]

    def view(self, sample: Sample) -> Windowed:
        fields, scene = self._dense.fields, self._dense.scene(sample)
        size = fitting(scene.pixels.shape[1], scene.pixels.shape[2], fields.test_scale)
        image = padded(normalised(resized(scene.pixels, size), self._setting.network.info.preprocessing), fields.crop, 0.0)
        places = windows(image.shape[1], image.shape[2], fields.crop, fields.stride)
        cut = torch.stack([image[:, top : top + fields.crop, left : left + fields.crop] for top, left in places])
        return Windowed(windows=cut, places=places, size=size, labels=scene.labels, group=sample.group or sample.key)

    def inputs(self, example: Windowed) -> int:
        return len(example.places)

    def predict(self, keys: Sequence[str], batch: Sequence[Windowed]) -> list[Predictions | ProbeError]:
        features = self._dense(torch.cat([one.windows for one in batch]))
        each = torch.split(features, [len(one.places) for one in batch])
        return [self._cells(head, keys, batch, each) for head in self._heads]

    def _cells(self, head: State, keys: Sequence[str], batch: Sequence[Windowed], features: Sequence[torch.Tensor]) -> Predictions | ProbeError:
        """Confusion cells: a row per (image, true class, predicted class) that occurs, with its pixels as the score."""
        if not (bool(head["weight"].isfinite().all()) and bool(head["bias"].isfinite().all())):
            rate = float(head["lr"])
            return ProbeError(f"{SEGMENTATION} probe: expected finite weights, got NaN or infinity at learning rate {rate:g}; search below it")
        tables = torch.stack([self._confusion(head, one, maps) for one, maps in zip(batch, features, strict=True)]).cpu().numpy()
        image, target, predicted = np.nonzero(tables)
        places = image.tolist()
        return Predictions(
            keys=[keys[i] for i in places],
            groups=[batch[i].group for i in places],
            targets=target,
            predictions=predicted,
            scores=tables[image, target, predicted].astype(np.float64),
        )

    def _confusion(self, head: State, one: Windowed, features: torch.Tensor) -> torch.Tensor:
        fields = self._dense.fields
        height, width = (max(side, fields.crop) for side in one.size)
        found = slide(features, head["weight"], head["bias"], one.places, (height, width), fields)[:, : one.size[0], : one.size[1]]
        found = interpolate(found[None], size=tuple(one.labels.shape), mode="bilinear", align_corners=False)[0]
        return confusion(found.argmax(dim=0), one.labels.to(found.device), self._setting.classes)


KINDS: dict[str, Kind[Any]] = {
    "linear": Kind(trainer=LinearTrainer, scorer=LinearScorer),
    "dense": Kind(trainer=SegmentationTrainer, scorer=SegmentationScorer),
}
"""By the name of the task's probe."""
