"""Tracebacks of unexpected exceptions, kept beside the results: `<out>/errors/<study or shard>.txt`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from urllib.parse import quote

FOLDER = "errors"
SEE_FILE = "; the traceback is in "
"""Joins an error's message to the name of its file."""
_LONGEST = 150


def keep(out: Path | None, name: str, text: str) -> str:
    """Write `text` as `<out>/errors/<name>.txt`; the file's path, relative to `out`.

    Where `out` is missing or cannot be written, the file goes to the folder for temporary files, and its path is absolute. Where that fails too,
    a few words say so: a failure here must not hide the error itself.
    """
    if out is not None and out.is_dir():
        try:
            (out / FOLDER).mkdir(exist_ok=True)
            (out / FOLDER / _file_name(name)).write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"{FOLDER}/{_file_name(name)}"
        except OSError:
            pass
    try:
        descriptor, path = tempfile.mkstemp(prefix="partwise-", suffix=f"-{_file_name(name)}")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        return f"no file, since none can be written: {error.strerror or error}"
    return path


def _file_name(name: str) -> str:
    """A name as a file name; a long one is cut and made unique by its digest."""
    quoted = quote(name.replace("/", "__"), safe=" @+=,")
    if len(quoted) > _LONGEST:
        quoted = f"{quoted[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"{quoted}.txt"
