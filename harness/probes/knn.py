"""The weighted k-NN probe: cosine similarity, votes exp(similarity / temperature).

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018 (arXiv 1805.01978), with the k = 20 and T = 0.07 of DINO's
evaluation.

Shape legend: N training rows, Q queries, D features, C classes, k neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.core import Fields, Predictions, RowProbe, Rows
from harness.probes.fields import Count, Positive, no_learning_rate
from harness.probes.lib.features import Features, checked_features, checked_targets, needed, on_device
from harness.probes.lib.similarity import inverse_norms, nearest_in_gallery

NAME = "knn"
QUERY_ROWS = 512
"""Queries compared at once: with a gallery chunk of 65,536 rows, 128 MiB of similarities."""


class KNNFields(Fields):
    k: Count = 20
    """Neighbours that vote; every training row where there are fewer."""
    temperature: Positive = 0.07


@dataclass(frozen=True, kw_only=True, eq=False)
class KNNStack:
    """The training rows, and how they vote."""

    gallery: Features
    """[N, D], over the bank's own memory on a CPU."""
    inverse: torch.Tensor
    targets: torch.Tensor
    """int64 [N]."""
    classes: int
    fields: KNNFields
    device: torch.device

    def predict(self, rows: Rows, head: int) -> Predictions:
        """The class with most votes (the lowest of equals) and its share of them. Raises ProbeError where `rows` do not fit."""
        features = checked_features(NAME, rows, width=self.gallery.shape[1])
        shares = [self._vote(features[start : start + QUERY_ROWS].to(self.device)) for start in range(0, len(rows), QUERY_ROWS)]
        return Predictions(
            keys=rows.keys,
            groups=rows.groups,
            targets=np.asarray(rows.targets, dtype=np.int64),
            predictions=np.concatenate([predictions for predictions, _ in shares]),
            scores=np.concatenate([scores for _, scores in shares]),
        )

    def _vote(self, queries: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """int64 [Q] classes and float64 [Q] vote shares."""
        similarity, neighbours = nearest_in_gallery(queries, self.gallery, self.inverse, self.fields.k)
        # the nearest one's vote is 1: shares do not change, and no temperature overflows
        weights = ((similarity - similarity[:, :1]).double() / self.fields.temperature).exp()
        votes = torch.zeros(len(queries), self.classes, dtype=torch.float64, device=self.device)
        votes.scatter_add_(1, self.targets[neighbours], weights)
        most, classes = (votes / weights.sum(dim=1, keepdim=True)).max(dim=1)
        return classes.cpu().numpy(), most.cpu().numpy()

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """Empty: the training rows are all there is."""
        return {}


class KNNProbe(RowProbe[KNNFields]):
    """Weighted k nearest neighbours by cosine. Nothing is trained, so `lrs` is [None]."""

    def fit(self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: KNNFields, seed: int, device: torch.device) -> KNNStack:
        """A stack of one head. Raises ProbeError on rows or protocol fields that cannot be, or on learning rates."""
        no_learning_rate(NAME, lrs)
        return self.restore({}, train, classes=classes, protocol=protocol, seed=seed, device=device)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: KNNFields, seed: int, device: torch.device
    ) -> KNNStack:
        """The same from the training rows alone."""
        rows = needed(NAME, train)
        gallery = on_device(checked_features(NAME, rows), device)
        targets = checked_targets(NAME, rows, classes).to(device)
        return KNNStack(gallery=gallery, inverse=inverse_norms(gallery), targets=targets, classes=classes, fields=protocol, device=device)


PROBE = KNNProbe(name=NAME, fields=KNNFields)
