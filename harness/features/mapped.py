"""Arrays of many files as one, read in place, so that a bank larger than memory stays usable.

Shape legend: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from harness.core import FeatureArray

HELD_BYTES = 2**32
"""Size in bytes of the largest array that is copied into memory as a whole: 4 GiB, the 768 float32 of each image of ImageNet-1k."""


class MappedArray:
    """Arrays [n, ...] of one dtype and row shape, one after the other, or chosen rows of them; only requested rows are copied."""

    def __init__(self, arrays: Sequence[np.ndarray], index: np.ndarray | None = None) -> None:
        self._arrays = tuple(arrays)
        """At least one."""
        self._ends = np.cumsum([len(array) for array in arrays])
        self._index = index
        """int64 [N] rows of the concatenated arrays; None for all rows in order."""
        self.dtype = arrays[0].dtype
        self.shape: tuple[int, ...] = (int(self._ends[-1]) if index is None else len(index), *arrays[0].shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape) * self.dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        """A copy of a slice of rows, or of the rows at int64 [...], which then has the shape [..., *row]."""
        if isinstance(where, slice):
            rows = np.arange(*where.indices(len(self)))
            return self._gathered(rows if self._index is None else self._index[rows])
        rows = where.reshape(-1)
        rows = np.where(rows < 0, rows + len(self), rows)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"expected rows of {len(self)}, got {rows.min()} to {rows.max()}")
        return self._gathered(rows if self._index is None else self._index[rows]).reshape(*where.shape, *self.shape[1:])

    def chosen(self, index: np.ndarray) -> MappedArray:
        """The rows at `index`, int64 [n], without a copy."""
        return MappedArray(self._arrays, index if self._index is None else self._index[index])

    def _gathered(self, rows: np.ndarray) -> np.ndarray:
        gathered = np.empty((len(rows), *self.shape[1:]), self.dtype)
        array_of_row = np.searchsorted(self._ends, rows, side="right")
        for place in np.unique(array_of_row):
            array, here = self._arrays[place], np.flatnonzero(array_of_row == place)
            lines = rows[here] - (self._ends[place] - len(array))
            if here[-1] - here[0] == lines[-1] - lines[0] == len(here) - 1 and np.all(np.diff(lines) == 1):
                gathered[here[0] : here[-1] + 1] = array[lines[0] : lines[-1] + 1]  # without a copy in between
            else:
                gathered[here] = array[lines]
        return gathered

    @staticmethod
    def of(arrays: Sequence[FeatureArray]) -> MappedArray:
        """All rows of all arrays, without a copy."""
        mapped = [array if isinstance(array, MappedArray) else MappedArray([array[:]]) for array in arrays]
        files = [array for single in mapped for array in single._arrays]
        if all(single._index is None for single in mapped):
            return MappedArray(files)
        starts = np.cumsum([0, *(int(single._ends[-1]) for single in mapped)])
        rows = [np.arange(len(single)) if single._index is None else single._index for single in mapped]
        return MappedArray(files, np.concatenate([row + start for row, start in zip(rows, starts, strict=False)]))


def joined_arrays(arrays: Sequence[FeatureArray]) -> FeatureArray:
    """All rows of one or more arrays: in memory up to HELD_BYTES, else read in place."""
    if len(arrays) == 1:
        return arrays[0]
    if sum(array.nbytes for array in arrays) > HELD_BYTES:
        return MappedArray.of(arrays)
    return np.concatenate([array[:] for array in arrays])


def taken(array: FeatureArray, index: np.ndarray) -> FeatureArray:
    """The rows at `index`, int64 [n]: in memory up to HELD_BYTES, else read in place."""
    if len(index) * math.prod(array.shape[1:]) * array.dtype.itemsize > HELD_BYTES:
        return MappedArray.of([array]).chosen(index)
    return array[index]
