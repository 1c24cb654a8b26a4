"""Rows of a bank as tensors, checked once, and the normalisations of protocols.

Shape legend: N rows, D features, C classes, B batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from harness.core import FeatureArray, Rows
from harness.errors import ProbeError

FeatureNorm = Literal["none", "l2", "standardize"]

CHUNK_ROWS = 4096
"""Rows converted at once. Fixed, since chunks must not depend on the machine."""
CHECKED_BYTES = 2**24
"""Bytes of features checked for NaN and infinity at once."""


class MappedFeatures:
    """Features that do not fit into memory, with the parts of the interface of a CPU tensor that readers need."""

    device = torch.device("cpu")

    def __init__(self, array: FeatureArray) -> None:
        self._array = array
        self.shape = torch.Size(array.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: slice | torch.Tensor) -> torch.Tensor:
        """A slice of rows, or the rows at int64 [B]; a copy."""
        return as_tensor(self._array[where if isinstance(where, slice) else where.numpy()])

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def to(self, device: torch.device) -> torch.Tensor:
        """All features on the device, which has room for them."""
        return torch.cat([self[start : start + CHUNK_ROWS].to(device) for start in range(0, len(self), CHUNK_ROWS)])


Features = torch.Tensor | MappedFeatures


def vectors(features: Features) -> Iterator[torch.Tensor]:
    """Chunks [n, D] of features [N, ..., D] with all dimensions but the last one as rows, at most CHUNK_ROWS of them."""
    per_row = math.prod(features.shape[1:-1])
    for start in range(0, len(features) * per_row, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(features) * per_row)
        first = start // per_row
        yield features[first : -(-stop // per_row)].reshape(-1, features.shape[-1])[start - first * per_row : stop - first * per_row]


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor over the same memory, which may be a read-only map: nothing here writes to features."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))


def checked_features(probe: str, rows: Rows, *, dims: int = 2, width: int | None = None) -> Features:
    """Features of `rows` [N, ..., D], of `dims` dimensions, as a tensor that shares the memory of an array.

    Raises ProbeError where the rows are empty, the shape or the width differs, or a value is not finite.
    """
    features = rows.features
    if features.ndim != dims or len(features) != len(rows):
        raise ProbeError(
            f"{probe} probe: expected features of {dims} dimensions, one a row of {len(rows)}, got {features.shape}; choose another readout"
        )
    if not len(rows):
        raise ProbeError(f"{probe} probe: expected rows, got none; check that the split has items of this task")
    if width is not None and features.shape[-1] != width:
        raise ProbeError(f"{probe} probe: expected features of width {width}, got {features.shape[-1]}; give rows of the bank it was fitted to")
    step = max(1, CHECKED_BYTES * len(features) // max(1, features.nbytes))
    for start in range(0, len(rows), step):
        chunk = features[start : start + step]
        if not np.isfinite(chunk).all():
            bad = start + int(np.flatnonzero(~np.isfinite(chunk.reshape(len(chunk), -1)).all(axis=1))[0])
            raise ProbeError(f"{probe} probe: expected finite features, got NaN or infinity in {rows.keys[bad]!r}; encode it again in float32")
    return as_tensor(features) if isinstance(features, np.ndarray) else MappedFeatures(features)


def checked_targets(probe: str, rows: Rows, classes: int) -> torch.Tensor:
    """int64 [N] targets, all of them classes. Raises ProbeError where a target is missing or is not a class."""
    wrong = np.flatnonzero((rows.targets < 0) | (rows.targets >= classes))
    if len(wrong):
        key, target = rows.keys[int(wrong[0])], int(rows.targets[wrong[0]])
        raise ProbeError(f"{probe} probe: expected training targets from 0 to {classes - 1}, got {target} for {key!r}; leave such rows out")
    return as_tensor(rows.targets.astype(np.int64, copy=False))


def needed(probe: str, train: Rows | None) -> Rows:
    """`train`. Raises ProbeError where it is None."""
    if train is None:
        raise ProbeError(f"{probe} probe: expected training rows, got None; give it the bank of the training split")
    return train


def on_device(features: Features, device: torch.device) -> Features:
    """`features` on the device, or unmoved if they would fill more than half of its free memory: batches are then moved one by one."""
    if device.type == "cuda":
        return features if features.nbytes > torch.cuda.mem_get_info(device)[0] // 2 else features.to(device)
    return features


@dataclass(frozen=True, kw_only=True, eq=False)
class Normaliser:
    """Float32 features: unchanged, at unit length, or standardised by the training rows' mean and standard deviation."""

    kind: FeatureNorm
    mean: torch.Tensor | None = None
    """float32 [D]."""
    std: torch.Tensor | None = None
    """float32 [D]; 1 where a feature is constant."""

    @classmethod
    def fit(cls, kind: FeatureNorm, features: Features, device: torch.device) -> Normaliser:
        """The normaliser of training features [N, ..., D]; the mean and the (biased) variance are summed in float64 on the CPU."""
        if kind != "standardize":
            return cls(kind=kind)
        count = math.prod(features.shape[:-1])
        mean = sum((chunk.double().sum(dim=0) for chunk in vectors(features)), torch.zeros(features.shape[-1], dtype=torch.float64)) / count
        square = sum(((chunk.double() - mean).square().sum(dim=0) for chunk in vectors(features)), torch.zeros_like(mean))
        std = (square / count).sqrt()
        # a constant feature's deviation is rounding, not spread: below float32's resolution of its mean it must not be blown up
        std = torch.where(std > mean.abs() * torch.finfo(torch.float32).eps, std, torch.ones_like(std))
        return cls(kind=kind, mean=mean.float().to(device), std=std.float().to(device))

    @classmethod
    def restore(cls, kind: FeatureNorm, state: Mapping[str, torch.Tensor], device: torch.device) -> Normaliser:
        """The normaliser that `state` was taken from."""
        if kind != "standardize":
            return cls(kind=kind)
        return cls(kind=kind, mean=state["mean"].to(device), std=state["std"].to(device))

    def state(self) -> dict[str, torch.Tensor]:
        """The fitted tensors, on the CPU; copies, since the heads of a stack share them and a file of tensors allows no sharing."""
        return {} if self.mean is None or self.std is None else {"mean": self.mean.to("cpu", copy=True), "std": self.std.to("cpu", copy=True)}

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [B, D]."""
        features = features.float()
        if self.kind == "l2":
            return torch.nn.functional.normalize(features, dim=-1)
        if self.mean is not None and self.std is not None:
            return (features - self.mean) / self.std
        return features


def batch_order(rows: int, batch_size: int, generator: torch.Generator) -> Sequence[torch.Tensor]:
    """One epoch's batches of row indices, int64, shuffled; the last one may be smaller."""
    order = torch.randperm(rows, generator=generator)
    return [order[start : start + batch_size] for start in range(0, rows, batch_size)]
