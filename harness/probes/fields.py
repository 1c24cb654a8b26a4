"""How a probe reads the fields of a protocol that concern it: typed, in range, everything else being someone else's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic

from harness.core import FittedStack
from harness.errors import ProbeError

Count = Annotated[int, pydantic.Field(ge=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
NonNegative = Annotated[float, pydantic.Field(ge=0)]
BelowOne = Annotated[float, pydantic.Field(ge=0, lt=1)]
Momentum = BelowOne


def as_tuple(value: object) -> object:
    """A list, as YAML gives it, as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _in_order(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    if bounds is not None and bounds[0] > bounds[1]:
        raise ValueError("expected the lower bound before the upper one")
    return bounds


Bounds = Annotated[tuple[Positive, Positive] | None, pydantic.BeforeValidator(as_tuple), pydantic.AfterValidator(_in_order)]
"""Bounds of the learning rates that are searched, at the protocol's batch size, in place of the sweep's; the same twice is one fixed rate."""


class Fields(pydantic.BaseModel):
    """Base of a probe's protocol fields: each with its type, range and default."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, probe: str, protocol: Mapping[str, Any]) -> Self:
        """The fields that `protocol` sets, and defaults for the others. Raises ProbeError on a value that a field cannot take."""
        try:
            return cls.model_validate(dict(protocol))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(each) for each in first["loc"])
            expected = first["msg"][:1].lower() + first["msg"][1:]
            raise ProbeError(f"{probe} probe: protocol field {name}: {expected}, got {first['input']!r}; correct it in the protocol") from None


class EpochFields(Fields):
    """Of a probe on banks whose heads are looked at after every epoch, where the protocol asks for it."""

    epoch: Literal["last", "best"] = "last"
    """What a head is: as the last epoch left it, or as the one did after which its value on the selection split is highest (the first of equals)."""


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
