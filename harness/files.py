"""Files that appear whole, or that only one process may create, with and without hard links; names of files; and the lock of a driver."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.errors import RequestError, RunError

try:
    import fcntl
except ImportError:  # pragma: no cover - not on POSIX
    fcntl = None  # type: ignore[assignment]

OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE})
"""Errors of link() that a rename would raise as well. Any other error means that the file system has no hard links, or no more of them: EPERM on
exFAT, FUSE and BeeGFS, EOPNOTSUPP on SMB, ENOSYS, and on some the kernel's own 524."""
STALE_SECONDS = 20.0
"""Age from which a claim counts as left by a stopped process: a claim is held for milliseconds."""
LOCK = ".driver.lock"
"""The lock of a folder of results."""


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that replaces it when the block succeeds, and is removed when it fails.

    Raises RunError where the file system refuses (full, read-only).
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder, then run again") from error
    finally:
        with contextlib.suppress(OSError):  # the fault itself is already reported
            temporary.unlink(missing_ok=True)


def file_name(encoder: str) -> str:
    """An encoder's name as a file name: different names give different ones, and none is a path."""
    quoted = quote(encoder, safe=" @+=,")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process and no other call uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


class Publisher:
    """Publishes local files whole; the first one stays. Remembers whether the file system has hard links."""

    def __init__(self) -> None:
        self._links = True

    def publish(self, target: Path, data: bytes, *, replace: bool) -> bool:
        """Write `data` under `target`; False, with nothing written, where the name is taken and `replace` is false. Raises OSError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        try:
            temporary.write_bytes(data)
            if replace:
                os.replace(temporary, target)
                return True
            return self._first(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _first(self, temporary: Path, target: Path) -> bool:
        if self._links:
            try:
                os.link(temporary, target)  # unlike a rename, it refuses to replace an existing file
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in OF_THE_DISK:
                    raise
                self._links = False
        return _renamed_first(temporary, target)


def _renamed_first(temporary: Path, target: Path) -> bool:
    """Rename `temporary` to `target` unless that exists, under a claim: a file beside it that only one process can create.

    A claim older than STALE_SECONDS was left by a dead process and is put aside. If two processes ever hold one claim, such as one that slept
    that long and one that put it aside, the later part replaces the earlier: readers see either of them whole.
    """
    claim = target.with_name(f".{target.name}.claim")
    while not target.exists():
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            _put_aside_if_stale(claim, temporary)
            continue
        try:
            if target.exists():
                return False
            os.replace(temporary, target)
            return True
        finally:
            claim.unlink(missing_ok=True)
    return False


def _put_aside_if_stale(claim: Path, fresh: Path) -> None:
    """Wait briefly for the holder of a claim, or remove the claim of a dead process."""
    with contextlib.suppress(FileNotFoundError):
        fresh.touch()  # the file system's own clock, which may not be this machine's
        if fresh.stat().st_mtime - claim.stat().st_mtime <= STALE_SECONDS:
            time.sleep(0.02)
            return
        aside = claim.with_name(f"{claim.name}.{uuid.uuid4().hex[:8]}")
        os.rename(claim, aside)  # of several processes one succeeds
        aside.unlink(missing_ok=True)


def create(system: Any, path: str, data: bytes) -> bool:
    """Write `data` under a path of an fsspec file system; False where the path is taken.

    Exclusive where the store supports exclusive creation. Elsewhere two simultaneous writers both write, and the later one stays; callers write
    equal data. Raises the file system's errors.
    """
    if system.exists(path):
        return False
    try:
        system.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except (TypeError, NotImplementedError, ValueError):
        system.pipe_file(path, data)
    except Exception:  # each store has its own error for a precondition that failed
        if system.exists(path):
            return False
        raise
    return True


@contextlib.contextmanager
def only_driver(out: Path) -> Iterator[None]:
    """Hold the folder `out` for this process. Raises RequestError, which names the other one, where a running process holds it.

    The operating system drops the lock of a process however it ends. Where the file system cannot lock, the lock is held by the process that it
    names, if that runs on this machine.
    """
    path = out / LOCK
    try:
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--out {out}: expected a folder that this user can lock, got: {error.strerror or error}; give another --out") from None
    with opened as file:
        if not _locked(file):
            raise RequestError(f"--out {out}: expected no other sweep in this folder, got {_holder(path)}; wait for it, or give another --out")
        file.seek(0)
        file.truncate()
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        file.write(json.dumps(about))
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _locked(file: Any) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):  # PermissionError: some network file systems' answer for a locked file
            return False
        except OSError:  # the file system cannot lock
            pass
    file.seek(0)
    about = _read(file.read())
    return about.get("host") != socket.gethostname() or not _runs(about.get("pid"))


def _runs(pid: object) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        about = _read(path.read_text(encoding="utf-8"))
        if about:
            return f"process {about.get('pid')} on {about.get('host')} since {about.get('since')}"
    return "one"


def _read(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        plain = json.loads(text)
        if isinstance(plain, dict):
            return plain
    return {}
