"""What holds of the code as a whole. One test per rule, which lists every place that breaks it."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import harness
from harness.probes import probes

ROOT = Path(__file__).parent.parent


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def at(path: Path, node: ast.AST | None = None, message: str = "") -> str:
    line = f":{node.lineno}" if isinstance(node, ast.expr | ast.stmt | ast.alias | ast.arg) else ""
    return f"{path.relative_to(ROOT)}{line} {message}".strip()


def listed(violations: Iterable[str]) -> str:
    """For a message that is read: one violation a line."""
    return "\n" + "\n".join(sorted(violations))


def refuse(violations: Iterable[str]) -> None:
    violations = list(violations)
    assert not violations, listed(violations)


# --- the line of folders ----------------------------------------------------------------------------------------------

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


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)


ROOMS = [path for path in files("harness") if path != ROOT / "harness" / "__init__.py"]


def test_every_folder_has_its_place_in_the_line() -> None:
    assert {room(path) for path in ROOMS} == set(LINE)
    assert " · ".join(LINE) in " ".join((ROOT / "ARCHITECTURE.md").read_text().split())


def test_at_most_twelve_modules_stand_at_the_top() -> None:
    assert len(list((ROOT / "harness").glob("*.py"))) <= 12


def test_each_folder_imports_only_what_is_before_it_in_the_line() -> None:
    def is_refused(here: str, name: str) -> bool:
        top, _, rest = name.partition(".")
        if top != "harness" or not rest:
            return top == "shards"  # a data set is known by its manifest
        return LINE.index(rest.split(".")[0]) > LINE.index(here)

    refuse({at(path, node, f"imports {name}") for path in ROOMS for node, name in imports(path) if is_refused(room(path), name)})


def test_one_folder_alone_imports_ray() -> None:
    refuse(at(path, node, f"imports {name}") for path in ROOMS if room(path) != RAY for node, name in imports(path) if name.split(".")[0] == "ray")


def test_what_is_before_the_folder_of_ray_is_imported_without_it() -> None:
    """What is not drawn in by name alone, such as by a package that imports Ray itself, is seen here."""
    modules = ["harness"]
    for path in ROOMS:
        steps = path.relative_to(ROOT).with_suffix("").parts
        if LINE.index(room(path)) < LINE.index(RAY) and steps[-1] != "__main__":
            modules.append(".".join(steps[:-1] if steps[-1] == "__init__" else steps))
    assert len(modules) > 100
    code = f"""
import importlib, sys
sys.modules["ray"] = None
for name in {modules}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, "needs Ray:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# --- the face of the package ------------------------------------------------------------------------------------------


def test_the_package_shows_what_is_meant_to_be_used_and_imports_nothing_heavy_by_itself() -> None:
    assert harness.__all__ == ["Score", "__version__", "evaluate", "load", "prepare"]
    assert all(callable(getattr(harness, name)) for name in harness.__all__ if name != "__version__")
    assert re.fullmatch(r"\d+\.\d+\.\d+", harness.__version__)
    code = "import sys, harness; print(*sorted({name.partition('.')[0] for name in sys.modules} & {'numpy', 'optuna', 'ray', 'timm', 'torch'}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- functions --------------------------------------------------------------------------------------------------------

LONGEST = 60
"""Lines of a function, from its `def` to its end."""


def test_no_function_is_longer_than_a_screen() -> None:
    def lines(node: ast.AST) -> int:
        return node.end_lineno - node.lineno + 1 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno else 0

    refuse(at(path, node, f"{lines(node)} lines") for path in files("harness", "shards") for node in ast.walk(parsed(path)) if lines(node) > LONGEST)


# --- names that are a module's own ------------------------------------------------------------------------------------

CODE = ("harness", "shards", "tests", "bench")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> Iterator[str]:
    """The `_names` that a module makes: functions, classes, variables, fields, attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
            name = node.attr
        else:
            continue
        if is_private(name):
            yield name


def private_uses(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Where a `_name` is imported, read from something other than `self`, or named to `setattr` and its kin."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            yield node, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("getattr", "setattr", "delattr", "hasattr"):
            for argument in node.args[:2]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node, argument.value.rpartition(".")[2]


def test_no_module_uses_what_is_another_modules_own() -> None:
    """A `_name` that none of our modules makes belongs to a foreign library, and is no concern of this rule."""
    makes = {path: set(defined(parsed(path))) for path in files(*CODE)}
    ours = set().union(*makes.values())
    violations = []
    for path in makes:
        for node, name in private_uses(parsed(path)):
            imported = isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in CODE
            if is_private(name) and name in ours and (imported or name not in makes[path]):
                violations.append(at(path, node, name))
    refuse(violations)


# --- what tests share -------------------------------------------------------------------------------------------------

TEST_MODULE = re.compile(r"(from|import) +(tests\.[\w.]*)?test_\w+|from +tests\.\w+ +import +test_")
"""Also where it stands in the text of a program that a test starts."""


def test_no_test_imports_a_test() -> None:
    """What several tests need is in tests/helpers."""
    refuse(
        f"{at(path)}:{number} {line.strip()}"
        for path in files("tests", "bench")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if TEST_MODULE.match(line.strip())
    )


# --- what is asked of our own types -----------------------------------------------------------------------------------

FOREIGN_NETWORKS = ("harness/encoders/", "harness/probes/finetune/")
"""Here networks of other libraries are asked for what they may or may not have."""


def is_lenient(node: ast.AST) -> bool:
    """`getattr` with a default, on something else than a module that registers what it has."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3):
        return False
    return not ast.unparse(node.args[0]).startswith("importlib.import_module(")


def test_our_own_types_declare_what_they_have() -> None:
    """A default that stands where an attribute is read hides that a type lacks it; it stands on the type."""
    refuse(
        at(path, node, ast.unparse(node))
        for path in files(*CODE)
        if not str(path.relative_to(ROOT)).startswith(FOREIGN_NETWORKS)
        for node in ast.walk(parsed(path))
        if is_lenient(node)
    )


# --- what a room knows of probes --------------------------------------------------------------------------------------

OTHER_MEANINGS = {
    ("report/portrait.py", "locality"),  # a group of the portrait
    ("report/portrait.py", "linear"),  # how a line of it is called
    ("report/portrait.py", "knn"),  # the last word of tasks
    ("report/portrait.py", "finetune"),  # likewise
}


def test_what_a_probe_can_do_is_asked_of_the_probe_and_not_told_by_its_name() -> None:
    """No probe's name is written where probes are run, planned or reported on: only beside the probes, and where tasks choose them."""
    written, places = set(), []
    for path in (path for path in ROOMS if room(path) not in ("probes", "tasks")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Constant) and node.value in probes():
                word = (str(path.relative_to(ROOT / "harness")), str(node.value))
                written.add(word)
                places += [] if word in OTHER_MEANINGS else [at(path, node, repr(node.value))]
    refuse(places)
    assert written >= OTHER_MEANINGS, "no longer needed"


# --- names ------------------------------------------------------------------------------------------------------------

SAYS_NOTHING = frozenset(("found", "one", "what", "told", "its", "each", "own", "asked", "wanted", "known", "kept", "more", "some", "there"))
"""A name names the thing: receipts, message, study, encoder."""
MOST = 0.003
"""The share of bound names and parameters that may still be such a word."""


def bound(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Variables, fields, parameters and caught exceptions, each as often as it is bound."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node, node.id
        elif isinstance(node, ast.arg):
            yield node, node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node, node.name


def test_names_name_the_thing() -> None:
    refused = []
    for folders in (("harness", "shards"), ("tests", "bench")):
        names = [(path, node, name) for path in files(*folders) for node, name in bound(parsed(path))]
        empty = [at(path, node, name) for path, node, name in names if name in SAYS_NOTHING]
        if len(empty) > MOST * len(names):
            refused += [f"{' and '.join(folders)}: {len(empty)} of {len(names)} names, expected at most {MOST:.1%}", *empty]
    refuse(refused)
