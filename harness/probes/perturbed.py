"""The k-NN probe on altered images, and the cosine of their features with those of the intact images.

The gallery holds intact images, so only the queries are altered.

Shape legend: N rows, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from harness.core import Predictions, RowProbe, Rows
from harness.errors import ProbeError
from harness.probes.fields import no_learning_rate
from harness.probes.knn import PROBE as KNN
from harness.probes.knn import KNNFields, KNNStack
from harness.probes.lib.features import CHUNK_ROWS

NAME = "perturbed"


class PerturbedFields(KNNFields):
    """The fields of the k-NN probe."""


def cosine_to(reference: Rows, rows: Rows) -> np.ndarray:
    """float64 [N]: cosine of each row's features [D] with those of the same key in `reference`; NaN where either are zeros.

    Raises ProbeError where `reference` lacks a key.
    """
    place = {key: index for index, key in enumerate(reference.keys)}
    lost = [key for key in rows.keys if key not in place]
    if lost:
        raise ProbeError(f"{NAME} probe: expected the intact image of every row, got none of {lost[0]!r}; give both banks of one split")
    index = np.array([place[key] for key in rows.keys], dtype=np.int64)
    cosines = []
    for start in range(0, len(rows), CHUNK_ROWS):
        altered = rows.features[start : start + CHUNK_ROWS].astype(np.float64)
        intact = reference.features[index[start : start + CHUNK_ROWS]].astype(np.float64)
        norms = np.linalg.norm(altered, axis=1) * np.linalg.norm(intact, axis=1)
        cosines.append((altered * intact).sum(axis=1) / np.where(norms > 0, norms, np.nan))
    return np.concatenate(cosines) if cosines else np.zeros(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class PerturbedStack:
    """The training rows, and how they vote."""

    inner: KNNStack

    def predict(self, rows: Rows, head: int) -> Predictions:
        """The k-NN prediction for each row; the score is the cosine with the intact image's features, NaN where `rows` have no reference.

        Raises ProbeError where `rows`, or their reference, do not fit.
        """
        predictions = self.inner.predict(rows, head)
        scores = np.full(len(rows), np.nan) if rows.reference is None else cosine_to(rows.reference, rows)
        return replace(predictions, scores=scores)

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """Empty: the training rows are the whole state."""
        return {}


class PerturbedProbe(RowProbe[PerturbedFields]):
    """Weighted k nearest neighbours beside the cosine with a reference. Nothing is trained, so `lrs` is [None]."""

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: PerturbedFields, seed: int, device: torch.device
    ) -> PerturbedStack:
        """A stack of one head. Raises ProbeError on invalid rows, or on learning rates."""
        no_learning_rate(NAME, lrs)
        return self.restore({}, train, classes=classes, protocol=protocol, seed=seed, device=device)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: PerturbedFields, seed: int, device: torch.device
    ) -> PerturbedStack:
        """The same from the training rows alone."""
        return PerturbedStack(inner=KNN.restore(state, train, classes=classes, protocol=protocol, seed=seed, device=device))


PROBE = PerturbedProbe(name=NAME, fields=PerturbedFields, scores="cosines", metrics=("accuracy", "mean_class_accuracy", "cosine_to_intact"))
