"""The exception tree. Every message says what, expected, got and the remedy, in one line.

HarnessError
├── RequestError      the sweep file, the command line or the environment asks for something impossible: exit status 2, nothing was run
│   ├── ManifestError     a data set's manifest is missing, malformed or of another schema
│   └── EncoderError      an encoder is unknown, its checkpoint does not fit, or it cannot do what is requested
├── ShardError        a shard cannot be read, or does not hold what its manifest says
│   └── SampleError       one sample of it cannot be used
├── BankError         a feature bank is missing, damaged, not of the expected shape or out of reach
├── ProbeError        a probe was given what it cannot be fitted to or asked to predict
├── RunError          the run could not go on: disk full, workers lost too often
└── Unexpected        an exception that nobody raised on purpose, in another process: one line, and its whole traceback
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable

import pydantic


class HarnessError(Exception):
    """Base of all errors that the harness raises on purpose."""


class RequestError(HarnessError):
    """The request is wrong; nothing was run."""


class ManifestError(RequestError):
    """A data set's manifest is missing, malformed or of another schema."""


class EncoderError(RequestError):
    """An encoder is unknown, does not load, or cannot do what is requested."""


class ShardError(HarnessError):
    """A shard cannot be read, or does not hold what its manifest says."""


class SampleError(ShardError):
    """One sample of a shard cannot be used."""

    def __init__(self, message: str, *, reason: str | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason
        """The reason to count it under: the same words for all samples that are lost in the same way."""
        self.detail = detail
        """The part of the message about this sample alone."""


class BankError(HarnessError):
    """A feature bank is missing, damaged, not of the expected shape or out of reach."""


class ProbeError(HarnessError):
    """A probe was given what it cannot be fitted to or asked to predict."""


class RunError(HarnessError):
    """The run could not go on."""


class Unexpected(HarnessError):
    """An exception that nobody raised on purpose, as it reaches another process: `<class>: <first line>`, and the whole traceback."""

    def __init__(self, line: str, traceback: str) -> None:
        super().__init__(line, traceback)  # both are arguments, so that it can be pickled
        self.line = line
        self.traceback = traceback

    def __str__(self) -> str:
        return self.line


_OF_THE_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Permanent answers of a file system about one file, as opposed to its own faults."""
_PACKAGES_OF_THE_PLACE = frozenset(
    {"ray", "asyncio", "concurrent", "fsspec", "s3fs", "gcsfs", "adlfs", "boto3", "botocore", "aiobotocore", "google", "azure"}
    | {"aiohttp", "http", "httpx", "httpcore", "requests", "urllib3", "paramiko", "asyncssh"}
)
"""Packages, by their first name, whose exceptions concern a network, a store or a process: many of them are not an OSError."""
_CLASSES_OF_THE_PLACE = frozenset({"torch.OutOfMemoryError", "torch.AcceleratorError", "torch.cuda.OutOfMemoryError"})
_WORDS_OF_THE_PLACE = (
    "can't allocate memory",
    "cannot allocate memory",
    "no space left on device",
    "can't start new thread",
    "cuda error",
    "cuda out of memory",
    "cudnn error",
    "cublas_status_alloc_failed",
)
"""In a RuntimeError of torch or of the interpreter, in lower case."""


def is_of_the_place(error: BaseException) -> bool:
    """Whether an error comes from the place of the attempt (disk, network, memory, a lost process), and not from the request.

    After such an error the work is retried, and it never becomes the outcome of a study. Any other error is an answer: a retry would end the same.
    A missing or unreadable shard is an answer; a missing bank, which the run wrote itself, is not.
    """
    if isinstance(error, OSError | MemoryError | BankError | RunError):
        return True
    if isinstance(error, Unexpected):
        return False
    if isinstance(error, HarnessError):
        cause = error.__cause__
        return cause is not None and not isinstance(cause, _OF_THE_FILE) and is_of_the_place(cause)
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS_OF_THE_PLACE):
        return True
    kinds = [kind for kind in type(error).__mro__ if kind.__module__ != "builtins"]
    return any(
        kind.__module__.split(".")[0] in _PACKAGES_OF_THE_PLACE or f"{kind.__module__}.{kind.__name__}" in _CLASSES_OF_THE_PLACE for kind in kinds
    )


def in_one_line(error: BaseException) -> str:
    """An error's message, for the end of a sentence: a HarnessError's whole message, else the class and the first line."""
    if isinstance(error, HarnessError):
        return " ".join(str(error).split())
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"


def portable(error: Exception) -> Exception:
    """An error for another process: it can be pickled, and its class keeps the answer of `is_of_the_place`.

    An exception's cause does not survive the transfer, nor does every exception of a library.
    """
    if isinstance(error, RunError | BankError) or type(error) is OSError:
        return error
    if is_of_the_place(error):
        return OSError(in_one_line(error))
    if isinstance(error, HarnessError):
        return error
    return Unexpected(in_one_line(error), "".join(traceback.format_exception(error)))


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the candidate nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def complaint(error: pydantic.ValidationError, root: str = "") -> str:
    """`<field>: expected …, got …`, of the first thing that a model finds wrong with its values; the field's name begins with `root`, if given."""
    first = min(error.errors(include_url=False), key=lambda details: _CLUMSINESS.get(details["type"], 1))
    steps = [root, *(str(step) for step in first["loc"])]
    location = ".".join(step for step in steps if step and not _UNION_MEMBER.match(step))
    if first["type"] == "missing":
        return f"{location}: expected this key, got none"
    if first["type"] == "too_short":
        return f"{location}: expected at least one, got an empty list"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:300].replace("Input should be", "expected")
    if first["type"] == "value_error":
        return f"{location}: {message}"
    choices = re.findall("'([^']*)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else []
    return f"{location}: {message}, got {repr(first['input'])[:80]}{nearest(str(first['input']), choices)}"


_CLUMSINESS = {"missing": 0, "literal_error": 2, "too_short": 2}
"""Of several complaints about one value (a union has one for each of its members), the one that helps most comes first."""
_UNION_MEMBER = re.compile(r"int$|float$|literal\[|constrained-|function-")
"""What names the member of a union, and no field."""
