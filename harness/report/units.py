"""How a metric's value is written. Values are fractions everywhere else; only here they become percent.

A metric is a fraction unless its `unit` says otherwise ("nats", say); values of other units are written as they are.
"""

from __future__ import annotations

import math
import unicodedata
from typing import Any, TypeGuard

from harness.core import FRACTION as FRACTION
from harness.metrics import sense
from harness.probes import all_metrics

NONE = "–"


def unit(metric: str | None) -> str | None:
    """The unit of the metric of that name, at any level of the classes; None where this version does not know the metric."""
    name = str(metric).partition("@")[0]
    return all_metrics()[name].unit if name in all_metrics() else None


def sense_of(metric: str | None) -> int:
    """1 where higher is better for the metric of that name, -1 where lower is."""
    name = str(metric).partition("@")[0]
    return sense(all_metrics()[name]) if name in all_metrics() else 1


def is_defined(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number: neither None nor NaN."""
    return value is not None and not math.isnan(value)


def known_chance(metric: str | None) -> float | None:
    """The metric's value at chance, where its definition alone gives it; None otherwise."""
    return 0.5 if metric in ("AUROC", "balanced_accuracy") else None


def label(metric: str | None) -> str:
    """A metric with its unit, where its name does not say it."""
    measure = unit(metric)
    return f"{metric} (%)" if measure == FRACTION else str(metric) if measure is None or measure == metric else f"{metric} ({measure})"


def scale(metric: str | None) -> float:
    """The factor of a value before it is shown."""
    return 100.0 if unit(metric) == FRACTION else 1.0


def number(value: float | None, metric: str | None, *, signed: bool = False) -> str:
    """A value as text: percent with one decimal for fractions, three significant digits otherwise, a dash where undefined."""
    if not is_defined(value):
        return NONE
    sign = "+" if signed and value else ""
    if unit(metric) != FRACTION:
        return f"{value:{sign}.3g}".replace("-", "−")
    percent = round(100 * value, 1) + 0.0
    if signed and not percent and value:
        return f"{100 * value:+.1g}".replace("-", "−")  # a difference is read for its sign
    return f"{percent:{sign}.1f}".replace("-", "−")


def interval(low: float | None, high: float | None, metric: str | None, *, signed: bool = False) -> str:
    """`[low, high]`, or an empty string where there is no interval."""
    if not (is_defined(low) and is_defined(high)):
        return ""
    return f"[{number(low, metric, signed=signed)}, {number(high, metric, signed=signed)}]"


def axis_label(title: str, metric: str | None) -> str:
    """A title with its metric and, for fractions, the percent sign."""
    return f"{title}, {metric}{' (%)' if unit(metric) == FRACTION else ''}"


def plain(text: object, limit: int | None = None) -> str:
    """One printable line: line breaks become spaces, control and format characters go; the middle goes where there are more than `limit`."""
    line = "".join(c for c in " ".join(str(text).split()) if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    if limit is None or len(line) <= limit:
        return line
    head = (limit - 1) * 2 // 3
    return f"{line[:head]}…{line[len(line) - (limit - 1 - head) :]}"
