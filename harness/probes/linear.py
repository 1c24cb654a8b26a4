"""The linear probe: a stack of softmax classifiers, one a learning rate, trained by SGD in one pass over the rows.

Shape legend: B batch, D features, C classes, K heads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from harness.core import State
from harness.probes.classifier import ClassifierFields, ClassifierProbe
from harness.probes.heads import Head, SideBySide

GROUPED_LOGITS = 2**19
"""Logits of the heads that take a step in one call: 2 MiB, since more do not stay in a core's cache between the two products."""
SOFTMAX_CLASSES = 64
"""Classes up to which a softmax reads columns of whole batches: a cache line of each class stays in the first cache."""
SOFTMAX_COLUMNS = 144
"""Columns of a softmax over more classes, in whole vectors of 16, so that no column changes the way it is computed; and an odd number of them, since
rows that lie a power of two apart share few lines of a cache."""


class LinearFields(ClassifierFields):
    """Defaults: the linear probe of Zhu et al., TMLR 2023 (arXiv 2301.11915), which is that of MAE without its batch norm."""


class LinearHead(Head[LinearFields, torch.Tensor]):
    """One softmax classifier and its momentum. The gradient of the cross entropy is written out: it is one subtraction."""

    def __init__(self, tensors: State, fields: LinearFields) -> None:
        self.weight_CD, self.bias_C1 = tensors["weight"], tensors["bias"][:, None]
        self.velocity_CD, self.velocity_C1 = torch.zeros_like(self.weight_CD), torch.zeros_like(self.bias_C1)
        self.fields = fields

    @classmethod
    def drawn(cls, width: int, classes: int, fields: LinearFields, generator: torch.Generator) -> State:
        return {"weight": torch.empty(classes, width).normal_(0, fields.init_std, generator=generator), "bias": torch.zeros(classes)}

    @staticmethod
    def shape(state: State) -> tuple[int, int]:
        classes, width = state["weight"].shape
        return width, classes

    @classmethod
    def together(cls, heads: Sequence[LinearHead]) -> LinearHeads:
        return LinearHeads(heads)

    def step(self, inputs: torch.Tensor, target: torch.Tensor, lr: float, seeds: tuple[int, int]) -> None:
        """One step of torch.optim.SGD on the mean cross entropy of inputs [B, D] with classes, int64 [B]."""
        share, momentum, decay = 1 / len(inputs), self.fields.momentum, self.fields.weight_decay
        gradient_CB = probabilities(torch.addmm(self.bias_C1, self.weight_CD, inputs.T))
        gradient_CB.scatter_add_(0, target[None], gradient_CB.new_full((1, len(inputs)), -1.0))
        self.velocity_CD.addmm_(gradient_CB, inputs, beta=momentum, alpha=share)
        self.velocity_C1.mul_(momentum).add_(gradient_CB.sum(dim=1, keepdim=True), alpha=share)
        if decay:
            self.velocity_CD.add_(self.weight_CD, alpha=decay)
            self.velocity_C1.add_(self.bias_C1, alpha=decay)
        self.descend(lr)

    def descend(self, lr: float) -> None:
        """Follow the velocities."""
        self.weight_CD.add_(self.velocity_CD, alpha=-lr)
        self.bias_C1.add_(self.velocity_C1, alpha=-lr)

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
        return {"weight": self.weight_CD, "bias": self.bias_C1, "velocity/weight": self.velocity_CD, "velocity/bias": self.velocity_C1}


class LinearHeads(SideBySide[LinearHead]):
    """Heads whose tensors lie side by side, so that a step of several is one batched product each way, where that gives each head its own bits."""

    def __init__(self, heads: Sequence[LinearHead]) -> None:
        super().__init__(heads)
        self._weight_KCD = torch.stack([head.weight_CD for head in heads])
        self._bias_KC1 = torch.stack([head.bias_C1 for head in heads])
        self._velocity_KCD = torch.stack([head.velocity_CD for head in heads])
        self._velocity_KC1 = torch.stack([head.velocity_C1 for head in heads])
        for place, head in enumerate(heads):
            head.weight_CD, head.bias_C1 = self._weight_KCD[place], self._bias_KC1[place]
            head.velocity_CD, head.velocity_C1 = self._velocity_KCD[place], self._velocity_KC1[place]

    def step(self, inputs: torch.Tensor, target: torch.Tensor, lrs: Sequence[float], seeds: tuple[int, int]) -> None:
        """One step of every head at its own learning rate."""
        (count, classes, width), batch = self._weight_KCD.shape, len(inputs)
        size = max(1, GROUPED_LOGITS // (classes * batch))
        for start in range(0, count, size):
            stop = min(start + size, count)
            # several threads share a call's work out by its size, and with it the rounding
            if stop - start > 1 and torch.get_num_threads() == 1 and rounds_alike(stop - start, classes, width, batch, inputs.device):
                self.step_in_one(inputs, target, lrs, slice(start, stop))
            else:
                for head, lr in zip(self.heads[start:stop], lrs[start:stop], strict=True):
                    head.step(inputs, target, lr, seeds)

    def step_in_one(self, inputs: torch.Tensor, target: torch.Tensor, lrs: Sequence[float], which: slice) -> None:
        """`LinearHead.step` of the heads at `which`, their products batched."""
        heads, fields, share = self.heads[which], self.heads[0].fields, 1 / len(inputs)
        weight, bias, velocity, bias_velocity = (
            tensor[which] for tensor in (self._weight_KCD, self._bias_KC1, self._velocity_KCD, self._velocity_KC1)
        )
        gradient_KCB = probabilities(torch.baddbmm(bias, weight, inputs.T.expand(len(heads), -1, -1)))
        gradient_KCB.scatter_add_(1, target.expand(len(heads), 1, -1), gradient_KCB.new_full((1, 1, 1), -1.0).expand(len(heads), 1, len(inputs)))
        velocity.baddbmm_(gradient_KCB, inputs.expand(len(heads), -1, -1), beta=fields.momentum, alpha=share)
        bias_velocity.mul_(fields.momentum).add_(gradient_KCB.sum(dim=2, keepdim=True), alpha=share)
        if fields.weight_decay:
            velocity.add_(weight, alpha=fields.weight_decay)
            bias_velocity.add_(bias, alpha=fields.weight_decay)
        for head, lr in zip(heads, lrs[which], strict=True):
            head.descend(lr)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The softmax over classes of logits [..., C, B]."""
    if logits.shape[-2] <= SOFTMAX_CLASSES or logits.device.type != "cpu" or torch.get_num_threads() > 1:
        return logits.softmax(dim=-2)
    for columns in torch.split(logits, SOFTMAX_COLUMNS, dim=-1):
        columns.copy_(columns.softmax(dim=-2))
    return logits


@functools.lru_cache(maxsize=1024)
def rounds_alike(heads: int, classes: int, width: int, batch: int, device: torch.device) -> bool:
    """Whether so many heads' steps in one call give each of them, to the bit, what its own step does.

    Tried, on random heads and rows: a library may give a batch of products other kernels, by their sizes, than the same product alone.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    inputs, target = normal(batch, width), torch.randint(0, classes, (batch,), generator=generator).to(device)
    fields, lrs = LinearFields(weight_decay=1e-4), [0.1 / (1 + place) for place in range(heads)]
    alone = [LinearHead({"weight": normal(classes, width), "bias": normal(classes)}, fields) for _ in range(heads)]
    copies = [LinearHead({name: tensor.clone() for name, tensor in head.tensors().items()}, fields) for head in alone]
    together = LinearHeads(copies)
    for step in range(2):  # the second has a momentum
        together.step_in_one(inputs, target, lrs, slice(None))
        for head, lr in zip(alone, lrs, strict=True):
            head.step(inputs, target, lr, (0, step))
    return all(torch.equal(tensor, copy.state()[name]) for head, copy in zip(alone, copies, strict=True) for name, tensor in head.state().items())


PROBE = ClassifierProbe(name="linear", fields=LinearFields, head=LinearHead, rate_name="value")
