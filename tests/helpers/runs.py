"""Sweeps as real processes: started, watched, killed, run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.results.tables import read_table
from tests.helpers.gates import Gates

ROOT = Path(__file__).parents[2]
VOLATILE = {"seconds", "images_per_second", "created_at", "git_commit"}
LIMIT = 600.0
"""Seconds: far more than anything here takes, on a busy machine as well."""


def _interruptible() -> None:
    """A process started in the background of a shell ignores SIGINT, and so would those that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(kw_only=True)
class Run:
    """One sweep and its folders."""

    sweep: Path
    out: Path
    cache: Path
    gates: Gates | None = None

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "harness.sweep", str(self.sweep), "--out", str(self.out), "--cache", str(self.cache), *arguments]
        log = (self.out.parent / f"{self.out.name}.log").open("a")
        environment = {**os.environ, "COLUMNS": "200", **(self.gates.environment() if self.gates else {})}
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True, env=environment, preexec_fn=_interruptible)

    def finish(self, process: subprocess.Popen[str]) -> int:
        return process.wait(LIMIT)

    def run(self, *arguments: str) -> int:
        return self.finish(self.start(*arguments))

    @property
    def log(self) -> str:
        return (self.out.parent / f"{self.out.name}.log").read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []

    @property
    def parts(self) -> dict[str, int]:
        """Published bank parts and the time of their publication."""
        return {str(path.relative_to(self.cache)): path.stat().st_mtime_ns for path in self.cache.glob("*/*.arrow")}

    @property
    def rounds(self) -> dict[str, int]:
        """Journalled rounds and scores and the time of their writing."""
        return {path.name + path.parent.name: path.stat().st_mtime_ns for path in self.out.glob("tune/studies/*/*.json")}

    def table(self, name: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in VOLATILE} for row in read_table(self.out / f"{name}.parquet")]

    def predictions(self) -> dict[str, list[dict[str, Any]]]:
        folder = self.out / "predictions"
        return {str(path.relative_to(folder)): read_table(path) for path in sorted(folder.rglob("*.parquet"))}


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes below a run: Ray's own, and its workers."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def same_values(first: Run, second: Run, names: Sequence[str] = ("results", "trials")) -> None:
    """Values, intervals, choices, trials and predictions are identical, to the bit."""
    for name in names:
        assert first.table(name) == second.table(name)
    assert first.predictions() == second.predictions()
