"""The dense linear probe: a stack of 1x1 convolutions on banked patch tokens, one a learning rate.

Training compares each token with the share of its patch's labelled pixels that has each class. That is the cross entropy of every labelled pixel
under logits brought to the mask's size by nearest neighbour, at the cost of one term a token. Predicting brings the logits to the mask's size
bilinearly (align_corners off) and takes the highest. A class that is ignored takes no part: it is neither trained nor ever predicted.

Shape legend: N images, B images of a batch, h w patch grid, T = h w, H W mask pixels, D features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch

from harness.augment import UNLABELLED, counted, left_out_classes
from harness.core import Predictions, Probe, Rows
from harness.errors import ProbeError
from harness.probes.features import (
    FeatureNorm,
    Normaliser,
    batch_order,
    checked_features,
    needed,
    on_device,
)
from harness.probes.fields import Count, Fields, Momentum, NonNegative, as_tuple, learning_rates
from harness.probes.patch_labels import PatchLabels, PatchTarget
from harness.probes.schedule import cosine, polynomial

NAME = "dense"
LOGITS = 2**24
"""Upsampled logits held at once: 64 MiB."""


class DenseFields(Fields):
    """Defaults sized for a laptop; Zhu et al. (arXiv 2301.11915) take 160,000 steps of 16 images, 1,500 of them warm-up."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    epochs: Count = 20
    batch_size: Count = 16
    """Images."""
    weight_decay: NonNegative = 0.05
    momentum: Momentum = 0.9
    """Of sgd; adamw has betas 0.9 and 0.999."""
    schedule: Literal["polynomial", "cosine"] = "polynomial"
    """Polynomial of power 1, or cosine, both to 0."""
    warmup_steps: Annotated[int, pydantic.Field(ge=0)] = 0
    """Linear from 1e-6 of the rate."""
    init_std: NonNegative = 0.01
    feature_norm: FeatureNorm = "none"
    patch_target: PatchTarget = "soft"
    """Shares of classes in a patch, or its most frequent class alone."""
    ignore_index: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = (UNLABELLED,)
    """Mask values that are not counted; one value may be given without brackets, None is no value. One that is a class is left out altogether."""

    @pydantic.field_validator("ignore_index", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        if given is None:
            return ()
        if isinstance(given, int) and given < 0:
            raise ValueError("expected a mask value, which is at least 0")
        return (given,) if isinstance(given, int) else as_tuple(given)


DEFAULTS: dict[str, Any] = DenseFields().model_dump()


def checked_masks(rows: Rows, classes: int, ignored: Sequence[int]) -> np.ndarray:
    """Masks [N, H, W]. Raises ProbeError where there are none, or a value is neither a class nor ignored."""
    if rows.masks is None or rows.masks.ndim != 3 or len(rows.masks) != len(rows):
        got = "none" if rows.masks is None else f"shape {rows.masks.shape}"
        raise ProbeError(f"{NAME} probe: expected masks [N, H, W], one a row of {len(rows)}, got {got}; choose a task whose data set has masks")
    for key, mask in zip(rows.keys, rows.masks, strict=True):
        top = int(np.max(mask, initial=0, where=counted(mask, ignored)))
        if top >= classes:
            values = f"below {classes} or among {', '.join(map(str, ignored)) or 'none'} (ignored)"
            raise ProbeError(f"{NAME} probe: expected mask values {values}, got {top} in {key!r}; correct ignore_index")
    return rows.masks


class Head:
    """One 1x1 convolution and its optimiser."""

    def __init__(self, weight_CD: torch.Tensor, lr: float, fields: DenseFields, left_out: Sequence[int]) -> None:
        self.weight_CD = weight_CD
        self.bias_C1 = torch.zeros_like(weight_CD[:, :1])
        self._lr, self._left_out = lr, list(left_out)
        parameters = [self.weight_CD, self.bias_C1]
        self._optimizer: torch.optim.Optimizer
        if fields.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=fields.weight_decay, foreach=False)
        else:
            self._optimizer = torch.optim.SGD(parameters, lr=lr, momentum=fields.momentum, weight_decay=fields.weight_decay, foreach=False)

    def step(self, tokens_MD: torch.Tensor, target_CM: torch.Tensor, weight_M: torch.Tensor, total: torch.Tensor, factor: float) -> None:
        """One step on the cross entropy over M tokens, each weighted by its labelled share, divided by the sum of these."""
        logits_CM = torch.addmm(self.bias_C1, self.weight_CD, tokens_MD.T)
        if self._left_out:
            logits_CM[self._left_out] = -torch.inf
        gradient_CM = logits_CM.softmax(dim=0).mul_(weight_M).sub_(target_CM).div_(total)
        self.weight_CD.grad = gradient_CM @ tokens_MD
        self.bias_C1.grad = gradient_CM.sum(dim=1, keepdim=True)
        self._optimizer.param_groups[0]["lr"] = self._lr * factor
        self._optimizer.step()


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseStack:
    """K fitted heads."""

    lrs: tuple[float, ...]
    weights: tuple[torch.Tensor, ...]
    """K of float32 [C, D]."""
    biases: tuple[torch.Tensor, ...]
    """K of float32 [C]."""
    normaliser: Normaliser
    ignored: tuple[int, ...]
    """Mask values that are not counted."""

    def logits(self, tokens: torch.Tensor, head: int) -> torch.Tensor:
        """float32 [B, C, h, w] of tokens [B, h, w, D]; the lowest there is for a class that is left out."""
        weight, bias = self.weights[head], self.biases[head]
        out = torch.addmm(bias, self.normaliser(tokens.to(weight.device).flatten(0, 2)), weight.T)
        if left_out := left_out_classes(self.ignored, len(weight)):
            # not -inf, which interpolation would make NaN
            out[:, list(left_out)] = torch.finfo(out.dtype).min
        return out.view(*tokens.shape[:3], -1).permute(0, 3, 1, 2)

    def predict(self, rows: Rows, head: int) -> Predictions:
        """Confusion cells: a row per (image, true class, predicted class) that occurs, under the image's key, with its pixels as the score.

        Raises ProbeError where `rows` do not fit, or the head's training diverged.
        """
        weight = self.weights[head]
        if not (bool(weight.isfinite().all()) and bool(self.biases[head].isfinite().all())):
            raise ProbeError(f"{NAME} probe: expected finite weights, got NaN or infinity at learning rate {self.lrs[head]:g}; search below it")
        features = checked_features(NAME, rows, dims=4, width=weight.shape[1])
        masks = checked_masks(rows, len(weight), self.ignored)
        size = max(1, LOGITS // (len(weight) * masks.shape[1] * masks.shape[2]))
        cells = [
            self._cells(self._labels(features[start : start + size], head, masks.shape[1:]), masks[start : start + size], start)
            for start in range(0, len(rows), size)
        ]
        image, target, predicted, pixels = (np.concatenate([each[i] for each in cells]) for i in range(4))
        return Predictions(
            keys=[rows.keys[i] for i in image],
            groups=[rows.groups[i] for i in image],
            targets=target,
            predictions=predicted,
            scores=pixels.astype(np.float64),
        )

    def _labels(self, tokens: torch.Tensor, head: int, size: tuple[int, ...]) -> np.ndarray:
        """int64 [B, H, W] predicted classes, the lowest of equals."""
        logits = self.logits(tokens, head)
        return torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1).cpu().numpy()

    def _cells(self, predicted: np.ndarray, masks: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Image, true class, predicted class and pixels of each confusion cell that occurs, images counted from `first`."""
        classes = len(self.weights[0])
        tables = []
        for mask, guess in zip(masks, predicted, strict=True):
            kept = counted(mask, self.ignored)
            tables.append(np.bincount(mask[kept].astype(np.int64) * classes + guess[kept], minlength=classes * classes))
        table = np.stack(tables)
        image, cell = np.nonzero(table)
        return image + first, cell // classes, cell % classes, table[image, cell]

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """weight [C, D], bias [C], lr [], and the training tokens' mean and std [D] where features are standardised."""
        tensors = {"weight": self.weights[head].cpu(), "bias": self.biases[head].cpu(), "lr": torch.tensor(self.lrs[head], dtype=torch.float64)}
        return tensors | self.normaliser.state()


@dataclass(frozen=True)
class DenseLinearProbe:
    """Linear segmentation of banked patch tokens [N, h, w, D] with masks [N, H, W]; `lrs` are the actual rates at the protocol's batch size."""

    name: str = NAME
    has_learning_rate: bool = True
    needs_train: bool = True

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> DenseStack:
        """One head a learning rate. Raises ProbeError on rows, rates or fields that cannot be; a head that diverges raises when it predicts."""
        fields, rates, rows = DenseFields.read(NAME, protocol), learning_rates(NAME, lrs), needed(NAME, train)
        features = checked_features(NAME, rows, dims=4)
        ignored = fields.ignore_index
        labels = PatchLabels.of(checked_masks(rows, classes, ignored), (features.shape[1], features.shape[2]), classes, ignored, fields.patch_target)
        if not any(len(each) for each in labels.tokens):
            raise ProbeError(f"{NAME} probe: expected labelled pixels, got none in {len(rows)} images; check ignore_index, now {list(ignored)}")
        normaliser = Normaliser.fit(fields.feature_norm, features, device)
        features, generator = on_device(features, device), torch.Generator().manual_seed(seed)
        weight = torch.empty(classes, features.shape[-1]).normal_(0, fields.init_std, generator=generator)
        left_out = left_out_classes(ignored, classes)
        heads = [Head(weight.to(device, copy=True), lr, fields, left_out) for lr in rates]
        steps = fields.epochs * -(-len(rows) // fields.batch_size)
        step = 0
        for _ in range(fields.epochs):
            for chosen in batch_order(len(rows), fields.batch_size, generator):
                tokens = normaliser(features[chosen.to(features.device)].to(device).flatten(0, 2))
                target = labels.batch(chosen, classes).to(device)
                share = target.sum(dim=0)
                # a batch without any labelled pixel has no gradient, and must not divide by zero
                total = share.sum().clamp(min=torch.finfo(torch.float32).tiny)
                for head in heads:
                    head.step(tokens, target, share, total, factor(step, steps, fields))
                step += 1
        return DenseStack(
            lrs=rates,
            weights=tuple(head.weight_CD for head in heads),
            biases=tuple(head.bias_C1[:, 0] for head in heads),
            normaliser=normaliser,
            ignored=ignored,
        )

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> DenseStack:
        """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
        fields = DenseFields.read(NAME, protocol)
        if len(state["weight"]) != classes:
            raise ProbeError(
                f"{NAME} probe: expected weights of {classes} classes, got {len(state['weight'])}; restore it for the task it was fitted to"
            )
        return DenseStack(
            lrs=(float(state["lr"]),),
            weights=(state["weight"].to(device),),
            biases=(state["bias"].to(device),),
            normaliser=Normaliser.restore(fields.feature_norm, state, device),
            ignored=fields.ignore_index,
        )


def factor(step: int, steps: int, fields: DenseFields) -> float:
    """The learning rate at a step, as a factor of the rate given: the decay, times a linear warm-up from 1e-6."""
    decay = polynomial(step, steps) if fields.schedule == "polynomial" else cosine(step, steps)
    if step >= fields.warmup_steps:
        return decay
    return decay * (1 - (1 - step / fields.warmup_steps) * (1 - 1e-6))


PROBE: Probe = DenseLinearProbe()
