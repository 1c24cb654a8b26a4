"""How long is left, on a terminal and off one, by a clock that the test moves."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from harness.errors import RequestError
from harness.progress import Progress


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def progress(*, terminal: bool) -> tuple[Progress, Clock]:
    clock = Clock()
    return Progress(Console(file=io.StringIO(), force_terminal=terminal, width=160), clock=clock), clock


def shown(display: Progress) -> str:
    """The live line of the one task, as a terminal draws it now."""
    console = Console(file=io.StringIO(), width=160)
    console.print(display.live.make_tasks_table(display.live.tasks))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def lines(display: Progress) -> list[str]:
    return display.console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_the_time_left_goes_by_all_that_is_done_however_long_a_shard_takes() -> None:
    display, clock = progress(terminal=True)
    with display.task("encoding", total=400, unit="views") as bar:
        clock.now += 90
        assert "unknown yet" in shown(display)
        bar.advance(100)
        assert "about 0:04:30 left" in shown(display)
        clock.now += 60  # within the second shard: a minute less
        assert "about 0:03:30 left" in shown(display)
        clock.now += 30
        bar.advance(100)
        assert "about 0:03:00 left" in shown(display)
        clock.now += 400
        assert "about 0:00:00 left" in shown(display)
        bar.advance(0)
        assert bar.left == 0, "nothing was done, so the speed is as it was"
        bar.advance(200)
        assert bar.left == 0


def test_off_a_terminal_lines_tell_the_time_left() -> None:
    display, clock = progress(terminal=False)
    with display, display.task("encoding", total=400, unit="views") as bar:
        clock.now += 90
        bar.advance(100)
        clock.now += 5
        bar.advance(100)  # too soon for another line
    assert lines(display) == ["encoding 400 views …", "encoding: 100/400 views, 90 s, about 270 s left"]


def test_off_a_terminal_each_phase_is_a_line() -> None:
    display, clock = progress(terminal=False)
    with display:
        with display.phase("reading the manifests", may_refuse=True):
            clock.now += 3
        with display.phase("drawing the report"):
            assert lines(display) == ["reading the manifests: done, 3 s", "drawing the report …"]


def test_a_refusal_comes_without_a_line_before_it() -> None:
    display, _ = progress(terminal=False)
    with pytest.raises(RequestError), display, display.phase("reading the manifests", may_refuse=True):
        raise RequestError("no such file")
    assert lines(display) == []


def test_a_phase_of_unknown_length_says_no_time_left() -> None:
    display, _ = progress(terminal=True)
    with display.phase("drawing the report"):
        assert "drawing the report" in shown(display)
        assert "left" not in shown(display)
