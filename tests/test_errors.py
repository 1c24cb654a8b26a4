"""What is tried again and what is an answer, and how an exception reaches another process."""

from __future__ import annotations

import concurrent.futures
import errno
import http.client
import pickle

import pyarrow as pa
import pytest
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError

from harness.errors import (
    BankError,
    EncoderError,
    HarnessError,
    ManifestError,
    ProbeError,
    RequestError,
    RunError,
    ShardError,
    Unexpected,
    in_one_line,
    is_of_the_place,
    portable,
)


def of_package(module: str, name: str = "FlexibleChecksumError", base: type[Exception] = Exception) -> Exception:
    """An exception as a package that is not installed here would raise it."""
    error: Exception = type(name, (base,), {"__module__": module})("expected checksum x, got y")
    return error


def caused(error: HarnessError, cause: Exception) -> HarnessError:
    error.__cause__ = cause
    return error


PLACE = {
    "a disk": OSError(errno.EIO, "Input/output error"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a network": ConnectionResetError("peer"),
    "a timeout": TimeoutError("slow"),
    "a file of the run's own": FileNotFoundError(errno.ENOENT, "No such file"),
    "memory": MemoryError(),
    "Arrow's memory": pa.ArrowMemoryError("malloc of size 8 failed"),
    "a GPU's memory": torch.OutOfMemoryError("CUDA out of memory"),
    "a GPU": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    "torch's memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "torch's mapped memory": RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"),
    "torch's disk": RuntimeError("unable to write to file </torch_1>: No space left on device (28)"),
    "threads": RuntimeError("can't start new thread"),
    "a bank": BankError("bank x, a.tar: cannot be read"),
    "a run": RunError("cannot write x"),
    "a shard out of reach": caused(ShardError("s3://x: cannot be read"), OSError(errno.EIO, "Input/output error")),
    "a shard behind a timeout": caused(ShardError("s3://x: cannot be read"), TimeoutError()),
    "an encoder's file out of reach": caused(EncoderError("x.pth: cannot be read"), OSError(errno.ESTALE, "Stale file handle")),
    "Ray's memory": OutOfMemoryError("worker killed"),
    "Ray's objects": ObjectLostError("ff", None, ""),
    "a lost process": concurrent.futures.BrokenExecutor("died"),
    "half an answer": http.client.IncompleteRead(b""),
    "botocore": of_package("botocore.exceptions"),
    "aiobotocore, by its base": type("Their", (type(of_package("botocore.exceptions")),), {"__module__": "elsewhere"})("x"),
    "fsspec": of_package("fsspec.exceptions", "FSTimeoutError"),
    "aiohttp": of_package("aiohttp.client_exceptions", "ClientPayloadError"),
    "google": of_package("google.api_core.exceptions", "ServiceUnavailable"),
    "azure": of_package("azure.core.exceptions", "HttpResponseError"),
}
ANSWERS = {
    "a type": TypeError("unhashable"),
    "a key": KeyError("x"),
    "a value": ValueError("x"),
    "an assertion": AssertionError(),
    "torch": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    "a probe": ProbeError("diverged"),
    "a request": RequestError("no such task"),
    "a manifest": ManifestError("x"),
    "a shard": ShardError("x: not a tar"),
    "a shard that is not there": caused(ShardError("x: cannot be read"), FileNotFoundError(errno.ENOENT, "No such file")),
    "a shard that may not be read": caused(ShardError("x: cannot be read"), PermissionError(errno.EACCES, "Permission denied")),
    "a shard of broken JSON": caused(ShardError("broken json"), ValueError("x")),
    "an exception of another process": Unexpected("TypeError: x", ""),
    "a package with a like name": of_package("raynaud.errors"),
}


@pytest.mark.parametrize("case", PLACE)
def test_what_is_of_the_place_is_tried_again_wherever_it_is_told(case: str) -> None:
    error = PLACE[case]
    assert is_of_the_place(error)
    again = pickle.loads(pickle.dumps(portable(error)))
    assert is_of_the_place(again), "the class says so in another process too"
    assert in_one_line(again).count("\n") == 0
    if isinstance(error, HarnessError):
        assert str(error) in str(again)


@pytest.mark.parametrize("case", ANSWERS)
def test_everything_else_is_an_answer_wherever_it_is_told(case: str) -> None:
    error = ANSWERS[case]
    assert not is_of_the_place(error)
    again = pickle.loads(pickle.dumps(portable(error)))
    assert not is_of_the_place(again)
    if isinstance(error, HarnessError):
        assert (type(again), str(again)) == (type(error), str(error))
    else:
        assert isinstance(again, Unexpected)
        assert str(again).startswith(f"{type(error).__name__}: ")


class TwoArguments(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_an_exception_that_cannot_be_pickled_arrives_with_its_traceback() -> None:
    def deep() -> None:
        raise TwoArguments("a", "b")

    with pytest.raises(TwoArguments) as caught:
        deep()
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(caught.value))
    again = pickle.loads(pickle.dumps(portable(caught.value)))
    assert isinstance(again, Unexpected)
    assert str(again) == "TwoArguments: a b"
    assert "in deep" in again.traceback


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError(), "ValueError: no message"), (ValueError("\n a \n b"), "ValueError: a"), (RunError("a\n b"), "a b")]
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert in_one_line(error) == line
