"""The exception tree. Every message says what, expected, got and the remedy, in one line.

HarnessError
├── RequestError      the sweep file, the command line or the environment asks for what cannot be: exit status 2, nothing was run
│   ├── ManifestError     a data set's manifest is missing, malformed or of another schema
│   └── EncoderError      an encoder is unknown, its checkpoint does not fit, or it cannot do what is asked
├── ShardError        a shard cannot be read, or does not hold what its manifest says
│   └── SampleError       one sample of it cannot be used
├── BankError         a feature bank is missing, damaged or not of the expected shape
├── ProbeError        a probe was given what it cannot be fitted to or asked to predict
└── RunError          the run could not go on: disk full, workers lost too often
"""

from __future__ import annotations

import difflib
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
    """A feature bank is missing, damaged or not of the expected shape."""


class ProbeError(HarnessError):
    """A probe was given what it cannot be fitted to or asked to predict."""


class RunError(HarnessError):
    """The run could not go on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
