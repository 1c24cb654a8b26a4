"""What the commands have in common: every error is one line on stderr and an exit status.

Exit status: 0 success; 1 something is incomplete or failed; 2 the request was wrong, and nothing was done; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from harness import tracebacks
from harness.errors import HarnessError, RequestError, Unexpected, in_one_line

OK, PARTIAL, WRONG, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Raises RequestError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; --help lists what there is")


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    body: Callable[[argparse.Namespace], int],
    *,
    out: Callable[[argparse.Namespace], Path | None] = lambda _: None,
    interrupted: str = "interrupted",
) -> int:
    """Parse `arguments` and run `body`; the exit status, whatever happens.

    An unexpected exception leaves its traceback under `out`, or, where there is no such folder yet, among the temporary files.
    """
    options = argparse.Namespace()
    try:
        parser.parse_args(arguments, options)
        return body(options)
    except RequestError as error:
        complain(error)
        return WRONG
    except HarnessError as error:
        complain(error)
        return PARTIAL
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _close_output()
        return PARTIAL
    except Exception as error:
        name = parser.prog.rsplit(".", 1)[-1]
        file = tracebacks.keep(out(options), name, "".join(traceback.format_exception(error)))
        complain(Unexpected(f"{in_one_line(error)}; this is a fault of the program, or of the place it runs in{tracebacks.SEE_FILE}{file}", ""))
        return PARTIAL


def default_cache() -> Path:
    """`partwise` in the user's cache folder. Raises RequestError where there is none.

    A relative XDG_CACHE_HOME is ignored, as the XDG Base Directory Specification says; it would be another folder for every process.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = given if given.is_absolute() else Path.home().absolute() / ".cache"
    except RuntimeError:
        raise RequestError("--cache: expected a home folder, for banks to lie in its .cache, got a user without one; name a folder") from None
    return folder / "partwise"


def complain(error: HarnessError) -> None:
    print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)


def _close_output() -> None:
    """The reader of our output has left (`| head`): discard the rest silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
