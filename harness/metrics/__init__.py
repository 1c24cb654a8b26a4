"""Metrics by name. The folder is the registry: each module here may define a tuple METRICS, and a new metric is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from harness.core import Metric
from harness.errors import RequestError, nearest
from harness.metrics.levels import AtLevel


def _discover() -> dict[str, Metric]:
    registry: dict[str, Metric] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        for candidate in getattr(importlib.import_module(f"{__name__}.{module}"), "METRICS", ()):
            if candidate.name in registry:
                raise RequestError(f"metrics: expected one metric named {candidate.name!r}, found another in {module}.py; rename one of them")
            registry[candidate.name] = candidate
    return registry


METRICS: dict[str, Metric] = _discover()


def sense(metric: Metric) -> int:
    """1 where higher is better, -1 where lower is."""
    return -1 if metric.lower_is_better else 1


def metric(name: str, levels: Mapping[str, Sequence[int]] | None = None) -> Metric:
    """The metric of that name, or for `<metric>@<level>` that metric at one of the coarser `levels` (class → class of the level).

    Raises RequestError, with the nearest name, where there is none.
    """
    base, _, level = name.partition("@")
    if level and levels and level in levels and base in METRICS:
        return AtLevel(METRICS[base], level, tuple(levels[level]))
    if name not in METRICS:
        raise RequestError(f"metric: expected one of {', '.join(METRICS)}, got {name!r}{nearest(name, METRICS)}")
    return METRICS[name]
