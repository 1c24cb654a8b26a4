"""Linear segmentation on a stream of images: a stack of 1x1 convolutions on frozen tokens, at the labels' resolution.

The heads share the initialisation and each batch's tokens; everything else runs head by head, with the same calls as for a single head.

Shape legend: B images, h w token grid, H W label pixels, D features, C classes, K heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch.nn.functional import conv2d, cross_entropy, interpolate

from harness.core import EncoderInfo, Passes, Proposal, Reading, Scorer, State, StreamProbe, StreamSetting, Trainer
from harness.data.augment import IGNORED, fitting, left_out_classes
from harness.errors import RequestError
from harness.probes.fields import Count, MaskFields, NonNegative
from harness.probes.lib.schedule import polynomial

NAME = "segmentation"
LOGITS = 2**26
"""Logits at the labels' resolution in memory at once: 256 MiB. Fixed, since it decides how a batch's sums are grouped."""
NEVER = -1e30
"""Logit of a class that is left out; not -inf, which interpolation would make NaN."""
WARMUP_RATIO = 1e-6

Pixels = Annotated[int, pydantic.Field(ge=1, le=16384)]


class SegmentationFields(MaskFields):
    """Defaults: linear segmentation of Zhu et al., TMLR 2023 (arXiv 2301.11915), on ADE20K."""

    iterations: Count = 160_000
    batch_size: Count = 16
    weight_decay: NonNegative = 0.05
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 1500
    init_std: NonNegative = 0.01
    blocks: tuple[int, ...] = ()
    """0-based indices of the blocks whose outputs are concatenated; negative ones count from the last (-1). Empty: the encoder's final output."""
    upsample: Count = 1
    """Bilinear upsampling of the tokens before the convolution."""
    loss_mean: Literal["labelled", "all"] = "labelled"
    """The pixels that a batch's loss is divided by: the labelled ones, or all of them, which is mmsegmentation's default."""
    ignore_label: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = (255,)
    """Values of the label map that do not count. A class among them is left out altogether: neither trained nor ever predicted."""
    train_scale: tuple[Pixels, Pixels] = (2048, 512)
    crop: Pixels = 512
    augment: bool = True
    """False: images are only fitted into the train scale and cropped at random."""
    test_scale: tuple[Pixels, Pixels] = (2048, 512)
    stride: Pixels = 341

    def ignored(self) -> tuple[str, tuple[int, ...]]:
        return "ignore_label", self.ignore_label


def warmed_up(step: int, steps: int, warmup_steps: int) -> float:
    """The factor of the learning rate at an iteration: polynomial of power 1 to 0, times a linear warm-up from 1e-6.

    mmcv's poly policy without minimum, with linear warm-up.
    """
    decay = polynomial(step, steps)
    if step >= warmup_steps:
        return decay
    return decay * (1 - (1 - step / warmup_steps) * (1 - WARMUP_RATIO))


def logits(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, size: Sequence[int], upsample: int, left_out: Sequence[int]
) -> torch.Tensor:
    """float32 [B, C, H, W] of features [B, D, h, w] under weight [C, D] and bias [C].

    The convolution comes before the upsampling, since C channels are fewer than D. Both are linear and the interpolation's weights sum to 1, so the
    order only changes rounding.
    """
    out = conv2d(features, weight[:, :, None, None], bias)
    if left_out:
        mask = torch.zeros(len(weight), dtype=torch.bool, device=out.device)
        mask[list(left_out)] = True
        out = out.masked_fill(mask[:, None, None], NEVER)
    if upsample > 1:
        out = interpolate(out, scale_factor=upsample, mode="bilinear", align_corners=False)
    return interpolate(out, size=tuple(size), mode="bilinear", align_corners=False)


class SegmentationHead:
    """One 1x1 convolution and its AdamW (betas 0.9 and 0.999)."""

    def __init__(self, weight_CD: torch.Tensor, lr: float, fields: SegmentationFields) -> None:
        self.weight = torch.nn.Parameter(weight_CD)
        self.bias = torch.nn.Parameter(torch.zeros_like(weight_CD[:, 0]))
        self.lr = lr
        self._fields = fields
        self._left_out = left_out_classes(fields.ignore_label, len(weight_CD))
        self._optimizer = torch.optim.AdamW([self.weight, self.bias], lr=lr, betas=(0.9, 0.999), weight_decay=fields.weight_decay, foreach=False)

    def step(self, features: torch.Tensor, labels: torch.Tensor, factor: float) -> None:
        """One step on the mean cross entropy of features [B, D, h, w] against labels, int64 [B, H, W]; lr is the head's, times `factor`."""
        counted = labels.numel() if self._fields.loss_mean == "all" else int((labels != IGNORED).sum())
        self._optimizer.zero_grad(set_to_none=False)
        group = max(1, LOGITS // (len(self.weight) * labels.shape[1] * labels.shape[2]))
        for start in range(0, len(labels), group):
            group_labels = labels[start : start + group]
            group_logits = logits(
                features[start : start + group],
                self.weight,
                self.bias,
                size=group_labels.shape[1:],
                upsample=self._fields.upsample,
                left_out=self._left_out,
            )
            # a batch without any labelled pixel has no gradient, and must not divide by zero
            loss = cross_entropy(group_logits, group_labels, ignore_index=IGNORED, reduction="sum") / max(counted, 1)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.param_groups[0]["lr"] = self.lr * factor
        self._optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, by name, on the CPU; copies."""
        tensors = {"weight": self.weight.detach(), "bias": self.bias.detach()}
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            tensors |= {f"{name}/{key}": value for key, value in self._optimizer.state[parameter].items()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from the tensors of `state`."""
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            # the count of steps stays on the CPU, where AdamW keeps it
            moments = {key: state[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in state}
            self._optimizer.state[parameter] = {
                key: tensor.clone() if key == "step" else tensor.to(parameter.device, copy=True) for key, tensor in moments.items()
            }


def block_indices(fields: SegmentationFields, info: EncoderInfo) -> tuple[int, ...]:
    """0-based indices of the protocol's blocks."""
    return tuple(block if block >= 0 else len(info.block_dims) + block for block in fields.blocks)


def unsuitable(fields: SegmentationFields, info: EncoderInfo) -> str | None:
    """Why the encoder cannot be probed with these fields; None where it can."""
    if any(not 0 <= block < len(info.block_dims) for block in block_indices(fields, info)):
        return f"blocks {', '.join(map(str, fields.blocks))} of an encoder that has {len(info.block_dims)}"
    for side, cells in zip(info.preprocessing.size, info.grid, strict=True):
        if side % cells == 0 and fields.crop % (side // cells):
            return f"a crop of {fields.crop} px is no multiple of the encoder's patches of {side // cells} px"
    return None


def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of the crop × crop windows that cover an image of at least that size; the last of a row or column is moved back to its edge.

    The grid of mmsegmentation's slide_inference.
    """

    def starts(length: int) -> list[int]:
        count = max(length - crop + stride - 1, 0) // stride + 1
        return [min(index * stride, length - crop) for index in range(count)]

    return [(top, left) for top in starts(height) for left in starts(width)]


def slide(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    places: Sequence[tuple[int, int]],
    size: tuple[int, int],
    fields: SegmentationFields,
) -> torch.Tensor:
    """float32 [C, H, W] logits of an image from its windows' features [windows, D, h, w], averaged where windows overlap."""
    total = features.new_zeros(len(weight), *size)
    count = features.new_zeros(size)
    for window, (top, left) in zip(features, places, strict=True):
        bottom, right = top + fields.crop, left + fields.crop
        total[:, top:bottom, left:right] += logits(
            window[None],
            weight,
            bias,
            size=(fields.crop, fields.crop),
            upsample=fields.upsample,
            left_out=left_out_classes(fields.ignore_label, len(weight)),
        )[0]
        count[top:bottom, left:right] += 1
    return total / count


def confusion(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """int64 [C, C] pixels by (true, predicted) class of maps [H, W]; pixels that are IGNORED do not count."""
    labelled = labels != IGNORED
    return torch.bincount(labels[labelled].long() * classes + predicted[labelled].long(), minlength=classes * classes).view(classes, classes)


def windows_of(height: int, width: int, fields: SegmentationFields) -> int:
    """Number of windows for testing an image of that size."""
    down, across = (max(side, fields.crop) for side in fitting(height, width, fields.test_scale))
    return len(windows(down, across, fields.crop, fields.stride))


class SegmentationProbe(StreamProbe[SegmentationFields]):
    """1x1 convolutions on the tokens of augmented crops, tested by a sliding window."""

    def refuses(self, fields: SegmentationFields, info: EncoderInfo, samples: int) -> str | None:
        """Raises RequestError where training would end before it has seen every sample."""
        least = -(-samples // fields.batch_size)
        if fields.iterations < least:
            raise RequestError(
                f"protocol.iterations: expected at least the {least} that see each of the {samples} train samples once, got {fields.iterations}; "
                "raise it or protocol.batch_size"
            )
        return unsuitable(fields, info)

    def trainer(self, setting: StreamSetting[SegmentationFields], proposals: Sequence[Proposal]) -> Trainer[Any]:
        from harness.probes.lib.segmentation_stream import SegmentationTrainer

        return SegmentationTrainer(setting, proposals)

    def scorer(self, setting: StreamSetting[SegmentationFields], heads: Sequence[tuple[str, State]]) -> Scorer[Any]:
        from harness.probes.lib.segmentation_stream import SegmentationScorer

        return SegmentationScorer(setting, heads)

    def passes(self, fields: SegmentationFields, reading: Reading) -> Passes:
        """Crops in training and windows in scoring, weighted by their pixels."""
        crops, area = fields.iterations * fields.batch_size, fields.crop**2 / math.prod(reading.input_size)
        counts = [windows_of(height, width, fields) for height, width in reading.sizes]
        per_image = area * (sum(counts) / len(counts) if counts else 1.0)
        return Passes(decoded=crops + reading.read_to_choose, encoded=area * crops + per_image * reading.chosen_on, encoded_per_test_image=per_image)


PROBE = SegmentationProbe(name=NAME, fields=SegmentationFields, scores="pixels", has_learning_rate=True, metrics=("mIoU", "mAcc", "aAcc"))
