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
PositiveAsWritten = Annotated[int | float, pydantic.Field(gt=0)]
"""A positive number that a record has as it was written: 56 stays 56."""
T = TypeVar("T")
Several = Annotated[tuple[T, ...], pydantic.Field(min_length=1)]


def in_order(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds. Raises ValueError where the upper one comes first."""
    if bounds[0] > bounds[1]:
        raise ValueError(f"expected bounds in order, got {bounds[0]:g} before {bounds[1]:g}")
    return bounds


Bounds = Annotated[tuple[PositiveAsWritten, PositiveAsWritten], pydantic.AfterValidator(in_order)]


class EpochFields(Fields):
    """Of a probe on banks whose heads are looked at after every epoch, where the protocol asks for it."""

    epoch: Literal["last", "best"] = "last"
    """What a head is: as the last epoch left it, or as the one did after which its value on the selection split is highest (the first of equals)."""


class TrainedFields(Fields):
    """Of a probe that is trained for a number of epochs."""

    epochs: Count = 90


class RateFields(Fields):
    """Of a probe whose protocol may have bounds of its own for the learning rates."""

    lr_bounds: Bounds | None = None
    """Bounds of the learning rates that are searched, at the protocol's batch size, in place of the sweep's; the same twice is one fixed rate."""


class MaskFields(Fields):
    """Of a probe that reads label maps, or marks of tokens."""

    mask: Literal["object", "part", "misplaced"] = "object"

    def ignored(self) -> tuple[str, tuple[int, ...]] | None:
        """The field that names the labels that do not count, and these; None where all do."""
        return None


class PoolFields(Fields):
    """Of a probe that reads no training rows, so that any split may be scored."""

    pool: Literal["test", "train", "all"] = "test"
    """The splits whose rows query and are found; who reads the banks brings them together."""


def epoch_of(protocol: Fields) -> Literal["last", "best"]:
    """What a head is, as `EpochFields` has it."""
    return protocol.epoch if isinstance(protocol, EpochFields) else "last"


def epochs_of(protocol: Fields) -> int | None:
    """How long a head is trained; None where its probe counts no epochs."""
    return protocol.epochs if isinstance(protocol, TrainedFields) else None


def lr_bounds_of(protocol: Fields) -> tuple[float, float] | None:
    """The protocol's own bounds of the learning rates, None for the sweep's."""
    return protocol.lr_bounds if isinstance(protocol, RateFields) else None


def mask_of(protocol: Fields) -> str | None:
    """What the probe reads beside features, if anything."""
    return protocol.mask if isinstance(protocol, MaskFields) else None


def pool_of(protocol: Fields) -> Literal["test", "train", "all"]:
    """The splits whose rows are scored together."""
    return protocol.pool if isinstance(protocol, PoolFields) else "test"


AfterEpoch = Callable[[FittedStack], None]
"""Called with the heads as they are after an epoch; their tensors change with the next one."""


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
