"""Weight files, read without running any code in them."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError

from harness.encoders.digest import file_sha256
from harness.encoders.resize import one_line
from harness.errors import EncoderError

_DEPTH = 8  # nested dictionaries in a checkpoint; real ones have three or four
_SHARED = 100_000  # entries that are reached more than once; one state dict under two names is common
_NAME = 1000  # characters in a tensor's dotted path
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)")
_HARMLESS: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    **{f"{module}.{name}": pathlib.PurePosixPath for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath", "Path")},
    **{f"{module}.{name}": pathlib.PureWindowsPath for module in ("pathlib", "pathlib._local") for name in ("WindowsPath", "PureWindowsPath")},
}
"""What a file may hold beside tensors, by its name in the file: the training arguments that many authors save, a bag of plain values, and paths, each
read as a pure path, which touches no file. `pathlib._local` is where Python 3.13 has them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A weight file's tensors by their dotted path, e.g. `teacher.backbone.cls_token`, on the CPU, as stored."""

    path: str
    sha256: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """A safetensors file's description of itself."""
    args: Mapping[str, object] = field(default_factory=dict)
    """The training arguments that many authors save beside the weights in a torch file, by name."""

    @property
    def file(self) -> str:
        """The file's name."""
        return Path(self.path).name


def read_checkpoint(path: str) -> Checkpoint:
    """Read a torch or safetensors file. Raises EncoderError, in one line, for anything but a file of plain tensors."""
    try:
        head = _head(path)
        kind = _kind(path, head)
        content = _read_safetensors(path) if kind == "safetensors" else _read_torch(path, kind)
        metadata = _metadata(path) if kind == "safetensors" else {}
        sha256 = file_sha256(path)
    except OSError as error:
        raise EncoderError(f"checkpoint {path}: cannot be read: {error.strerror or error}; check the path, relative to the sweep file") from error
    tensors = _flatten(path, content)
    if not tensors:
        raise EncoderError(f"checkpoint {path}: expected tensors by name, found none; give the file that holds the weights")
    for name, tensor in tensors.items():
        _check_storage(path, name, tensor)
    return Checkpoint(path=path, sha256=sha256, tensors=tensors, metadata=metadata, args=_args(content))


def unwrapped(checkpoint: Checkpoint, prefix: str | None = None) -> tuple[Checkpoint, str | None]:
    """`checkpoint`, and a prefix of its keys, without the names that compiling or sharding a network inserts between those of its parts.

    Both stay as they are where two tensors would then have one name.
    """
    tensors = {_WRAPPED.sub("", name): tensor for name, tensor in checkpoint.tensors.items()}
    if len(tensors) != len(checkpoint.tensors):
        return checkpoint, prefix
    return replace(checkpoint, tensors=tensors), None if prefix is None else _WRAPPED.sub("", prefix)


def _head(path: str) -> bytes:
    file = Path(path)
    if file.is_dir():
        raise EncoderError(f"checkpoint {path}: expected a file, got a folder; name the weight file in it")
    with file.open("rb") as stream:
        return stream.read(64)


def _kind(path: str, head: bytes) -> str:
    """`safetensors`, `zip` (torch since 1.6) or `pickle` (torch before)."""
    if not head:
        raise EncoderError(f"checkpoint {path}: the file is empty; download or save it again")
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"version https://git-lfs"):
        raise EncoderError(f"checkpoint {path}: is a Git LFS pointer, not the weights; run git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise EncoderError(f"checkpoint {path}: is a web page, not weights; download the file itself")
    if head.startswith(b"\x80"):
        return "pickle"
    if len(head) > 8 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= Path(path).stat().st_size:
        return "safetensors"
    raise EncoderError(f"checkpoint {path}: expected a torch or safetensors file, got one that begins with {head[:8]!r}; convert it or name another")


def _read_safetensors(path: str) -> Mapping[str, object]:
    try:
        return safetensors.torch.load_file(path)  # type: ignore[no-any-return]
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise EncoderError(f"checkpoint {path}: damaged safetensors file: {one_line(error)}; download or save it again") from error


def _metadata(path: str) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _args(content: object) -> dict[str, object]:
    """The plain settings under `args`, a namespace or a mapping."""
    args = content.get("args") if isinstance(content, Mapping) else None
    settings = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(settings, Mapping):
        return {}
    return {str(name): value for name, value in settings.items() if isinstance(value, str | int | float | list | tuple | dict)}


def _read_torch(path: str, kind: str) -> object:
    if kind == "zip":
        _check_zip(path)
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in _HARMLESS.items()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(_unsafe(path, error)) from error
    except (EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, AssertionError, ImportError) as error:
        raise EncoderError(f"checkpoint {path}: damaged or not a torch file: {one_line(error)}; download or save it again") from error
    except (MemoryError, RecursionError, OverflowError, struct.error) as error:
        raise EncoderError(f"checkpoint {path}: claims more than can be read ({type(error).__name__}); do not trust this file") from error


def _check_zip(path: str) -> None:
    """Refuse archives that would unpack to more than their size: torch stores its entries uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise EncoderError(f"checkpoint {path}: damaged or cut short: {one_line(error)}; download or save it again") from error
    if any(entry.filename.endswith(".npy") for entry in entries):
        raise EncoderError(f"checkpoint {path}: is a NumPy archive, expected a torch or safetensors file; convert it first")
    if any("/code/" in entry.filename for entry in entries):
        raise EncoderError(f"checkpoint {path}: is a TorchScript program, expected plain weights; save its state_dict()")
    unpacked, size = sum(entry.file_size for entry in entries), Path(path).stat().st_size
    if unpacked > size:
        raise EncoderError(
            f"checkpoint {path}: would unpack {unpacked} bytes from a file of {size}, which torch never writes; do not trust this file"
        )


def _unsafe(path: str, error: Exception) -> str:
    """The message for a file that holds more than weights: what it would have run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # only the names are needed, and it fails on what it cannot parse
        names = []
    if set(names) - set(_HARMLESS):
        listed = sorted(set(names) - {"argparse.Namespace"})  # paths stay listed: the file may call their methods
        return (
            f"checkpoint {path}: holds objects that need code to load ({', '.join(listed[:5])}), expected plain tensors; "
            "load it where you trust it and save its state_dict()"
        )
    return f"checkpoint {path}: is not a file of plain tensors: {one_line(error)[:160]}; save the state_dict() alone"


def _flatten(path: str, content: object) -> dict[str, torch.Tensor]:
    if isinstance(content, torch.Tensor) or not isinstance(content, Mapping):
        raise EncoderError(f"checkpoint {path}: expected a dictionary of tensors, got {type(content).__name__}; save the state_dict()")
    walk = _Walk(path)
    walk.collect(content, "", ())
    return walk.tensors


class _Walk:
    """A walk through nested dictionaries. Several paths may lead to one dictionary: a few shared ones can stand for billions of names."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: set[int] = set()
        self._repeated = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def collect(self, content: Mapping[object, object], prefix: str, above: tuple[int, ...]) -> None:
        if id(content) in above or len(above) >= _DEPTH or len(prefix) > _NAME:
            raise EncoderError(f"checkpoint {self._path}: dictionaries nested without end under {prefix[:80]!r}; do not trust this file")
        if id(content) in self._seen:
            self._repeated += 1 + len(content)
        if self._repeated > _SHARED:
            raise EncoderError(f"checkpoint {self._path}: the same dictionaries lie under more than {_SHARED} names; do not trust this file")
        self._seen.add(id(content))
        for key, value in content.items():
            if isinstance(value, torch.Tensor):
                self._add(f"{prefix}{key}", value)
            elif isinstance(value, Mapping):
                self.collect(value, f"{prefix}{key}.", (*above, id(content)))

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.tensors:
            raise EncoderError(f"checkpoint {self._path}: the name {name!r} occurs twice; save the state_dict() alone")
        self.tensors[name] = tensor


def _check_storage(path: str, name: str, tensor: torch.Tensor) -> None:
    """A tensor may claim a shape far beyond the bytes behind it (stride 0): reading it would fill the memory."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        raise EncoderError(f"checkpoint {path}: {name} is not a plain dense tensor ({tensor.layout}, {tensor.dtype}); save dense float weights")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise EncoderError(
            f"checkpoint {path}: {name} claims {list(tensor.shape)} over {tensor.untyped_storage().nbytes()} bytes; do not trust this file"
        )
