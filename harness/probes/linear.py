"""The linear probe: a stack of softmax classifiers, one a learning rate, trained by SGD in one pass over the rows.

The heads share the initialisation, the order of the batches and the reading of each batch. Everything else runs head by head, as the very calls
that a head alone would make: one wide product over all heads is up to twice as fast for few classes, but its rounding depends on the number of
heads, and at a large learning rate SGD makes another model out of another last bit.

Shape legend: N rows, B batch, D features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.core import Predictions, Probe, Rows
from harness.errors import ProbeError
from harness.probes.features import (
    CHUNK_ROWS,
    FeatureNorm,
    Normaliser,
    batch_order,
    checked_features,
    checked_targets,
    needed,
    on_device,
)
from harness.probes.fields import Count, Fields, Momentum, NonNegative, learning_rates
from harness.probes.schedule import cosine

NAME = "linear"


class LinearFields(Fields):
    """Defaults: the linear probe of Zhu et al., TMLR 2023 (arXiv 2301.11915), which is that of MAE without its batch norm."""

    epochs: Count = 90
    batch_size: Count = 1024
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 0.0
    """On weights and biases alike, as torch.optim.SGD does."""
    init_std: NonNegative = 0.01
    feature_norm: FeatureNorm = "none"


DEFAULTS: dict[str, Any] = LinearFields().model_dump()


class Head:
    """One softmax classifier and its momentum. The gradient of the cross entropy is written out: it is one subtraction."""

    def __init__(self, weight_CD: torch.Tensor, *, momentum: float, weight_decay: float) -> None:
        self.weight_CD = weight_CD
        self.bias_C1 = torch.zeros_like(weight_CD[:, :1])
        self._velocity_CD = torch.zeros_like(self.weight_CD)
        self._velocity_C1 = torch.zeros_like(self.bias_C1)
        self._momentum, self._weight_decay = momentum, weight_decay

    def step(self, batch_BD: torch.Tensor, onehot_CB: torch.Tensor, lr: float) -> None:
        """One step of torch.optim.SGD on the batch's mean cross entropy."""
        share = 1 / len(batch_BD)
        gradient_CB = torch.addmm(self.bias_C1, self.weight_CD, batch_BD.T).softmax(dim=0).sub_(onehot_CB)
        self._velocity_CD.addmm_(gradient_CB, batch_BD, beta=self._momentum, alpha=share)
        self._velocity_C1.mul_(self._momentum).add_(gradient_CB.sum(dim=1, keepdim=True), alpha=share)
        if self._weight_decay:
            self._velocity_CD.add_(self.weight_CD, alpha=self._weight_decay)
            self._velocity_C1.add_(self.bias_C1, alpha=self._weight_decay)
        self.weight_CD.add_(self._velocity_CD, alpha=-lr)
        self.bias_C1.add_(self._velocity_C1, alpha=-lr)


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearStack:
    """K fitted heads."""

    lrs: tuple[float, ...]
    weights: tuple[torch.Tensor, ...]
    """K of float32 [C, D]."""
    biases: tuple[torch.Tensor, ...]
    """K of float32 [C]."""
    normaliser: Normaliser

    def probabilities(self, rows: Rows, head: int) -> torch.Tensor:
        """float32 [N, C], on the CPU. Raises ProbeError where `rows` do not fit, or the head's training diverged."""
        weight, bias = self.weights[head], self.biases[head]
        features = checked_features(NAME, rows, width=weight.shape[1])
        chunks = []
        for start in range(0, len(rows), CHUNK_ROWS):
            batch = self.normaliser(features[start : start + CHUNK_ROWS].to(weight.device))
            chunks.append(torch.addmm(bias, batch, weight.T).softmax(dim=1).cpu())
        found = torch.cat(chunks)
        if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all()) and bool(found.isfinite().all())):
            raise ProbeError(f"{NAME} probe: expected finite outputs, got NaN or infinity at learning rate {self.lrs[head]:g}; search below it")
        return found

    def predict(self, rows: Rows, head: int) -> Predictions:
        """The most probable class of each row (the lowest of equals) and its probability. Raises ProbeError as `probabilities` does."""
        scores, predictions = self.probabilities(rows, head).max(dim=1)
        return Predictions(
            keys=rows.keys,
            groups=rows.groups,
            targets=np.asarray(rows.targets, dtype=np.int64),
            predictions=predictions.numpy(),
            scores=scores.double().numpy(),
        )

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """weight [C, D], bias [C], lr [], and the training rows' mean and std [D] where features are standardised."""
        tensors = {"weight": self.weights[head].cpu(), "bias": self.biases[head].cpu(), "lr": torch.tensor(self.lrs[head], dtype=torch.float64)}
        return tensors | self.normaliser.state()


@dataclass(frozen=True)
class LinearProbe:
    """Softmax regression by SGD with momentum and a cosine to 0, without warm-up; `lrs` are the actual rates at the protocol's batch size."""

    name: str = NAME
    has_learning_rate: bool = True
    needs_train: bool = True

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> LinearStack:
        """One head a learning rate. Raises ProbeError on rows, rates or fields that cannot be; a head that diverges raises when it predicts."""
        fields, rates, rows = LinearFields.read(NAME, protocol), learning_rates(NAME, lrs), needed(NAME, train)
        features, targets = checked_features(NAME, rows), checked_targets(NAME, rows, classes)
        normaliser = Normaliser.fit(fields.feature_norm, features, device)
        features, generator = on_device(features, device), torch.Generator().manual_seed(seed)
        weight = torch.empty(classes, features.shape[1]).normal_(0, fields.init_std, generator=generator)
        heads = [Head(weight.to(device, copy=True), momentum=fields.momentum, weight_decay=fields.weight_decay) for _ in rates]
        steps = fields.epochs * -(-len(rows) // fields.batch_size)
        step = 0
        for _ in range(fields.epochs):
            for chosen in batch_order(len(rows), fields.batch_size, generator):
                batch = normaliser(features[chosen.to(features.device)].to(device))
                onehot = torch.nn.functional.one_hot(targets[chosen], classes).T.to(device, torch.float32).contiguous()
                for head, lr in zip(heads, rates, strict=True):
                    head.step(batch, onehot, lr * cosine(step, steps))
                step += 1
        return LinearStack(lrs=rates, weights=tuple(h.weight_CD for h in heads), biases=tuple(h.bias_C1[:, 0] for h in heads), normaliser=normaliser)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> LinearStack:
        """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
        fields = LinearFields.read(NAME, protocol)
        if len(state["weight"]) != classes:
            raise ProbeError(
                f"{NAME} probe: expected weights of {classes} classes, got {len(state['weight'])}; restore it for the task it was fitted to"
            )
        normaliser = Normaliser.restore(fields.feature_norm, state, device)
        weight, bias = state["weight"].to(device), state["bias"].to(device)
        return LinearStack(lrs=(float(state["lr"]),), weights=(weight,), biases=(bias,), normaliser=normaliser)


PROBE: Probe = LinearProbe()
