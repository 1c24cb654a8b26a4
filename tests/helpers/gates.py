"""Gates in the processes of a run, so that a test makes happen what it needs to happen: who comes to one that is closed waits until it is opened.

The gates are `encode` (before a lease is worked on), `round` and `score` (before a step of a study), `training` (before a step of training), `report`
(before the report is drawn) and `ray` (while a local Ray is started, some of whose processes are there); tests/gated/sitecustomize.py has them.
Beside them there is `import harness.results.tables` and the like, before the modules that it names are imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 600.0
"""Seconds: far more than anything here takes, on a busy machine as well."""


@dataclass(frozen=True)
class Arrival:
    """A process that waits at a gate."""

    pid: int
    about: Any
    """Of `encode` the shard, of `round` and `score` the study, of `training` the step."""


@dataclass(frozen=True)
class Gates:
    """The gates of one run, as files in a folder."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """What a run is started with, so that it has them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "gated"), os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, "PARTWISE_TEST_GATES": str(self.folder)}

    def close(self, gate: str, *, at: int = 0) -> None:
        """From now on whoever comes waits, after so many calls of its own; of `training`, at that step or a later one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{gate}.closed").write_text(json.dumps({"at": at}))

    def open(self, gate: str) -> None:
        (self.folder / f"{gate}.open").touch()

    def arrived(self, gate: str) -> list[Arrival]:
        """Those that came, in the order in which they did."""
        files = sorted(self.folder.glob(f"{gate}.*.arrived"), key=lambda path: path.stat().st_mtime_ns)
        return [Arrival(**json.loads(file.read_text())) for file in files]

    def wait(self, gate: str, count: int, process: subprocess.Popen[str] | None = None) -> list[Arrival]:
        """Until so many processes wait at a gate; fails where the run ends, or the time is over, before they do.

        Without `process` the run is the test's own.
        """
        deadline = time.monotonic() + LIMIT
        while len(arrived := self.arrived(gate)) < count:
            assert process is None or process.poll() is None, f"the run ended with {process and process.returncode} before {count} came to {gate}"
            assert time.monotonic() < deadline, f"{len(arrived)} of {count} came to {gate}"
            time.sleep(0.01)
        return arrived
