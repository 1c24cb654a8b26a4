"""What a run is doing and how long is left, on a terminal as a live bar, elsewhere as a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


@dataclass(kw_only=True, eq=False)
class Bar:
    """One phase with a known amount of work."""

    progress: Progress
    name: str
    total: int
    unit: str
    task: TaskID
    start: float
    done: int = 0
    told: float = 0.0

    def advance(self, amount: int) -> None:
        self.done += amount
        self.progress.live.update(self.task, completed=self.done)
        now = time.monotonic()
        if not self.progress.console.is_terminal and (now - self.told > LINE_EVERY or self.done >= self.total):
            self.told = now
            elapsed = now - self.start
            left = elapsed / self.done * (self.total - self.done) if self.done else float("nan")
            self.progress.console.print(
                f"{self.name}: {self.done}/{self.total} {self.unit}, {elapsed:.0f} s, about {left:.0f} s left", highlight=False
            )


class Progress:
    """The display of one run; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """One line on what begins now."""
        self.live.console.print(f"{text} …", highlight=False)

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """A phase of unknown length: on a terminal a line while it lasts, elsewhere nothing."""
        task = self.live.add_task(text, total=None, unit="")
        try:
            yield
        finally:
            self.live.remove_task(task)

    @contextmanager
    def task(self, name: str, *, total: int, unit: str) -> Iterator[Bar]:
        """A phase with `total` units of work."""
        task = self.live.add_task(name, total=total, unit=unit)
        bar = Bar(progress=self, name=name, total=total, unit=unit, task=task, start=time.monotonic(), told=time.monotonic())
        self.say(f"{name} {total} {unit}")
        try:
            yield bar
        finally:
            self.live.remove_task(task)
