"""Python imports this where tests/helpers/gated is on PYTHONPATH: it puts gates before functions of a run (see tests/helpers/gates.py)."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ["PARTWISE_TEST_GATES"]) if "PARTWISE_TEST_GATES" in os.environ else None
LIMIT = 600.0

GATES: dict[str, list[tuple[str, str, Callable[..., Any]]]] = {
    # module: (class or "", function, what tells one call from another) of each gate before it
    "harness.cluster.actors": [("EncoderActor", "encode", lambda actor, work, attempt: ("encode", work.name))],
    "harness.cluster.tuner": [
        ("StudyTrial", "step", lambda trial: ("score" if trial.config["step"]["kind"] == "score" else "round", trial.config["study"])),
    ],
    "harness.search.training": [("Training", "_step", lambda training, batch, position: ("training", training.progress.step))],
    "harness.results.tables": [],
    "harness.report": [("", "write_report", lambda *_, **__: ("report", ""))],
    "ray._private.services": [("", "start_raylet", lambda *_, **__: ("ray", ""))],
}


calls: Counter[str] = Counter()
"""That this process has made through each gate."""


def wait_at(gate: str, about: Any) -> None:
    """Say that this process has come to a gate, and wait until it is open; where there is none, or it is for later calls, pass."""
    assert FOLDER is not None
    number = about if gate == "training" else calls[gate]
    calls[gate] += 1
    closed, opened = FOLDER / f"{gate}.closed", FOLDER / f"{gate}.open"
    if not closed.exists() or opened.exists():
        return
    if number < json.loads(closed.read_text())["at"]:
        return
    arrival = FOLDER / f"{gate}.{os.getpid()}.arrived"
    temporary = arrival.with_suffix(".tmp")
    temporary.write_text(json.dumps({"pid": os.getpid(), "about": about}))
    temporary.rename(arrival)
    deadline = time.monotonic() + LIMIT
    while not opened.exists():
        if time.monotonic() > deadline:
            raise AssertionError(f"the gate {gate} was never opened")
        time.sleep(0.01)


def gated(function: Callable[..., Any], describe: Callable[..., tuple[str, Any]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        wait_at(*describe(*arguments, **named))
        return function(*arguments, **named)

    return wrapper


class Loader(importlib.abc.Loader):
    """Loads a module as it is, and then puts the gates before its functions."""

    def __init__(self, name: str, loader: Any) -> None:
        self._name, self._loader = name, loader

    def __getattr__(self, name: str) -> Any:
        """Whatever else the module's loader can do, such as reading the files beside it."""
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        wait_at(f"import {self._name}", "")
        self._loader.exec_module(module)
        for owner, name, describe in GATES[self._name]:
            place = getattr(module, owner) if owner else module
            setattr(place, name, gated(getattr(place, name), describe))


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name not in GATES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(name, spec.loader)
        return spec


if FOLDER is not None:
    sys.meta_path.insert(0, Finder())
