"""Trained probes: stacks of heads, one per learning rate, under one loop on rows of banks; classifier.py brings heads to streams of images.

A trained probe gives its protocol fields and one head: how its tensors are drawn, a step on a batch, logits, what a checkpoint holds. All else is
here or there: the order of the batches, kept crops, the features' normalisation, the schedule, what is looked at after an epoch, checkpoints.

The heads of a stack share the initialisation, the order of the batches and the reading of each batch. Everything else gives each head the bits that
it would have alone: at a large learning rate SGD makes another model out of another last bit. So heads run one after the other, or several in one
call where that is known to round as one head alone does (`SideBySide`); one wide product over all heads does not.

Shape legend: N rows, B batch, D features, C classes, K heads.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn

from harness.core import Predictions, RowProbe, Rows, State
from harness.errors import ProbeError
from harness.probes.fields import AfterEpoch, Count, Momentum, NonNegative, RateFields, TrainedFields, learning_rates
from harness.probes.lib.augmented import KeptRows
from harness.probes.lib.features import FeatureNorm, Normaliser, batch_order, needed
from harness.probes.lib.schedule import Anneal

VELOCITY = "velocity/"
"""How the names of a network's momentum begin in its checkpoint."""


# --- protocol fields --------------------------------------------------------------------------------------------------


class HeadFields(TrainedFields):
    """Of every trained probe."""

    batch_size: Count = 1024
    momentum: Momentum = 0.9
    """Of SGD."""
    weight_decay: NonNegative = 0.0
    """On weights and biases alike, as torch.optim has it."""
    init_std: NonNegative = 0.01
    """Of the weights that give the outputs; their biases begin at 0."""

    @property
    def norm(self) -> FeatureNorm:
        """How features are normalised before a head sees them."""
        return "none"


class NormedFields(HeadFields):
    """Of a trained probe whose features may be normalised."""

    feature_norm: FeatureNorm = "none"

    @property
    def norm(self) -> FeatureNorm:
        return self.feature_norm


class AnnealedFields(HeadFields, RateFields):
    """Of a trained probe whose rate goes to 0 by a cosine, without warm-up."""

    anneal: Anneal = "step"


F = TypeVar("F", bound=HeadFields)
T = TypeVar("T")
"""What a head's outputs are compared with."""


# --- one head ---------------------------------------------------------------------------------------------------------


class Head(ABC, Generic[F, T]):
    """One head in training, on the device of its tensors."""

    @abstractmethod
    def __init__(self, tensors: State, fields: F) -> None:
        """`tensors` as `drawn` or `tensors` gives them; from here on they are the head's."""

    @classmethod
    @abstractmethod
    def drawn(cls, width: int, classes: int, fields: F, generator: torch.Generator) -> State:
        """The tensors of a new head on `width` features, drawn from a CPU generator. Raises ProbeError where the fields do not allow that width."""

    @staticmethod
    @abstractmethod
    def shape(state: State) -> tuple[int, int]:
        """(features, classes) of the head whose `tensors` or `state` these are."""

    @abstractmethod
    def step(self, inputs: torch.Tensor, target: T, lr: float, seeds: tuple[int, int]) -> None:
        """One step at this learning rate; whatever it draws is a function of `seeds`, the study's and the step's number."""

    @abstractmethod
    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """float32 [B, C]."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the head predicts with, by name; not copies."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, by name, on the CPU; copies."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Continue from what `state` gave."""

    @classmethod
    def together(cls, heads: Sequence[Self]) -> SideBySide[Self]:
        """Several new heads of one shape, to be trained on the same batches."""
        return SideBySide(heads)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    def is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors().values())


H = TypeVar("H", bound=Head[Any, Any])


class SideBySide(Generic[H]):
    """Heads of one shape that take each step on the same batch. Each comes out to the bit as it would have alone."""

    def __init__(self, heads: Sequence[H]) -> None:
        self.heads = tuple(heads)

    def step(self, inputs: torch.Tensor, target: Any, lrs: Sequence[float], seeds: tuple[int, int]) -> None:
        """One step of every head at its own learning rate."""
        for head, lr in zip(self.heads, lrs, strict=True):
            head.step(inputs, target, lr, seeds)


class NetworkHead(Head[F, torch.Tensor]):
    """A torch module under SGD with momentum, on the mean cross entropy with classes, int64 [B]."""

    def __init__(self, tensors: State, fields: F) -> None:
        with torch.device("meta"):  # takes no memory and draws nothing
            self.module = self.network(*self.shape(tensors), fields)
        self.module.load_state_dict(dict(tensors), assign=True)
        self._draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.module.modules())
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0, momentum=fields.momentum, weight_decay=fields.weight_decay, foreach=False)

    @staticmethod
    @abstractmethod
    def network(width: int, classes: int, fields: F) -> nn.Module:
        """The module on `width` features, with any values."""

    @staticmethod
    @abstractmethod
    def initialise(module: nn.Module, fields: F, generator: torch.Generator) -> None:
        """Give the module's parameters their first values, drawn from a CPU generator; biases of torch's linear layers are 0 already."""

    @classmethod
    def drawn(cls, width: int, classes: int, fields: F, generator: torch.Generator) -> State:
        with torch.random.fork_rng(devices=[]):  # what a layer draws for itself when it is made is not used
            module = cls.network(width, classes, fields)
        with torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, nn.Linear) and layer.bias is not None:
                    layer.bias.zero_()
            cls.initialise(module, fields, generator)
        return module.state_dict()

    def step(self, inputs: torch.Tensor, target: torch.Tensor, lr: float, seeds: tuple[int, int]) -> None:
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.zero_grad()
        self.module.train()  # it may have been asked to predict since the last step
        with seeded(*seeds, inputs.device) if self._draws else contextlib.nullcontext():
            torch.autograd.backward(nn.functional.cross_entropy(self.module(inputs), target))
        self._optimizer.step()

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module.eval()(inputs)
        return logits

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.module.state_dict())

    def state(self) -> dict[str, torch.Tensor]:
        """The module's tensors, and the momentum, which is there from the first step on."""
        velocities = {
            f"{VELOCITY}{name}": buffer
            for name, parameter in self.module.named_parameters()
            if (buffer := self._optimizer.state[parameter].get("momentum_buffer")) is not None
        }
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in (self.tensors() | velocities).items()}

    def load(self, state: State) -> None:
        self.module.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(VELOCITY)})
        for name, parameter in self.module.named_parameters():
            if f"{VELOCITY}{name}" in state:
                self._optimizer.state[parameter]["momentum_buffer"] = state[f"{VELOCITY}{name}"].to(parameter.device, copy=True)


class AffineHead(Head[F, T]):
    """A weight and a bias under an optimiser of torch, whose gradients are written out."""

    def __init__(self, tensors: State, optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> None:
        self.weight, self.bias = tensors["weight"], tensors["bias"]
        self._optimizer = optimizer([self.weight, self.bias])

    def descend(self, weight_gradient: torch.Tensor, bias_gradient: torch.Tensor, lr: float) -> None:
        """One step of the optimiser."""
        self.weight.grad, self.bias.grad = weight_gradient, bias_gradient
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def state(self) -> dict[str, torch.Tensor]:
        """Weight, bias, and for each of them what the optimiser keeps, as `<name>/<what>`."""
        moments = {
            f"{name}/{key}": value
            for name, tensor in self.tensors().items()
            for key, value in self._optimizer.state[tensor].items()
            if value is not None
        }
        return {name: tensor.to("cpu", copy=True) for name, tensor in (self.tensors() | moments).items()}

    def load(self, state: State) -> None:
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
            moments = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            # AdamW keeps its count of steps on the CPU
            self._optimizer.state[tensor] = {
                key: value.clone() if key == "step" else value.to(tensor.device, copy=True) for key, value in moments.items()
            }


def sgd_or_adamw(name: str, *, momentum: float, weight_decay: float) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """An optimiser of parameters, whose rate is set at every step; AdamW has betas 0.9 and 0.999."""
    if name == "adamw":
        return lambda parameters: torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay, foreach=False)
    return lambda parameters: torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, foreach=False)


@contextlib.contextmanager
def seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Everything that torch draws here is a function of (seed, step); the process's own random states stay as they were."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:4], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield


# --- a stack of heads on rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Training rows as a head sees them."""

    width: int
    """Features."""
    normaliser: Normaliser
    batch: Callable[[torch.Tensor], tuple[torch.Tensor, Any] | None]
    """Inputs and targets of the rows at int64 [B], on the device; None where these rows have nothing to train on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadStack(Generic[F]):
    """K heads, fitted or in training."""

    probe: TrainedProbe[F]
    fields: F
    rates: tuple[float, ...]
    heads: tuple[Head[F, Any], ...]
    normaliser: Normaliser
    seed: int

    def predict(self, rows: Rows, head: int) -> Predictions:
        """Raises ProbeError where `rows` do not fit, or the head's training diverged."""
        return self.probe.predict(self, rows, head)

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """The head's tensors, its learning rate [], and the training features' mean and std [D] where they are standardised."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.heads[head].tensors().items()}
        return tensors | {self.probe.rate_name: torch.tensor(self.rates[head], dtype=torch.float64)} | self.normaliser.state()

    def diverged(self, head: int, values: str = "outputs") -> ProbeError:
        """What to raise for it."""
        rate = self.rates[head]
        return ProbeError(f"{self.probe.name} probe: expected finite {values}, got NaN or infinity at learning rate {rate:g}; search below it")


@dataclass(frozen=True, kw_only=True)
class TrainedProbe(RowProbe[F]):
    """A probe whose heads are trained by the loop; `lrs` are the actual rates at the protocol's batch size."""

    head: type[Head[F, Any]]
    has_learning_rate: bool = True
    rate_name: str = "lr"
    """What the learning rate is called beside a fitted head's tensors, whose names may be neither that nor `mean` or `std`."""

    @abstractmethod
    def examples(self, rows: Rows, classes: int, fields: F, device: torch.device) -> Examples:
        """Raises ProbeError where the rows cannot be trained on."""

    @abstractmethod
    def factor(self, step: int, steps: int, fields: F) -> float:
        """The learning rate of a step, 0 to steps - 1, as a factor of the rate given."""

    @abstractmethod
    def predict(self, stack: HeadStack[F], rows: Rows, head: int) -> Predictions:
        """Raises ProbeError where `rows` do not fit, or the head's training diverged."""

    def fit(
        self,
        train: Rows | None,
        lrs: Sequence[float | None],
        *,
        classes: int,
        protocol: F,
        seed: int,
        device: torch.device,
        after_epoch: AfterEpoch | None = None,
    ) -> HeadStack[F]:
        """One head a learning rate. Raises ProbeError on rows, rates or fields that cannot be; a head that diverges raises when it predicts."""
        fields, rates, rows = protocol, learning_rates(self.name, lrs), needed(self.name, train)
        crops = KeptRows.of(self.name, rows, protocol)
        examples = self.examples(rows, classes, fields, device)
        generator = torch.Generator().manual_seed(seed)
        drawn = self.head.drawn(examples.width, classes, fields, generator)
        heads = self.head.together([self.head(copied(drawn, device), fields) for _ in rates])
        stack = HeadStack(probe=self, fields=fields, rates=rates, heads=heads.heads, normaliser=examples.normaliser, seed=seed)
        steps, step = fields.epochs * -(-crops.images // fields.batch_size), 0
        for epoch in range(fields.epochs):
            for images in batch_order(crops.images, fields.batch_size, generator):
                batch = examples.batch(crops.rows(images, epoch))
                if batch is not None:
                    factor = self.factor(step, steps, fields)
                    heads.step(*batch, [lr * factor for lr in rates], (seed, step))
                step += 1
            if after_epoch is not None:
                after_epoch(stack)
        return stack

    def restore(self, state: State, train: Rows | None, *, classes: int, protocol: F, seed: int, device: torch.device) -> HeadStack[F]:
        """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
        tensors = {name: tensor for name, tensor in state.items() if name not in (self.rate_name, "mean", "std")}
        if (got := self.head.shape(tensors)[1]) != classes:
            raise ProbeError(f"{self.name} probe: expected weights of {classes} classes, got {got}; restore it for the task it was fitted to")
        return HeadStack(
            probe=self,
            fields=protocol,
            rates=(float(state[self.rate_name]),),
            heads=(self.head(copied(tensors, device), protocol),),
            normaliser=Normaliser.restore(protocol.norm, state, device),
            seed=seed,
        )


def copied(tensors: State, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
