"""Checks of the arguments of `encode`, the same for every architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from harness.encoders.resize import one_line
from harness.errors import EncoderError

_DEVICE_FAULTS = (torch.OutOfMemoryError, torch.AcceleratorError)


def check_images(name: str, images: torch.Tensor) -> None:
    """Raise EncoderError unless `images` is a floating-point [B, 3, H, W] with at least one image."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
        got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise EncoderError(f"encoder {name}: expected images as float [B, 3, H, W], got {got}; prepare them with harness.data.preprocess.prepare")


def check_blocks(name: str, blocks: Sequence[int], count: int) -> None:
    """Raise EncoderError unless every block is a 0-based index below `count`."""
    for block in blocks:
        if not 0 <= block < count:
            raise EncoderError(f"encoder {name}: has no block {block}: expected 0 to {count - 1}")


def check_indices(name: str, argument: str, indices: torch.Tensor, batch: int, cells: int) -> None:
    """Raise EncoderError unless `indices` is int64 [batch, n] of grid indices below `cells`."""
    if indices.dtype != torch.int64 or indices.ndim != 2 or indices.shape[0] != batch or indices.shape[1] == 0:
        got = f"{str(indices.dtype).removeprefix('torch.')} {list(indices.shape)}"
        raise EncoderError(f"encoder {name}: {argument} must be int64 [{batch}, n] with n of at least 1, got {got}")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= cells:
        raise EncoderError(f"encoder {name}: {argument} must be grid indices from 0 to {cells - 1}, got {low} to {high}")


@contextmanager
def refusals(name: str, network: torch.nn.Module, images: torch.Tensor) -> Iterator[None]:
    """Raise EncoderError, in one line, where the network fails on the images. Faults of the device pass through: a retry may succeed."""
    try:
        yield
    except _DEVICE_FAULTS:
        raise
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise EncoderError(f"encoder {name}: {type(network).__name__} failed on {got}: {one_line(error)}") from error
