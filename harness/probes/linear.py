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

import torch

from harness.core import Probe, Rows
from harness.probes.augmented import KeptRows
from harness.probes.features import (
    FeatureNorm,
    Normaliser,
    batch_order,
    checked_features,
    checked_targets,
    needed,
    on_device,
)
from harness.probes.fields import AfterEpoch, Bounds, Count, Fields, Momentum, NonNegative, learning_rates
from harness.probes.schedule import Anneal, annealed
from harness.probes.softmax import SoftmaxStack, restored

NAME = "linear"
KNOB = "learning rate"


class LinearFields(Fields):
    """Defaults: the linear probe of Zhu et al., TMLR 2023 (arXiv 2301.11915), which is that of MAE without its batch norm."""

    epochs: Count = 90
    batch_size: Count = 1024
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 0.0
    """On weights and biases alike, as torch.optim.SGD does."""
    init_std: NonNegative = 0.01
    feature_norm: FeatureNorm = "none"
    anneal: Anneal = "step"
    lr_bounds: Bounds = None


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

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, by name, on the CPU; copies."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors().items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight_CD, "bias": self.bias_C1, "velocity/weight": self._velocity_CD, "velocity/bias": self._velocity_C1}


@dataclass(frozen=True)
class LinearProbe:
    """Softmax regression by SGD with momentum and a cosine to 0, without warm-up; `lrs` are the actual rates at the protocol's batch size."""

    name: str = NAME
    has_learning_rate: bool = True
    needs_train: bool = True

    def fit(
        self,
        train: Rows | None,
        lrs: Sequence[float | None],
        *,
        classes: int,
        protocol: Mapping[str, Any],
        seed: int,
        device: torch.device,
        after_epoch: AfterEpoch | None = None,
    ) -> SoftmaxStack:
        """One head a learning rate. Raises ProbeError on rows, rates or fields that cannot be; a head that diverges raises when it predicts."""
        fields, rates, rows = LinearFields.read(NAME, protocol), learning_rates(NAME, lrs), needed(NAME, train)
        features, targets = checked_features(NAME, rows), checked_targets(NAME, rows, classes)
        kept = KeptRows.of(NAME, rows, protocol)
        normaliser = Normaliser.fit(fields.feature_norm, features, device)
        features, generator = on_device(features, device), torch.Generator().manual_seed(seed)
        weight = torch.empty(classes, features.shape[1]).normal_(0, fields.init_std, generator=generator)
        heads = [Head(weight.to(device, copy=True), momentum=fields.momentum, weight_decay=fields.weight_decay) for _ in rates]
        stack = SoftmaxStack(
            probe=NAME,
            knob=KNOB,
            values=rates,
            weights=tuple(head.weight_CD for head in heads),
            biases=tuple(head.bias_C1[:, 0] for head in heads),
            normaliser=normaliser,
        )
        steps = fields.epochs * -(-kept.images // fields.batch_size)
        step = 0
        for epoch in range(fields.epochs):
            for images in batch_order(kept.images, fields.batch_size, generator):
                chosen = kept.rows(images, epoch)
                batch = normaliser(features[chosen.to(features.device)].to(device))
                onehot = torch.nn.functional.one_hot(targets[chosen], classes).T.to(device, torch.float32).contiguous()
                for head, lr in zip(heads, rates, strict=True):
                    head.step(batch, onehot, lr * annealed(step, steps, epochs=fields.epochs, anneal=fields.anneal))
                step += 1
            if after_epoch is not None:
                after_epoch(stack)
        return stack

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: Mapping[str, Any], seed: int, device: torch.device
    ) -> SoftmaxStack:
        """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
        fields = LinearFields.read(NAME, protocol)
        return restored(state, probe=NAME, knob=KNOB, norm=fields.feature_norm, classes=classes, device=device)


PROBE: Probe = LinearProbe()
