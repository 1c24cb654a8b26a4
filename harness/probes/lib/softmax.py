"""Fitted softmax classifiers: what the linear and the logistic probe both end in.

Shape legend: N rows, D features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from harness.core import Predictions, Rows
from harness.errors import ProbeError
from harness.probes.lib.features import CHUNK_ROWS, FeatureNorm, Normaliser, checked_features


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftmaxStack:
    """K fitted heads."""

    probe: str
    knob: str
    """What the heads differ in, in words."""
    values: tuple[float, ...]
    """The heads' own."""
    weights: tuple[torch.Tensor, ...]
    """K of float32 [C, D]."""
    biases: tuple[torch.Tensor, ...]
    """K of float32 [C]."""
    normaliser: Normaliser

    def probabilities(self, rows: Rows, head: int) -> torch.Tensor:
        """float32 [N, C], on the CPU. Raises ProbeError where `rows` do not fit, or the head's training diverged."""
        weight, bias = self.weights[head], self.biases[head]
        features = checked_features(self.probe, rows, width=weight.shape[1])
        chunks = []
        for start in range(0, len(rows), CHUNK_ROWS):
            batch = self.normaliser(features[start : start + CHUNK_ROWS].to(weight.device))
            chunks.append(torch.addmm(bias, batch, weight.T).softmax(dim=1).cpu())
        probabilities = torch.cat(chunks)
        if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all()) and bool(probabilities.isfinite().all())):
            value = self.values[head]
            raise ProbeError(f"{self.probe} probe: expected finite outputs, got NaN or infinity at {self.knob} {value:g}; search below it")
        return probabilities

    def predict(self, rows: Rows, head: int) -> Predictions:
        """The most probable class of each row (the lowest of equals) and its probability. Raises ProbeError as `probabilities` does."""
        return most_probable(rows, self.probabilities(rows, head))

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """weight [C, D], bias [C], value [], and the training rows' mean and std [D] where features are standardised."""
        value = torch.tensor(self.values[head], dtype=torch.float64)
        return {"weight": self.weights[head].cpu(), "bias": self.biases[head].cpu(), "value": value} | self.normaliser.state()


def restored(state: Mapping[str, torch.Tensor], *, probe: str, knob: str, norm: FeatureNorm, classes: int, device: torch.device) -> SoftmaxStack:
    """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
    if len(state["weight"]) != classes:
        raise ProbeError(
            f"{probe} probe: expected weights of {classes} classes, got {len(state['weight'])}; restore it for the task it was fitted to"
        )
    return SoftmaxStack(
        probe=probe,
        knob=knob,
        values=(float(state["value"]),),
        weights=(state["weight"].to(device),),
        biases=(state["bias"].to(device),),
        normaliser=Normaliser.restore(norm, state, device),
    )


def most_probable(rows: Rows, probabilities: torch.Tensor) -> Predictions:
    """Predictions from probabilities [N, C] on the CPU: the highest, the lowest class of equals."""
    scores, predictions = probabilities.max(dim=1)
    return Predictions(
        keys=rows.keys,
        groups=rows.groups,
        targets=np.asarray(rows.targets, dtype=np.int64),
        predictions=predictions.numpy(),
        scores=scores.double().numpy(),
    )
