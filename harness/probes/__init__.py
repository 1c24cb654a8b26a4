"""Probes by name. The folder is the registry: a module here that gives a PROBE is one, and a new probe is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from harness.core import Probe
from harness.errors import RequestError, nearest


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
