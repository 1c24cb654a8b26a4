"""The line of the imports: each folder knows only folders before it, and one alone knows Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.probes import probes

ROOT = Path(__file__).parent.parent
LINE = [
    *("errors", "versions", "core", "files", "tracebacks", "config", "progress", "command"),
    *("data", "metrics", "encoders", "features", "probes", "tasks", "plan", "search"),
    *("results", "local", "cluster", "report", "sweep"),
]
"""Each folder and top module imports only those before it: the line that ARCHITECTURE.md shows."""
RAY = "cluster"
"""The one folder that imports Ray."""


def room(path: Path) -> str:
    return path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


FILES = sorted(path for path in (ROOT / "harness").rglob("*.py") if path.parent != ROOT / "harness" or path.name != "__init__.py")


def test_every_folder_has_its_place_in_the_line() -> None:
    assert {room(path) for path in FILES} == set(LINE)
    assert " · ".join(LINE) in " ".join((ROOT / "ARCHITECTURE.md").read_text().split())


def test_at_most_twelve_modules_stand_at_the_top() -> None:
    assert len(list((ROOT / "harness").glob("*.py"))) <= 12


def test_each_folder_imports_only_what_is_before_it_in_the_line() -> None:
    violations = []
    for path in FILES:
        here = room(path)
        for name in imports(path):
            package, *rest = name.split(".")
            if package == "shards":
                violations.append(f"{path} imports {name}: a data set is known by its manifest")
            elif package == "harness" and rest and LINE.index(rest[0]) > LINE.index(here):
                violations.append(f"{path} imports {name}, which comes later")
    assert violations == []


def test_one_folder_alone_imports_ray() -> None:
    assert [f"{path} imports {name}" for path in FILES if room(path) != RAY for name in imports(path) if name.split(".")[0] == "ray"] == []


def test_what_is_before_the_folder_of_ray_is_imported_without_it() -> None:
    """What is not drawn in by name alone, such as by a package that imports Ray itself, is seen here."""
    modules = ["harness"]
    for path in FILES:
        steps = path.relative_to(ROOT).with_suffix("").parts
        if LINE.index(room(path)) < LINE.index(RAY) and steps[-1] != "__main__":
            modules.append(".".join(steps[:-1] if steps[-1] == "__init__" else steps))
    assert len(modules) > 100
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
