"""Probes by name. The folder is the registry: a module here that defines PROBE is a probe, so a new probe is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from harness import metrics
from harness.core import Fields, Metric, Probe, RowProbe, StreamProbe
from harness.errors import ProbeError, RequestError, nearest
from harness.metrics.quantities import MeanOf, means_of


@cache
def probes() -> dict[str, Probe[Any]]:
    """Every probe by its module's name. Raises RequestError where a probe's name differs from its module's."""
    by_name: dict[str, Probe[Any]] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        contents = vars(importlib.import_module(f"{__name__}.{module}"))
        if "PROBE" not in contents:
            continue
        if contents["PROBE"].name != module:
            name = contents["PROBE"].name
            raise RequestError(f"probes: expected the probe of {module}.py to be named {module!r}, got {name!r}; rename one of them")
        by_name[module] = contents["PROBE"]
    return by_name


def probe(name: str) -> Probe[Any]:
    """The probe of that name. Raises RequestError, with the nearest name, where no probe has it."""
    if name not in probes():
        raise RequestError(f"probe: expected one of {', '.join(probes())}, got {name!r}{nearest(name, probes())}")
    return probes()[name]


def row_probe(name: str) -> RowProbe[Any]:
    """The probe of that name. Raises ProbeError where it does not read rows of features."""
    named = probe(name)
    if not isinstance(named, RowProbe):
        raise ProbeError(f"{name} probe: expected a stream of images, got rows of features; ask for a task that streams")
    return named


def stream_probe(name: str) -> StreamProbe[Any]:
    """The probe of that name. Raises ProbeError where it cannot be trained on a stream."""
    named = probe(name)
    if not isinstance(named, StreamProbe):
        raise ProbeError(f"{name} probe: expected rows of features, got a stream of images; ask for a task that reads banks")
    return named


def grid(name: str, protocol: Fields) -> tuple[float | None, ...]:
    """The `lrs` for `fit` where a probe has no learning rate to search: the values of its own grid, or a single None."""
    return probe(name).grid(protocol)


def is_decided(chosen: Probe[Any], readouts: Sequence[str], protocol: Fields) -> bool:
    """Whether the search has nothing to choose: the probe needs no training, and has one readout, no learning rate and one value in its grid."""
    return not chosen.needs_train and not chosen.has_learning_rate and len(readouts) == 1 and len(chosen.grid(protocol)) == 1


# --- metrics of probes' outputs ---------------------------------------------------------------------------------------


@cache
def quantities() -> dict[str, MeanOf]:
    """The means of the quantities that probes measure, by name. Raises RequestError where a name is taken twice."""
    by_name: dict[str, MeanOf] = {}
    for name, measuring in probes().items():
        for mean in means_of(measuring.quantities):
            if mean.name in by_name or mean.name in metrics.METRICS:
                raise RequestError(f"probes: expected a quantity of another name than {mean.name!r} in {name}.py, which is a metric; rename it")
            by_name[mean.name] = mean
    return by_name


def all_metrics() -> dict[str, Metric]:
    """Every metric by name: those of harness.metrics, and the means of the quantities that probes measure."""
    return {**metrics.METRICS, **quantities()}


def metric(name: str, levels: Mapping[str, Sequence[int]] | None = None) -> Metric:
    """One of `all_metrics`, or one of harness.metrics at one of the coarser `levels`. Raises RequestError, with the nearest name."""
    return quantities()[name] if name in quantities() else metrics.metric(name, levels)
