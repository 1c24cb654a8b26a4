"""MATLAB files, read in a process of their own: SciPy's reader trusts the sizes that a file states, and a damaged file can kill its process."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import RequestError

READER = """
import json, pickle, resource, sys
from scipy.io import loadmat
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
while size := stdin.read(20):
    path, variable, field, squeeze = json.loads(stdin.read(int(size)))
    try:
        value = loadmat(path, variable_names=[variable], squeeze_me=squeeze)[variable]
        answer = pickle.dumps((value if field is None else value[field][0, 0], None))
    except Exception as error:
        answer = pickle.dumps((None, f"{type(error).__name__}: {error}"))
    stdout.write(b"%20d" % len(answer) + answer)
    stdout.flush()
"""


def load(path: Path, variable: str, expected: str, remedy: str, *, field: str | None = None, squeeze: bool = False) -> Any:
    """A variable of a file, or one field of its struct, as scipy.io.loadmat returns it; `expected` is its name in errors.

    Raises RequestError where the file cannot be read or kills its reader.
    """
    reader = reader_of(os.getpid())
    answer = _answer(reader, json.dumps([str(path), variable, field, squeeze]).encode())
    if answer is None:
        reader_of.cache_clear()
        end(reader)
        raise RequestError(f"{path}: expected {expected}, got a file so damaged that its reader dies of it; {remedy}")
    value, error = pickle.loads(answer)  # of our own process
    if error is not None:
        raise RequestError(f"{path}: expected {expected}, got {' '.join(str(error).split())[:200]}; {remedy}")
    return value


def _answer(reader: subprocess.Popen[bytes], request: bytes) -> bytes | None:
    """The reader's answer; None where it died."""
    assert reader.stdin is not None
    assert reader.stdout is not None
    try:
        reader.stdin.write(b"%20d" % len(request) + request)
        reader.stdin.flush()
    except BrokenPipeError:
        return None
    size = reader.stdout.read(20)
    answer = reader.stdout.read(int(size)) if len(size) == 20 else b""
    return answer if answer and len(answer) == int(size) else None


@cache
def reader_of(process: int) -> subprocess.Popen[bytes]:
    """This process's reader, which ends with the process, when its input closes."""
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(end, reader)
    return reader


def end(reader: subprocess.Popen[bytes]) -> None:
    reader.kill()
    reader.wait()
    for pipe in (reader.stdin, reader.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # what it did not read any more
                continue
