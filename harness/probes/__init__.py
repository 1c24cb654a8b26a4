"""Probes by name. The folder is the registry: a module here that gives a PROBE is one, and a new probe is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from harness.core import Probe
from harness.errors import ProbeError, RequestError, nearest
from harness.probes.fields import EpochFields, Fields


@cache
def probes() -> dict[str, Probe]:
    """Every probe by its module's name. Raises RequestError where a probe is not named as its module is."""
    found: dict[str, Probe] = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        each = getattr(importlib.import_module(f"{__name__}.{module}"), "PROBE", None)
        if each is None:
            continue
        if each.name != module:
            raise RequestError(f"probes: expected the probe of {module}.py to be named {module!r}, got {each.name!r}; rename one of them")
        found[module] = each
    return found


def probe(name: str) -> Probe:
    """The probe of that name. Raises RequestError, with the nearest name, where there is none."""
    if name not in probes():
        raise RequestError(f"probe: expected one of {', '.join(probes())}, got {name!r}{nearest(name, probes())}")
    return probes()[name]


def defaults(name: str) -> dict[str, Any]:
    """A copy of the protocol fields that the probe of that name reads, with their defaults. Raises RequestError for an unknown name."""
    probe(name)
    found: dict[str, Any] = dict(importlib.import_module(f"{__name__}.{name}").DEFAULTS)
    return found


def grid(name: str, protocol: Mapping[str, Any]) -> tuple[float | None, ...]:
    """What `fit` takes as `lrs` where a probe has no learning rate to search: the values of its own grid, or one None.

    Raises RequestError for an unknown name, ProbeError for protocol fields that cannot be.
    """
    own = getattr(probe(name), "grid", None)
    return (None,) if own is None else tuple(own(protocol))


def is_decided(each: Probe, readouts: Sequence[str], protocol: Mapping[str, Any]) -> bool:
    """Whether a probe that trains on nothing leaves a search nothing to choose: one readout, no learning rate, one value of its own grid."""
    return not each.needs_train and not each.has_learning_rate and len(readouts) == 1 and len(grid(each.name, protocol)) == 1


def check(name: str, protocol: Mapping[str, Any]) -> None:
    """Raises RequestError where a protocol field of the probe of that name has a value that it cannot take."""
    module = importlib.import_module(type(probe(name)).__module__)
    kinds: list[type[Fields]] = [EpochFields]
    for each in vars(module).values():
        if isinstance(each, type) and issubclass(each, Fields) and each.__module__ == module.__name__:
            kinds.append(each)
    for kind in kinds:
        try:
            kind.read(name, protocol)
        except ProbeError as error:
            raise RequestError(str(error)) from None
