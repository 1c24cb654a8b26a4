"""What a run is doing and how long is left: a live bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

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
    printed: float = 0.0
    """When the latest line was printed, where there is no terminal."""
    advanced: float = 0.0
    """When the latest work was done, which may have been one shard of many minutes."""

    @property
    def left(self) -> float | None:
        """Seconds left at the mean speed up to the latest finished work, less the time since; None until something is done."""
        if not self.done:
            return None
        at_latest = (self.advanced - self.start) / self.done * (self.total - self.done)
        return max(0.0, at_latest - (self.progress.clock() - self.advanced))

    def advance(self, amount: int) -> None:
        if amount <= 0:
            return
        now = self.progress.clock()
        self.done, self.advanced = self.done + amount, now
        self.progress.live.update(self.task, completed=self.done)
        if not self.progress.console.is_terminal and (now - self.printed > LINE_EVERY or self.done >= self.total):
            self.printed = now
            self.progress.console.print(
                f"{self.name}: {self.done}/{self.total} {self.unit}, {now - self.start:.0f} s, about {self.left or 0.0:.0f} s left", highlight=False
            )


class _LeftColumn(ProgressColumn):
    """The time left, where it is known."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        bar: Bar | None = task.fields.get("bar")
        if bar is None:
            return Text()
        left = bar.left
        return Text("left: unknown yet" if left is None else f"about {timedelta(seconds=math.ceil(left))} left")


class Progress:
    """The display of one run; a context manager. `clock` returns monotonic seconds."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self.live = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            _LeftColumn(),
            console=console,
            disable=not console.is_terminal,
            get_time=clock,
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
    def phase(self, text: str, *, may_refuse: bool = False) -> Iterator[None]:
        """A phase of unknown length: on a terminal a line while it lasts, elsewhere one when it begins.

        For a phase that `may_refuse` the request, the line comes after its success: a refusal is a single line.
        """
        if not self.console.is_terminal and not may_refuse:
            self.say(text)
        task = self.live.add_task(text, total=None, unit="")
        start = self.clock()
        try:
            yield
        finally:
            self.live.remove_task(task)
        if not self.console.is_terminal and may_refuse:
            self.console.print(f"{text}: done, {self.clock() - start:.0f} s", highlight=False)

    @contextmanager
    def task(self, name: str, *, total: int, unit: str) -> Iterator[Bar]:
        """A phase with `total` units of work."""
        task = self.live.add_task(name, total=total, unit=unit)
        now = self.clock()
        bar = Bar(progress=self, name=name, total=total, unit=unit, task=task, start=now, printed=now)
        self.live.update(task, bar=bar)
        self.say(f"{name} {total} {unit}")
        try:
            yield bar
        finally:
            self.live.remove_task(task)
