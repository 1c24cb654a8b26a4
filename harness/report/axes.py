"""The fields that curves run along: what they are called, how they are spaced, and which of their values stand apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.report.units import plain

KEPT = "kept_share"
_MOST_TICKS = 7

Value = str | float | int | bool | None


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How a field is drawn and worded."""

    label: str
    log: bool = False
    """Whether doublings are equal steps."""
    percent: bool = False
    apart: Mapping[Value, str] = field(default_factory=dict)
    """Values that are not quantities of the axis, and what they stand for."""
    connects_apart: bool = False
    """Whether these nevertheless follow the others on the same line."""

    def text(self, value: Value) -> str:
        """A value as text."""
        if value in self.apart:
            return self.apart[value]
        if value is None:
            return "not set"
        if isinstance(value, int | float) and not isinstance(value, bool):
            return f"{100 * value:g} %" if self.percent else f"{value:g}"
        return plain(value, 24)


AXES: Mapping[str, Axis] = {
    "bag_size": Axis(label="patches in a bag", log=True, apart={0: "whole image"}),
    "patch_side": Axis(label="patch side, pixels of a frame of 224", log=True),
    "patch_area": Axis(label="patch area, share of the frame", percent=True),
    KEPT: Axis(label="tokens kept", percent=True),
    "theta": Axis(label="θ, tokens misplaced", percent=True),
    "grid": Axis(label="cells a side", log=True, apart={0: "its own patches"}),
    "block": Axis(label="block (negative: from the last)", apart={None: "final norm"}, connects_apart=True),
}


def order(name: str, value: Value) -> tuple[int, float, str]:
    """The sort key of a field's values: numbers by size, then words, then what stands apart or is not set."""
    if value is None or value in axis_of(name).apart:
        return 2, float(value) if isinstance(value, int | float) else 0.0, ""
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, value)


def axis_of(name: str) -> Axis:
    return AXES.get(name, Axis(label=name.replace("_", " ")))


def field_text(name: str, value: Value) -> str:
    """A field and its value, as in `tokens kept 50 %`."""
    axis = axis_of(name)
    return axis.text(value) if value in axis.apart else f"{axis.label} {axis.text(value)}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """Where the values of a field lie on its axis, in the axis' own units: quantities first, what stands apart to their right."""

    at: Mapping[Value, float]
    apart: frozenset[Value]
    """Those to the right."""
    axis: Axis

    def is_on_line(self, value: Value) -> bool:
        return self.axis.connects_apart or value not in self.apart

    def dress(self, axes: Any) -> None:
        """Ticks, limits and label of a matplotlib axes' x axis."""
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        shown = self._ticks()
        axes.xaxis.set_major_locator(FixedLocator([self.at[value] for value in shown]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FixedFormatter([self.axis.text(value).replace(" ", "\n") if value in self.apart else self._short(value) for value in shown])
        )
        places = list(self.at.values())
        room = 0.08 * (max(places) - min(places)) or 0.5
        axes.set_xlim(min(places) - room, max(places) + room)
        axes.set_xlabel(f"{self.axis.label} (%)" if self.axis.percent else self.axis.label)

    def _short(self, value: Value) -> str:
        return self.axis.text(value).removesuffix(" %")

    def _ticks(self) -> list[Value]:
        """All values, or where there are many an even selection of the quantities."""
        quantities = [value for value in self.at if value not in self.apart]
        step = -(-len(quantities) // _MOST_TICKS)
        return [*quantities[:: step or 1], *[value for value in self.at if value in self.apart]]


def positions(name: str, values: Sequence[Value]) -> Positions:
    """Quantities by size (their logarithm where the axis says so), words one after the other, and then what stands apart."""
    axis = axis_of(name)
    on_line = [value for value in values if value not in axis.apart and value is not None]
    apart = [value for value in values if value in axis.apart or value is None]
    quantities = {value: float(value) for value in on_line if isinstance(value, int | float)}
    at: dict[Value, float] = {value: float(place) for place, value in enumerate(on_line)}
    if len(quantities) == len(on_line):
        log = axis.log and all(quantity > 0 for quantity in quantities.values())
        at = {value: math.log2(quantity) if log else quantity for value, quantity in quantities.items()}
    spread = sorted(at.values())
    reach = spread[-1] - spread[0] if len(spread) > 1 else 1.0
    step = reach / max(2, min(len(spread), 5)) if at else 1.0
    start = spread[-1] if spread else 0.0
    return Positions(at=at | {value: start + (place + 1) * step for place, value in enumerate(apart)}, apart=frozenset(apart), axis=axis)
