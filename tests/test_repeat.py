"""The command that runs a test again and again: it stops at the first failure, and leaves no process that keeps the machine busy."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.helpers import repeat


def script(folder: Path, text: str) -> str:
    file = folder / "test_it.py"
    file.write_text(text)
    return str(file)


def test_it_runs_so_often_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = script(tmp_path, f"def test_it():\n    open({str(tmp_path / 'runs')!r}, 'a').write('x')\n")
    assert repeat.main(["--times", "2", test]) == 0
    assert (tmp_path / "runs").read_text() == "xx"
    assert "2/2: passed" in capsys.readouterr().out


def test_it_stops_at_the_first_failure_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        f"def test_it():\n    with open({str(tmp_path / 'runs')!r}, 'a+') as f:\n        f.write('x')\n        assert f.tell() < 2, 'at the second'\n"
    )
    assert repeat.main(["--times", "4", "--busy", script(tmp_path, text)]) == 1
    assert (tmp_path / "runs").read_text() == "xx"
    printed = capsys.readouterr().out
    assert "2/4: failed" in printed
    assert "at the second" in printed
    assert not [child for child in psutil.Process().children() if repeat.SPIN in child.cmdline()]
