"""The dense linear probe: a stack of 1x1 convolutions on banked patch tokens, one per learning rate.

Training compares each token with the class shares of its patch's labelled pixels. This equals the cross entropy of every labelled pixel under logits
resized to the mask by nearest neighbour, at the cost of one term per token. Prediction resizes the logits to the mask bilinearly (align_corners off)
and takes the highest. An ignored class takes no part: it is neither trained nor ever predicted.

Shape legend: N images, B images of a batch, h w patch grid, T = h w, H W mask pixels, D features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch

from harness.core import Predictions, Rows, State
from harness.data.augment import UNLABELLED, counted, left_out_classes
from harness.errors import ProbeError
from harness.probes.fields import Count, MaskFields, NonNegative
from harness.probes.heads import AffineHead, Examples, HeadStack, NormedFields, TrainedProbe, sgd_or_adamw
from harness.probes.lib.features import Normaliser, checked_features, on_device
from harness.probes.lib.patch_labels import PatchLabels, PatchTarget
from harness.probes.lib.schedule import cosine, polynomial

NAME = "dense"
LOGITS = 2**24
"""Upsampled logits in memory at once: 64 MiB."""


class DenseFields(NormedFields, MaskFields):
    """Defaults sized for a laptop; Zhu et al. (arXiv 2301.11915) take 160,000 steps of 16 images, of which 1,500 are warm-up."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`momentum` is for sgd; adamw has betas 0.9 and 0.999."""
    epochs: Count = 20
    batch_size: Count = 16
    """Images."""
    weight_decay: NonNegative = 0.05
    schedule: Literal["polynomial", "cosine"] = "polynomial"
    """Polynomial of power 1, or cosine, both to 0."""
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    """Linear from 1e-6 of the rate."""
    patch_target: PatchTarget = "soft"
    """The class shares of a patch, or only its most frequent class."""
    ignore_index: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = (UNLABELLED,)
    """Mask values that are not counted; a single value needs no brackets, None means no value. A class among them is left out altogether."""

    @pydantic.field_validator("ignore_index", mode="before")
    @classmethod
    def _none(cls, values: object) -> object:
        return () if values is None else values

    def ignored(self) -> tuple[str, tuple[int, ...]]:
        return "ignore_index", self.ignore_index


def checked_masks(rows: Rows, classes: int, ignored: Sequence[int]) -> np.ndarray:
    """Masks [N, H, W]. Raises ProbeError where masks are missing, or a value is neither a class nor ignored."""
    if rows.masks is None or rows.masks.ndim != 3 or len(rows.masks) != len(rows):
        got = "none" if rows.masks is None else f"shape {rows.masks.shape}"
        raise ProbeError(f"{NAME} probe: expected masks [N, H, W], one a row of {len(rows)}, got {got}; choose a task whose data set has masks")
    for key, mask in zip(rows.keys, rows.masks, strict=True):
        top = int(np.max(mask, initial=0, where=counted(mask, ignored)))
        if top >= classes:
            values = f"below {classes} or among {', '.join(map(str, ignored)) or 'none'} (ignored)"
            raise ProbeError(f"{NAME} probe: expected mask values {values}, got {top} in {key!r}; correct ignore_index")
    return rows.masks


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchShares:
    """The targets of the logits of M = B T tokens."""

    target_CM: torch.Tensor
    """Per token, the share of each class in its patch."""
    weight_M: torch.Tensor
    """Per token, the labelled share of its patch."""
    total: torch.Tensor
    """The sum of the weights, []."""


class DenseHead(AffineHead[DenseFields, PatchShares]):
    """One 1x1 convolution and its optimiser."""

    def __init__(self, tensors: State, fields: DenseFields) -> None:
        super().__init__(tensors, sgd_or_adamw(fields.optimizer, momentum=fields.momentum, weight_decay=fields.weight_decay))
        self._left_out = list(left_out_classes(fields.ignore_index, len(self.weight)))

    @classmethod
    def drawn(cls, width: int, classes: int, fields: DenseFields, generator: torch.Generator) -> State:
        return {"weight": torch.empty(classes, width).normal_(0, fields.init_std, generator=generator), "bias": torch.zeros(classes)}

    @staticmethod
    def shape(state: State) -> tuple[int, int]:
        classes, width = state["weight"].shape
        return width, classes

    def step(self, inputs: torch.Tensor, target: PatchShares, lr: float, seeds: tuple[int, int]) -> None:
        """One step on the cross entropy over tokens [M, D], averaged with the labelled shares as weights."""
        logits_CM = torch.addmm(self.bias[:, None], self.weight, inputs.T)
        if self._left_out:
            logits_CM[self._left_out] = -torch.inf
        gradient_CM = logits_CM.softmax(dim=0).mul_(target.weight_M).sub_(target.target_CM).div_(target.total)
        self.descend(gradient_CM @ inputs, gradient_CM.sum(dim=1), lr)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """float32 [M, C] of tokens [M, D]; the lowest float32 for a class that is left out."""
        out = torch.addmm(self.bias, inputs, self.weight.T)
        if self._left_out:
            # not -inf, which interpolation would make NaN
            out[:, self._left_out] = torch.finfo(out.dtype).min
        return out


@dataclass(frozen=True, kw_only=True)
class DenseProbe(TrainedProbe[DenseFields]):
    """Linear segmentation of banked patch tokens [N, h, w, D] with masks [N, H, W]."""

    def examples(self, rows: Rows, classes: int, fields: DenseFields, device: torch.device) -> Examples:
        features, ignored = checked_features(NAME, rows, dims=4), fields.ignore_index
        labels = PatchLabels.of(checked_masks(rows, classes, ignored), (features.shape[1], features.shape[2]), classes, ignored, fields.patch_target)
        if not any(len(cells) for cells in labels.tokens):
            raise ProbeError(f"{NAME} probe: expected labelled pixels, got none in {len(rows)} images; check ignore_index, now {list(ignored)}")
        normaliser = Normaliser.fit(fields.norm, features, device)
        features = on_device(features, device)

        def batch(chosen: torch.Tensor) -> tuple[torch.Tensor, PatchShares]:
            tokens = normaliser(features[chosen.to(features.device)].to(device).flatten(0, 2))
            target = labels.batch(chosen, classes).to(device)
            share = target.sum(dim=0)
            # a batch without any labelled pixel has no gradient, and must not divide by zero
            total = share.sum().clamp(min=torch.finfo(torch.float32).tiny)
            return tokens, PatchShares(target_CM=target, weight_M=share, total=total)

        return Examples(width=features.shape[-1], normaliser=normaliser, batch=batch)

    def factor(self, step: int, steps: int, fields: DenseFields) -> float:
        return factor(step, steps, fields)

    def predict(self, stack: HeadStack[DenseFields], rows: Rows, head: int) -> Predictions:
        """Confusion cells: one row per (image, true class, predicted class) that occurs, under the image's key, with its pixel count as the score."""
        fitted, ignored = stack.heads[head], stack.fields.ignore_index
        if not fitted.is_finite():
            raise stack.diverged(head, "weights")
        width, classes = fitted.shape(fitted.tensors())
        features = checked_features(NAME, rows, dims=4, width=width)
        masks = checked_masks(rows, classes, ignored)
        size = max(1, LOGITS // (classes * masks.shape[1] * masks.shape[2]))
        cells = []
        for start in range(0, len(rows), size):
            predicted = predicted_classes(stack, features[start : start + size], head, masks.shape[1:])
            cells.append(confusion_cells(predicted, masks[start : start + size], start, classes, ignored))
        image, target, predicted, pixels = (np.concatenate([part[i] for part in cells]) for i in range(4))
        return Predictions(
            keys=[rows.keys[i] for i in image],
            groups=[rows.groups[i] for i in image],
            targets=target,
            predictions=predicted,
            scores=pixels.astype(np.float64),
        )


def token_logits(stack: HeadStack[DenseFields], tokens: torch.Tensor, head: int) -> torch.Tensor:
    """float32 [B, C, h, w] of tokens [B, h, w, D]; the lowest float32 for a class that is left out."""
    fitted = stack.heads[head]
    out = fitted.logits(stack.normaliser(tokens.to(fitted.device).flatten(0, 2)))
    return out.view(*tokens.shape[:3], -1).permute(0, 3, 1, 2)


def predicted_classes(stack: HeadStack[DenseFields], tokens: torch.Tensor, head: int, size: tuple[int, ...]) -> np.ndarray:
    """int64 [B, H, W] predicted classes, the lowest of equals."""
    logits = token_logits(stack, tokens, head)
    return torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1).cpu().numpy()


def confusion_cells(
    predicted: np.ndarray, masks: np.ndarray, first: int, classes: int, ignored: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image, true class, predicted class and pixels of each confusion cell that occurs, images counted from `first`."""
    tables = []
    for mask, guess in zip(masks, predicted, strict=True):
        labelled = counted(mask, ignored)
        tables.append(np.bincount(mask[labelled].astype(np.int64) * classes + guess[labelled], minlength=classes * classes))
    table = np.stack(tables)
    image, cell = np.nonzero(table)
    return image + first, cell // classes, cell % classes, table[image, cell]


def factor(step: int, steps: int, fields: DenseFields) -> float:
    """The factor of the learning rate at a step: the decay, times a linear warm-up from 1e-6."""
    decay = polynomial(step, steps) if fields.schedule == "polynomial" else cosine(step, steps)
    if step >= fields.warmup_steps:
        return decay
    return decay * (1 - (1 - step / fields.warmup_steps) * (1 - 1e-6))


PROBE = DenseProbe(name=NAME, fields=DenseFields, scores="pixels", head=DenseHead, metrics=("mIoU", "mAcc", "aAcc"))
