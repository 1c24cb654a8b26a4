"""Types of protocol fields, and the fields that several probes have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

import pydantic

from harness.core import Fields, FittedStack
from harness.errors import ProbeError

Count = Annotated[int, pydantic.Field(ge=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
NonNegative = Annotated[float, pydantic.Field(ge=0)]
BelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
Momentum = BelowOne
Share = Annotated[float, pydantic.Field(gt=0, le=1)]
Probability = Annotated[float, pydantic.Field(ge=0, le=1)]
PositiveAsWritten = Annotated[int | float, pydantic.Field(gt=0)]
"""A positive number that a record keeps as it was written: 56 stays 56."""
T = TypeVar("T")
Several = Annotated[tuple[T, ...], pydantic.Field(min_length=1)]


def in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds. Raises ValueError where the upper one comes first."""
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected bounds in order, got {bounds[0]:g} before {bounds[1]:g}")
    return bounds


Bounds = Annotated[tuple[PositiveAsWritten, PositiveAsWritten], pydantic.AfterValidator(in_order)]


class EpochFields(Fields):
    """For a probe on banks whose heads can be evaluated after every epoch."""

    epoch: Literal["last", "best"] = "last"
    """Which epoch's state the head keeps: the last, or the one with the highest value on the selection split (the first of equals)."""


class TrainedFields(Fields):
    """For a probe that is trained for a number of epochs."""

    epochs: Count = 90


class RateFields(Fields):
    """For a probe whose protocol may set its own bounds for the learning rates."""

    lr_bounds: Bounds | None = None
    """Bounds of the learning-rate search at the protocol's batch size, in place of the sweep's; two equal bounds fix the rate."""


class MaskFields(Fields):
    """For a probe that reads label maps, or marks of tokens."""

    mask: Literal["object", "part", "misplaced"] = "object"

    def ignored(self) -> tuple[str, tuple[int, ...]] | None:
        """The field that lists the labels that do not count, and these labels; None where all labels count."""
        return None


class PoolFields(Fields):
    """For a probe that reads no training rows, so that any split may be scored."""

    pool: Literal["test", "train", "all"] = "test"
    """The splits whose rows are queries and gallery; the reader of the banks concatenates them."""


def epoch_of(protocol: Fields) -> Literal["last", "best"]:
    """Which epoch's state a head keeps, as in `EpochFields`."""
    return protocol.epoch if isinstance(protocol, EpochFields) else "last"


def epochs_of(protocol: Fields) -> int | None:
    """The number of epochs that a head is trained for; None where its probe counts no epochs."""
    return protocol.epochs if isinstance(protocol, TrainedFields) else None


def lr_bounds_of(protocol: Fields) -> tuple[float, float] | None:
    """The protocol's own bounds of the learning rates; None for the sweep's."""
    return protocol.lr_bounds if isinstance(protocol, RateFields) else None


def mask_of(protocol: Fields) -> str | None:
    """The masks that the probe reads beside features; None where it reads none."""
    return protocol.mask if isinstance(protocol, MaskFields) else None


def pool_of(protocol: Fields) -> Literal["test", "train", "all"]:
    """The splits whose rows are scored together."""
    return protocol.pool if isinstance(protocol, PoolFields) else "test"


AfterEpoch = Callable[[FittedStack], None]
"""Called with the heads after each epoch; the next epoch changes their tensors in place."""


def learning_rates(probe: str, lrs: Sequence[float | None]) -> tuple[float, ...]:
    """`lrs` as positive finite floats, at least one. Raises ProbeError otherwise."""
    for lr in lrs:
        if lr is None or not 0 < lr < float("inf"):
            raise ProbeError(f"{probe} probe: expected positive learning rates, got {lr}; give one per head")
    if not lrs:
        raise ProbeError(f"{probe} probe: expected at least one learning rate, got none; give one per head")
    return tuple(float(lr) for lr in lrs if lr is not None)


def no_learning_rate(probe: str, lrs: Sequence[float | None]) -> None:
    """Raises ProbeError unless `lrs` is one None: the probe has a single head and nothing to search."""
    if list(lrs) != [None]:
        raise ProbeError(f"{probe} probe: expected [None] in place of learning rates, got {list(lrs)}; it has one head and trains nothing")
