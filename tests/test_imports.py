"""The direction of the imports: each room knows only rooms below it, and few know Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.probes import probes

ROOT = Path(__file__).parent.parent
LEVELS = (
    {"errors", "versions"},
    {"core"},
    {"augment", "cores", "exclusive", "images", "local_ray", "members", "parts", "tables", "tracebacks"},
    {"command", "splits"},
    {"metrics", "views", "encoders", "config", "manifest", "readouts"} | {"preprocess", "device", "progress", "provenance"},
    {"probes"},
    {"stream", "bank", "tasks", "propose"},
    {"extract", "study", "feed", "halving"},
    {"training", "steps"},
    {"streamed", "state"},
    {"plan", "journal", "runners"},
    {"accounts", "report", "estimate", "usable"},
    {"build", "collect"},
    {"local"},
    {"ledger", "encode", "search", "cluster"},
    {"sweep"},
)
MAY_IMPORT_RAY = {"encode", "ledger", "search", "sweep", "cluster"}
WITHIN = {("bank", "stream"), ("cluster", "encode")}
"""Imports between rooms of one level."""


def room(path: Path) -> str:
    return path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(name: str) -> int:
    return next(index for index, rooms in enumerate(LEVELS) if name in rooms)


FILES = sorted(path for path in (ROOT / "harness").rglob("*.py") if path.parent != ROOT / "harness" or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_is_below_it(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        steps = name.split(".")
        assert steps[0] != "shards", f"{path} imports {name}: a data set is known by its manifest"
        if steps[0] == "ray":
            assert here in MAY_IMPORT_RAY, f"{path} imports {name}"
        if steps[0] != "harness" or len(steps) < 2 or steps[1] == here:
            continue
        assert level(steps[1]) < level(here) or (here, steps[1]) in WITHIN, f"{path} imports {name}"


def test_every_room_has_a_level() -> None:
    assert {room(path) for path in FILES} == set().union(*LEVELS)


def test_all_but_the_rooms_of_ray_are_imported_without_it() -> None:
    """What is not drawn in by name alone, such as by a package that imports Ray itself, is seen here."""
    modules = ["harness"]
    for path in FILES:
        steps = path.relative_to(ROOT).with_suffix("").parts
        if room(path) not in MAY_IMPORT_RAY and steps[-1] != "__main__":
            modules.append(".".join(steps[:-1] if steps[-1] == "__init__" else steps))
    assert {"harness.search.state", "harness.search.journal", "harness.search.accounts", "harness.search.build", "harness.search.runners"} <= set(
        modules
    )
    code = f"import importlib, sys; sys.modules['ray'] = None; [importlib.import_module(name) for name in {modules}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what a room knows of probes --------------------------------------------------------------------------------------

OTHER_MEANINGS = {
    ("report/portrait.py", "locality"),  # a group of the portrait
    ("report/portrait.py", "linear"),  # how a line of it is called
    ("report/portrait.py", "knn"),  # the last word of tasks
    ("report/portrait.py", "finetune"),  # likewise
}


def test_what_a_probe_can_do_is_asked_of_the_probe_and_not_told_by_its_name() -> None:
    """No probe's name is written where probes are run, planned or reported on: only beside the probes, and where tasks choose them."""
    written = set()
    for path in FILES:
        if room(path) not in ("probes", "tasks"):
            texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
            written |= {(str(path.relative_to(ROOT / "harness")), name) for name in texts & set(probes())}
    assert sorted(written - OTHER_MEANINGS) == []
    assert written >= OTHER_MEANINGS, "no longer needed"
