"""The linear probe: a stack of softmax classifiers, one a learning rate, trained by SGD in one pass over the rows.

Shape legend: B batch, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.core import State
from harness.probes.classifier import ClassifierFields, ClassifierProbe
from harness.probes.heads import Head


class LinearFields(ClassifierFields):
    """Defaults: the linear probe of Zhu et al., TMLR 2023 (arXiv 2301.11915), which is that of MAE without its batch norm."""


class LinearHead(Head[LinearFields, torch.Tensor]):
    """One softmax classifier and its momentum. The gradient of the cross entropy is written out: it is one subtraction."""

    def __init__(self, tensors: State, fields: LinearFields) -> None:
        self.weight_CD, self.bias_C1 = tensors["weight"], tensors["bias"][:, None]
        self._velocity_CD, self._velocity_C1 = torch.zeros_like(self.weight_CD), torch.zeros_like(self.bias_C1)
        self._momentum, self._weight_decay = fields.momentum, fields.weight_decay

    @classmethod
    def drawn(cls, width: int, classes: int, fields: LinearFields, generator: torch.Generator) -> State:
        return {"weight": torch.empty(classes, width).normal_(0, fields.init_std, generator=generator), "bias": torch.zeros(classes)}

    @staticmethod
    def shape(state: State) -> tuple[int, int]:
        classes, width = state["weight"].shape
        return width, classes

    def step(self, inputs: torch.Tensor, target: torch.Tensor, lr: float, seeds: tuple[int, int]) -> None:
        """One step of torch.optim.SGD on the mean cross entropy of inputs [B, D] with one-hot classes [C, B]."""
        share = 1 / len(inputs)
        gradient_CB = torch.addmm(self.bias_C1, self.weight_CD, inputs.T).softmax(dim=0).sub_(target)
        self._velocity_CD.addmm_(gradient_CB, inputs, beta=self._momentum, alpha=share)
        self._velocity_C1.mul_(self._momentum).add_(gradient_CB.sum(dim=1, keepdim=True), alpha=share)
        if self._weight_decay:
            self._velocity_CD.add_(self.weight_CD, alpha=self._weight_decay)
            self._velocity_C1.add_(self.bias_C1, alpha=self._weight_decay)
        self.weight_CD.add_(self._velocity_CD, alpha=-lr)
        self.bias_C1.add_(self._velocity_C1, alpha=-lr)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias_C1[:, 0], inputs, self.weight_CD.T)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight_CD, "bias": self.bias_C1[:, 0]}

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._all().items()}

    def load(self, state: State) -> None:
        for name, tensor in self._all().items():
            tensor.copy_(state[name])

    def _all(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight_CD, "bias": self.bias_C1, "velocity/weight": self._velocity_CD, "velocity/bias": self._velocity_C1}


@dataclass(frozen=True, kw_only=True)
class LinearProbe(ClassifierProbe[LinearFields]):
    """Softmax regression by SGD with momentum and a cosine to 0, without warm-up."""

    def target(self, labels: torch.Tensor, classes: int, device: torch.device) -> torch.Tensor:
        """One-hot, float32 [C, B]."""
        return torch.nn.functional.one_hot(labels, classes).T.to(device, torch.float32).contiguous()


PROBE = LinearProbe(name="linear", fields=LinearFields, head=LinearHead, rate_name="value")
