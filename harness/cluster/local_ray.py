"""What a local Ray needs from a machine: a short folder for its sockets, shared memory, a token; and the handling of Ctrl-C meanwhile."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from harness.errors import RequestError

LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
"""Bytes of the path of a Unix socket (sun_path, less its end)."""
LONGEST_BELOW = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.99")
"""Length of what Ray appends to its folder's path, with process ids of 7 digits."""
PREFIX = "partwise-"
RANDOM_CHARACTERS = 8  # characters that tempfile adds to a name
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED = 1 << 30
"""Bytes of shared memory from which on Ray's defaults apply."""
_STORE = 256 << 20
"""Bytes of Ray's object store where it has to lie in a folder: receipts and requests pass through it, features never do."""
_TOKEN = secrets.token_hex(32)
"""One for all Rays of this process: Ray reads it once."""


def make_folder(candidates: Sequence[str] | None = None) -> Path:
    """A new folder for Ray's session, in the first place that can be written and whose sockets' paths are not too long.

    A separate folder, so that no session of another Ray, running or killed, lies in it. Raises RequestError where there is no such place.
    """
    places = list(dict.fromkeys(candidates if candidates is not None else _places()))
    reasons = []
    for place in places:
        length = len(os.fsencode(os.path.join(place, PREFIX))) + RANDOM_CHARACTERS + LONGEST_BELOW
        if length > LONGEST_SOCKET:
            reasons.append(f"{place} (sockets of {length} bytes)")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        except OSError as error:
            reasons.append(f"{place} ({error.strerror or error})")
    raise RequestError(
        f"Ray: expected a folder for its sockets that can be written and whose path leaves their names at most {LONGEST_SOCKET} bytes, got "
        f"{', '.join(reasons) or 'none'}; set TMPDIR to a short one"
    )


def _places() -> Iterator[str]:
    if os.environ.get("RAY_TMPDIR"):
        yield os.path.abspath(os.environ["RAY_TMPDIR"])
    with contextlib.suppress(OSError):
        yield os.path.abspath(tempfile.gettempdir())
    yield from ("/tmp", "/var/tmp", "/dev/shm")
    with contextlib.suppress(RuntimeError):
        yield str(Path.home())


def store_options(folder: Path, shared: Path = SHARED_MEMORY, enough: int = ENOUGH_SHARED) -> dict[str, Any]:
    """Options of ray.init for its object store: none where there is shared memory for it, else a small store in `folder`."""
    if sys.platform != "linux" or _free(shared) >= enough:
        return {}
    return {"_plasma_directory": str(folder), "object_store_memory": _STORE}


def _free(folder: Path) -> int:
    """Bytes that this user can write there; 0 where the folder is not writable."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


@contextlib.contextmanager
def writable_token(folder: Path) -> Iterator[None]:
    """Keep a token in `folder` for the block, where Ray cannot keep it in the home folder and no other is named."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_TOKEN") or (os.path.isfile(given) if given else _can_keep_token()):
        yield
        return
    file = folder / "auth_token"  # Ray creates one only in the home folder
    file.touch(mode=0o600)
    file.write_text(_TOKEN)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)
    try:
        yield
    finally:
        if given is None:
            del os.environ["RAY_AUTH_TOKEN_PATH"]
        else:
            os.environ["RAY_AUTH_TOKEN_PATH"] = given


def _can_keep_token() -> bool:
    try:
        home = Path.home() / ".ray"
        home.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return True
    except (OSError, RuntimeError):
        return False


@contextlib.contextmanager
def interrupt_later() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and is raised there; a second one is raised at once.

    While Ray starts or stops, an exception may be swallowed, or leave unknown processes behind.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
