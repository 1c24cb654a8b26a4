"""The detector: one logistic unit on each frozen token, which tells whether the token lies in a wrong place.

DILEMMA (Sameni et al., AAAI 2023, arXiv 2204.04788) trains encoders with a Linear(D, 1) on the final-norm patch tokens and the mean binary cross
entropy of those that are kept; here the encoder is frozen and the unit alone is trained, for any block. Standardised tokens are a choice of this
harness: a linear unit can tell the same of them, and blocks whose outputs differ in scale become comparable at one learning rate.

Shape legend: N images, B images of a batch, n = h w tokens of an image, M = B n, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch

from harness.core import UNMARKED, Predictions, Probe, Rows
from harness.errors import ProbeError
from harness.probes.features import CHUNK_ROWS, FeatureNorm, Normaliser, as_tensor, batch_order, checked_features, needed, on_device
from harness.probes.fields import Count, Fields, Momentum, NonNegative, learning_rates
from harness.probes.schedule import cosine

NAME = "detector"


class DetectorFields(Fields):
    """How the unit is trained, and on what."""

    theta: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    """The share of wrong tokens to be expected: a token is told to be wrong where its probability is at least this. At 0 and 1 there is nothing to
    tell apart."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    epochs: Count = 30
    batch_size: Count = 64
    """Images."""
    momentum: Momentum = 0.9
    """Of sgd; adamw has betas 0.9 and 0.999."""
    weight_decay: NonNegative = 0.0
    init_std: NonNegative = 0.01
    feature_norm: FeatureNorm = "standardize"
    max_tokens: Count = 1_000_000
    """Most tokens that are scored: whole images, a seeded choice among them where there are more."""


DEFAULTS: dict[str, Any] = {name: value for name, value in DetectorFields().model_dump().items() if name != "theta"}


def log_odds(share: float) -> float:
    """Natural logarithm."""
    return math.log(share / (1 - share))


def checked_marks(rows: Rows) -> torch.Tensor:
    """uint8 [N, n]: 1 for wrong tokens, 0 for right ones, UNMARKED for those that are neither. Raises ProbeError where there are no such marks."""
    masks, tokens = rows.masks, rows.features.shape[1] * rows.features.shape[2]
    if masks is None or len(masks) != len(rows) or int(np.prod(masks.shape[1:])) != tokens:
        got = "none" if masks is None else f"shape {masks.shape}"
        raise ProbeError(
            f"{NAME} probe: expected one mark for each of {tokens} tokens of {len(rows)} images, got {got}; give tokens that were misplaced"
        )
    others = masks[(masks > 1) & (masks != UNMARKED)]
    if len(others):
        raise ProbeError(f"{NAME} probe: expected marks of 0 and 1, or {UNMARKED} for none, got {others[0]}; set the protocol's mask to misplaced")
    return as_tensor(masks).reshape(len(rows), tokens)


class Head:
    """One logistic unit and its optimiser; its bias begins at the log odds of theta, so that it knows the base rate from the start."""

    def __init__(self, weight_D: torch.Tensor, lr: float, fields: DetectorFields) -> None:
        self.weight_D = weight_D
        self.bias_1 = torch.full_like(weight_D[:1], log_odds(fields.theta))
        self._lr = lr
        parameters = [self.weight_D, self.bias_1]
        self._optimizer: torch.optim.Optimizer
        if fields.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=fields.weight_decay, foreach=False)
        else:
            self._optimizer = torch.optim.SGD(parameters, lr=lr, momentum=fields.momentum, weight_decay=fields.weight_decay, foreach=False)

    def step(self, tokens_MD: torch.Tensor, wrong_M: torch.Tensor, factor: float) -> None:
        """One step on the mean binary cross entropy, whose gradient is one subtraction."""
        gradient_M = torch.addmv(self.bias_1, tokens_MD, self.weight_D).sigmoid_().sub_(wrong_M).div_(len(wrong_M))
        self.weight_D.grad = tokens_MD.T @ gradient_M
        self.bias_1.grad = gradient_M.sum()[None]
        self._optimizer.param_groups[0]["lr"] = self._lr * factor
        self._optimizer.step()


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectorStack:
    """K fitted heads."""

    lrs: tuple[float, ...]
    weights: tuple[torch.Tensor, ...]
    """K of float32 [D]."""
    biases: tuple[torch.Tensor, ...]
    """K of float32 [1]."""
    normaliser: Normaliser
    fields: DetectorFields
    seed: int

    def predict(self, rows: Rows, head: int) -> Predictions:
        """One row a token, under `<key>#<its place among the image's tokens>`: target 1 where it lies wrong, -1 where it has no mark, score the log
        odds of lying wrong.

        Places count from 0, row by row of the grid; where tokens were dropped, over those that are left. The prediction is 1 where the probability is
        at least theta. Raises ProbeError where `rows` do not fit, or the head's training diverged.
        """
        weight, bias = self.weights[head], self.biases[head]
        features, marks = checked_features(NAME, rows, dims=4, width=len(weight)), checked_marks(rows)
        images = self._scored(len(rows), marks.shape[1])
        step = max(1, CHUNK_ROWS // marks.shape[1])
        chunks = []
        for start in range(0, len(images), step):
            tokens = self.normaliser(features[images[start : start + step]].to(weight.device).flatten(0, 2))
            chunks.append(torch.addmv(bias, tokens, weight).double().cpu())
        odds = torch.cat(chunks).numpy()
        if not np.isfinite(odds).all():
            raise ProbeError(f"{NAME} probe: expected finite outputs, got NaN or infinity at learning rate {self.lrs[head]:g}; search below it")
        places, targets = range(marks.shape[1]), marks[images].flatten().long()
        return Predictions(
            keys=[f"{rows.keys[image]}#{place}" for image in images.tolist() for place in places],
            groups=[rows.groups[image] for image in images.tolist() for _ in places],
            targets=targets.masked_fill_(targets == UNMARKED, -1).numpy(),
            predictions=(odds >= log_odds(self.fields.theta)).astype(np.int64),
            scores=odds,
        )

    def _scored(self, images: int, tokens: int) -> torch.Tensor:
        """int64 [N], ascending: the images that are scored."""
        most = max(1, self.fields.max_tokens // tokens)
        if images <= most:
            return torch.arange(images)
        return torch.from_numpy(np.sort(np.random.default_rng(self.seed).choice(images, most, replace=False)))

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """weight [D], bias [1], lr [], and the training tokens' mean and std [D] where they are standardised."""
        tensors = {"weight": self.weights[head].cpu(), "bias": self.biases[head].cpu(), "lr": torch.tensor(self.lrs[head], dtype=torch.float64)}
        return tensors | self.normaliser.state()


@dataclass(frozen=True)
class DetectorProbe:
    """A logistic unit on tokens [N, h, w, D] with marks [N, 1, n], by SGD with momentum or AdamW, the rate going to 0 by a cosine.

    Tokens that are UNMARKED are not trained on.

    `lrs` are the actual rates at the protocol's batch. The heads share initialisation, order and reading of the batches; each computes alone.
    """

    name: str = NAME
    has_learning_rate: bool = True
    needs_train: bool = True

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> DetectorStack:
        """One head a learning rate. Raises ProbeError on rows, rates or fields that cannot be; a head that diverges raises when it predicts."""
        fields, rates, rows = DetectorFields.read(NAME, protocol), learning_rates(NAME, lrs), needed(NAME, train)
        features, marks = checked_features(NAME, rows, dims=4), checked_marks(rows)
        normaliser = Normaliser.fit(fields.feature_norm, features, device)
        features, generator = on_device(features, device), torch.Generator().manual_seed(seed)
        weight = torch.empty(features.shape[-1]).normal_(0, fields.init_std, generator=generator)
        heads = [Head(weight.to(device, copy=True), lr, fields) for lr in rates]
        steps = fields.epochs * -(-len(rows) // fields.batch_size)
        step = 0
        for _ in range(fields.epochs):
            for chosen in batch_order(len(rows), fields.batch_size, generator):
                tokens = normaliser(features[chosen.to(features.device)].to(device).flatten(0, 2))
                wrong = marks[chosen].flatten()
                if (wrong == UNMARKED).any():
                    tokens, wrong = tokens[(wrong != UNMARKED).to(device)], wrong[wrong != UNMARKED]
                for head in heads if len(wrong) else ():
                    head.step(tokens, wrong.to(device, torch.float32), cosine(step, steps))
                step += 1
        return DetectorStack(
            lrs=rates,
            weights=tuple(head.weight_D for head in heads),
            biases=tuple(head.bias_1 for head in heads),
            normaliser=normaliser,
            fields=fields,
            seed=seed,
        )

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> DetectorStack:
        """The stack of one head that `state` was taken from."""
        fields = DetectorFields.read(NAME, protocol)
        return DetectorStack(
            lrs=(float(state["lr"]),),
            weights=(state["weight"].to(device),),
            biases=(state["bias"].to(device),),
            normaliser=Normaliser.restore(fields.feature_norm, state, device),
            fields=fields,
            seed=seed,
        )


PROBE: Probe = DetectorProbe()
