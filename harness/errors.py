"""The exception tree. Every message says what, expected, got and the remedy, in one line.

HarnessError
├── RequestError      the sweep file, the command line or the environment asks for what cannot be: exit status 2, nothing was run
│   ├── ManifestError     a data set's manifest is missing, malformed or of another schema
│   └── EncoderError      an encoder is unknown, its checkpoint does not fit, or it cannot do what is asked
├── ShardError        a shard cannot be read, or does not hold what its manifest says
│   └── SampleError       one sample of it cannot be used
├── BankError         a feature bank is missing, damaged, not of the expected shape or out of reach
├── ProbeError        a probe was given what it cannot be fitted to or asked to predict
├── RunError          the run could not go on: disk full, workers lost too often
└── Unexpected        an exception that nobody raised on purpose, in another process: one line, and its whole traceback
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable


class HarnessError(Exception):
    """Base of all errors that the harness raises on purpose."""


class RequestError(HarnessError):
    """The request is wrong; nothing was run."""


class ManifestError(RequestError):
    """A data set's manifest is missing, malformed or of another schema."""


class EncoderError(RequestError):
    """An encoder is unknown, does not load, or cannot do what is asked of it."""


class ShardError(HarnessError):
    """A shard cannot be read, or does not hold what its manifest says."""


class SampleError(ShardError):
    """One sample of a shard cannot be used."""

    def __init__(self, message: str, *, reason: str | None = None, detail: str = "") -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason
        """What to count it under: the same words for all samples that are lost in one way."""
        self.detail = detail
        """What the message says of this sample alone."""


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
"""What a file system says of a file, again and again, as against of itself."""
_PACKAGES_OF_THE_PLACE = frozenset(
    {"ray", "asyncio", "concurrent", "fsspec", "s3fs", "gcsfs", "adlfs", "boto3", "botocore", "aiobotocore", "google", "azure"}
    | {"aiohttp", "http", "httpx", "httpcore", "requests", "urllib3", "paramiko", "asyncssh"}
)
"""Packages, by their first name, whose exceptions speak of a network, a store or a process: many of them are no OSError."""
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
    """Whether an error is a matter of where something was tried (disk, network, memory, a lost process), and not of what was asked.

    Such an error is tried again, and never becomes the outcome of a study. Everything else is an answer: the next try would end as this one did.
    A shard that is not there, or may not be read, is an answer; a bank, which the run wrote itself, is not.
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
    """What an error says, for the end of a sentence: a HarnessError's message, else the class and the first line of what it says."""
    if isinstance(error, HarnessError):
        return " ".join(str(error).split())
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"


def portable(error: Exception) -> Exception:
    """An error as another process is told it: one that can be pickled, and says by its class what `is_of_the_place` says here.

    The cause of an exception does not survive the way, nor does every exception of a library.
    """
    if isinstance(error, RunError | BankError) or type(error) is OSError:
        return error
    if is_of_the_place(error):
        return OSError(in_one_line(error))
    if isinstance(error, HarnessError):
        return error
    return Unexpected(in_one_line(error), "".join(traceback.format_exception(error)))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
