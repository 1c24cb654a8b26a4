"""The logistic-regression probe: L-BFGS to convergence over a grid of inverse regularisations C.

The objective is scikit-learn's: C times the summed cross entropy plus half the squared weights, without a penalty on the biases. Every head is fitted
from zero, so the grid may be cut or extended without changing a value.

Shape legend: N rows, D features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from harness.core import Fields, RowProbe, Rows
from harness.errors import ProbeError
from harness.probes.fields import Count, Positive, Several
from harness.probes.lib.features import FeatureNorm, Features, Normaliser, checked_features, checked_targets, needed, on_device
from harness.probes.lib.softmax import SoftmaxStack, restored

NAME = "logistic"
KNOB = "C"
CHUNK = 2**16
"""Rows per matrix product."""


class LogisticFields(Fields):
    """The defaults are our choice; the grid is evenly spaced in log C, as is usual."""

    c_grid: Several[Positive] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
    max_iterations: Count = 1000
    tolerance: Positive = 1e-5
    """A fit has converged where no element of the gradient of the mean loss is larger than this."""
    feature_norm: FeatureNorm = "standardize"


class Objective:
    """Mean cross entropy plus |W|² / (2 C N) over parameters [C (D + 1)], with its gradient, in chunks of rows.

    In float64 on a CPU; in float32 on other devices, where float64 may be 64 times slower.
    """

    def __init__(self, features: Features, targets: torch.Tensor, normaliser: Normaliser, classes: int, device: torch.device) -> None:
        self._features, self._targets, self._normaliser, self._classes = features, targets, normaliser, classes
        self._device, self.dtype = device, torch.float64 if device.type == "cpu" else torch.float32
        self.size = classes * (features.shape[1] + 1)

    def split(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [C, D] and bias [C], over the parameters' memory."""
        table = parameters.view(self._classes, -1)
        return table[:, :-1], table[:, -1]

    def __call__(self, parameters: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The value [] and the gradient [C (D + 1)]; `penalty` is 1 / (C N)."""
        weight, bias = self.split(parameters)
        gradient = torch.zeros_like(parameters)
        weight_gradient, bias_gradient = self.split(gradient)
        loss = torch.zeros((), dtype=self.dtype, device=self._device)
        rows = len(self._features)
        for start in range(0, rows, CHUNK):
            batch = self._normaliser(self._features[start : start + CHUNK].to(self._device)).to(self.dtype)
            target = self._targets[start : start + CHUNK, None]
            log_probability = torch.addmm(bias, batch, weight.T).log_softmax(dim=1)
            loss -= log_probability.gather(1, target).sum() / rows
            residual = log_probability.exp_()
            residual.scatter_add_(1, target, torch.full_like(target, -1, dtype=self.dtype))
            weight_gradient.addmm_(residual.T, batch, alpha=1 / rows)
            bias_gradient.add_(residual.sum(dim=0), alpha=1 / rows)
        weight_gradient.add_(weight, alpha=penalty)
        return loss + 0.5 * penalty * weight.square().sum(), gradient


def minimise(objective: Objective, penalty: float, fields: LogisticFields, device: torch.device) -> torch.Tensor:
    """The parameters [C (D + 1)] that L-BFGS reaches from zero."""
    parameters = torch.zeros(objective.size, dtype=objective.dtype, device=device)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=fields.max_iterations,
        max_eval=2 * fields.max_iterations,
        tolerance_grad=fields.tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, parameters.grad = objective(parameters, penalty)
        return float(loss)

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return parameters


class LogisticProbe(RowProbe[LogisticFields]):
    """Regularised softmax regression. The `lrs` are the values of C in `grid`; the selection split chooses among them."""

    def grid(self, fields: LogisticFields) -> tuple[float | None, ...]:
        """The protocol's values of C."""
        return fields.c_grid

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: LogisticFields, seed: int, device: torch.device
    ) -> SoftmaxStack:
        """One head per value of C; the seed has no effect. A fit ends at `max_iterations` even where it has not converged.

        Raises ProbeError on invalid rows or values.
        """
        rows = needed(NAME, train)
        values = tuple(value for value in lrs if value is not None and 0 < value < float("inf"))
        if not values or len(values) != len(lrs):
            raise ProbeError(f"{NAME} probe: expected positive values of C, got {list(lrs)}; give those of its grid, {protocol.c_grid}")
        features, targets = checked_features(NAME, rows), checked_targets(NAME, rows, classes).to(device)
        normaliser = Normaliser.fit(protocol.feature_norm, features, device)
        objective = Objective(on_device(features, device), targets, normaliser, classes, device)
        fitted = [objective.split(minimise(objective, 1 / (value * len(rows)), protocol, device)) for value in values]
        return SoftmaxStack(
            probe=NAME,
            knob=KNOB,
            values=values,
            weights=tuple(weight.float().contiguous() for weight, _ in fitted),
            biases=tuple(bias.float().contiguous() for _, bias in fitted),
            normaliser=normaliser,
        )

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: LogisticFields, seed: int, device: torch.device
    ) -> SoftmaxStack:
        """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
        return restored(state, probe=NAME, knob=KNOB, norm=protocol.feature_norm, classes=classes, device=device)


PROBE = LogisticProbe(name=NAME, fields=LogisticFields)
