"""Digests of weight files and of the weights in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

_CHUNK = 1 << 22


def file_sha256(path: str) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits. Remembered for as long as size and modification time stay the same."""
    status = Path(path).stat()
    return _file_sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, shape, dtype and bytes of each tensor, sorted by name: the same for the same weights in any file.

    Batch norm's `num_batches_tracked` is left out: it is a training counter, and whether a file has it changes no feature.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
