"""Which benchmarks there are, and each of them in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import bench
from bench.rows import Row
from harness.errors import RequestError, in_one_line, nearest

FRAME = frozenset({"document", "machine", "picture", "results", "rows", "running"})
"""Modules that are no benchmarks."""


def benchmarks() -> list[str]:
    """Every benchmark."""
    found = (module.name for module in pkgutil.iter_modules(bench.__path__))
    return sorted(name for name in found if name not in FRAME and not name.startswith("_"))


def needs_gpu(name: str) -> bool:
    """By its name, `…_gpu`, so that no benchmark need be imported to know."""
    return name.endswith("_gpu")


def chosen(only: Sequence[str], *, gpu: bool) -> list[str]:
    """Raises RequestError for a name that is none."""
    asked_for = list(dict.fromkeys(only)) or benchmarks()
    for name in asked_for:
        if name not in benchmarks():
            raise RequestError(f"--only: expected one of {', '.join(benchmarks())}, got {name!r}{nearest(name, benchmarks())}")
    return [name for name in asked_for if not gpu or needs_gpu(name)]


def in_process(name: str, *, tiny: bool, seconds: float) -> tuple[list[Row], str]:
    """A benchmark's rows from a process of its own, or why there are none."""
    if seconds <= 0:
        return [], "not measured: the time was over"
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, tiny, sending))
    process.start()
    sending.close()
    try:
        if not receiving.poll(seconds):
            return [], "not measured: the time was over"
        answer: tuple[list[dict[str, Any]], str] = receiving.recv()
    except EOFError:
        return [], f"its process ended without an answer, exit status {process.exitcode}"
    finally:
        if process.is_alive():
            process.join(5)
            process.kill()
        process.join()
    return [Row.from_json(row) for row in answer[0]], answer[1]


def _measure(name: str, tiny: bool, connection: Connection) -> None:
    try:
        run: Callable[[bool], list[Row]] = importlib.import_module(f"bench.{name}").run
        rows = [row.to_json() for row in run(tiny)]
    except Exception as error:
        connection.send(([], in_one_line(error)))
        raise
    connection.send((rows, ""))
