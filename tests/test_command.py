"""What a command says and how it ends, whatever is raised; and where banks lie where nobody says."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import sweep, tracebacks
from harness.command import INTERRUPTED, OK, PARTIAL, WRONG, Parser, default_cache, run_command
from harness.encoders import __main__ as encoders
from harness.errors import ProbeError, RequestError, RunError
from harness.report import __main__ as report


def ends(body: Callable[[], int], out: Path | None = None) -> int:
    return run_command(Parser(prog="python -m harness.sweep"), [], lambda _: body(), out=lambda _: out)


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RequestError("no such\ntask"), WRONG, "RequestError: no such task"),
        (RunError("disk full"), PARTIAL, "RunError: disk full"),
        (ProbeError("no rows"), PARTIAL, "ProbeError: no rows"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)
def test_an_error_on_purpose_is_one_line_and_a_status(error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(raising(error)) == status
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("error", [TypeError("two\nlines"), KeyError("x"), MemoryError(), OSError(5, "Input/output error"), RecursionError("deep")])
def test_what_nobody_raised_on_purpose_is_one_line_and_a_file(error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(raising(error), tmp_path) == PARTIAL
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Unexpected: {type(error).__name__}: ")
    assert line.endswith("the traceback is in errors/sweep.txt")
    text = (tmp_path / "errors" / "sweep.txt").read_text()
    assert text.startswith("Traceback (most recent call last)")
    assert "in body" in text


@pytest.mark.parametrize("out", ["nowhere", "a file"])
def test_without_a_folder_for_results_the_traceback_is_among_the_temporary_files(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "a file").write_text("")
    assert ends(raising(ValueError("x")), tmp_path / out) == PARTIAL
    (file,) = re.findall(r"the traceback is in (.*)", capsys.readouterr().err)
    assert "ValueError: x" in Path(file).read_text()
    assert Path(file).parent == tmp_path


def test_where_no_file_can_be_written_the_line_is_told_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert "no file" in tracebacks.keep(None, "x", "text")


def test_names_of_tracebacks_are_names_of_files(tmp_path: Path) -> None:
    names = ["tiny/train/train-000.tar", "../../etc/passwd", "x" * 400, "x" * 399, "Ünïcode\0\n"]
    files = [tmp_path / tracebacks.keep(tmp_path, name, name) for name in names]
    assert files[0].name == "tiny__train__train-000.tar.txt"
    assert {file.parent for file in files} == {tmp_path / "errors"}
    assert len(set(files)) == len(names)


COMMANDS = {
    "sweep": (sweep.main, "_run", ["sweep.yaml", "--out"]),
    "report": (report.main, "_draw", []),
    "encoders": (encoders.main, "_show", []),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_so(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main, body, arguments = COMMANDS[command]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*_: object) -> int:
        raise ZeroDivisionError("by design")

    monkeypatch.setitem(main.__globals__, body, fail)
    assert main([*arguments, *([] if command == "encoders" else [str(tmp_path)])]) == PARTIAL
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "ZeroDivisionError: by design" in printed
    (file,) = re.findall(r"the traceback is in (.*)", printed)
    assert "by design" in (tmp_path / file).read_text()


def test_a_command_that_goes_well_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(lambda: OK) == OK
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", [".cache", "cache", "./x", "~/cache", "", None])
def test_a_cache_folder_that_is_not_absolute_is_ignored(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert default_cache() == tmp_path / ".cache" / "partwise"


def test_an_absolute_cache_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert default_cache() == tmp_path / "c" / "partwise"


def test_without_a_home_the_cache_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(RequestError, match="--cache: expected a home folder"):
        default_cache()
