"""MATLAB files, tried before they are read: SciPy's reader goes by the sizes that a file states, and a damaged one can end its process."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from harness.errors import RequestError

_TRY = """
import sys
from scipy.io import loadmat
stdin = sys.stdin.buffer
while size := stdin.read(8):
    name, path = stdin.read(int(size)).split(b"\\0")
    try:
        loadmat(path, variable_names=[name.decode()])
    except BaseException:
        pass  # the recipe meets it, too, and says what it is
    print("read", flush=True)
"""


def survive(paths: Iterable[Path], variable: str, remedy: str) -> None:
    """Have another process read a variable of each file. Raises RequestError for the first file that ends it."""
    for path in paths:
        request = b"\0".join((variable.encode(), os.fsencode(path)))
        reader = _reader()
        try:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write(b"%8d" % len(request) + request)
            reader.stdin.flush()
            answer = reader.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            _reader.cache_clear()
            _end(reader)
            raise RequestError(f"{path}: expected a MATLAB file, got one so damaged that its reader dies of it; {remedy}")


@cache
def _reader() -> subprocess.Popen[bytes]:
    reader = subprocess.Popen([sys.executable, "-c", _TRY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(_end, reader)
    return reader


def _end(reader: subprocess.Popen[bytes]) -> None:
    reader.kill()
    reader.wait()
    for pipe in (reader.stdin, reader.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # what it did not read any more
                continue
