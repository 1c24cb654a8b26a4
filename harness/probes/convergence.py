"""How close the mean of an image's first n patch embeddings is to the embedding of the whole image (BagSSL: Chen et al., arXiv 2206.08954).

The floor compares the same mean with another whole image: what patches share with any image is not convergence.

Shape legend: I images, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.core import Predictions, Quantity, RowProbe, Rows
from harness.data.item_key import sample_of
from harness.errors import ProbeError
from harness.probes.fields import no_learning_rate
from harness.probes.lib.bags import BagFields, bags
from harness.probes.lib.measured import measured, quotient

NAME = "convergence"
_ZERO, _NO_OTHER = "the embeddings are zero", "there is no other image to compare with, or embeddings are zero"
QUANTITIES = (
    Quantity(name="cosine", unit="cosine", undefined=_ZERO),
    Quantity(name="cosine_floor", unit="cosine", undefined=_NO_OTHER),
    Quantity(name="relative_distance", unit="share of the norm", undefined=_ZERO),
    Quantity(name="relative_distance_floor", unit="share of the norm", undefined=_NO_OTHER),
)
NAMES = tuple(quantity.name for quantity in QUANTITIES)


class ConvergenceFields(BagFields):
    """The fields of a bag; `normalize` treats the whole image's embedding as a bag of one patch."""


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [I] cosines of the rows of two arrays [I, D]; NaN where one of them is zero."""
    return quotient((first * second).sum(axis=1), np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))


def relative_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [I]: ‖first - second‖ / ‖second‖ of the rows of two arrays [I, D]; NaN where second is zero."""
    return quotient(np.linalg.norm(first - second, axis=1), np.linalg.norm(second, axis=1))


def others(targets: np.ndarray, seed: int) -> np.ndarray:
    """int64 [I]: for each image, another image of a different class, drawn uniformly by the seed; of the same class where only one class exists.

    A function of the seed and of all targets [I], I > 1, in their order.
    """
    count = len(targets)
    distinct, which, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    chance = np.random.default_rng(seed).random(count)
    if len(distinct) == 1:
        alone: np.ndarray = (np.arange(count) + 1 + (chance * (count - 1)).astype(np.int64)) % count
        return alone
    by_class = np.argsort(which, kind="stable")
    start = (np.cumsum(sizes) - sizes)[which]
    place = (chance * (count - sizes[which])).astype(np.int64)  # among the others, class by class
    chosen: np.ndarray = by_class[place + np.where(place < start, 0, sizes[which])]
    return chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvergenceStack:
    """Nothing is fitted."""

    fields: ConvergenceFields
    seed: int

    def predict(self, rows: Rows, head: int) -> Predictions:
        """One row per (image and draw, quantity), see QUANTITIES: cosine and relative distance to the same image and to another one.

        Raises ProbeError where `rows` have no reference, or the reference lacks an image.
        """
        if rows.reference is None:
            raise ProbeError(f"{NAME} probe: expected rows with those of whole images as reference, got none; give the bank of the whole images")
        (whole,) = bags(NAME, rows.reference, 1, self.fields.normalize).values()
        place = {key: index for index, key in enumerate(whole.keys)}
        compared = [self._of(means, draw, whole, place) for draw, means in bags(NAME, rows, self.fields.bag_size, self.fields.normalize).items()]
        values = {name: np.concatenate([quantities[name] for _, quantities in compared]) for name in NAMES}
        keys, groups = [key for means, _ in compared for key in means.keys], [group for means, _ in compared for group in means.groups]
        return measured(QUANTITIES, keys, groups, values)

    def _of(self, rows: Rows, draw: int | None, whole: Rows, place: Mapping[str, int]) -> tuple[Rows, dict[str, np.ndarray]]:
        images = [key if draw is None else sample_of(key) for key in rows.keys]
        lost = [key for key, image in zip(rows.keys, images, strict=True) if image not in place]
        if lost:
            raise ProbeError(f"{NAME} probe: expected the whole image of every bag, got none of {lost[0]!r}; give both banks of one split")
        means = rows.features[:].astype(np.float64)
        embeddings = whole.features[np.array([place[image] for image in images], np.int64)].astype(np.float64)
        foreign = means[others(rows.targets, self.seed)] if len(rows) > 1 else np.full_like(means, np.nan)
        return rows, {
            "cosine": cosine(means, embeddings),
            "cosine_floor": cosine(foreign, embeddings),
            "relative_distance": relative_distance(means, embeddings),
            "relative_distance_floor": relative_distance(foreign, embeddings),
        }

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """Empty: nothing is fitted."""
        return {}


class ConvergenceProbe(RowProbe[ConvergenceFields]):
    """Bags against whole images, which are given as `Rows.reference`. Nothing is trained, so `lrs` is [None]."""

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: ConvergenceFields, seed: int, device: torch.device
    ) -> ConvergenceStack:
        """A stack of one head. Raises ProbeError on learning rates."""
        no_learning_rate(NAME, lrs)
        return self.restore({}, train, classes=classes, protocol=protocol, seed=seed, device=device)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: ConvergenceFields, seed: int, device: torch.device
    ) -> ConvergenceStack:
        """The same; the seed draws the other images for the floor."""
        return ConvergenceStack(fields=protocol, seed=seed)


PROBE = ConvergenceProbe(name=NAME, fields=ConvergenceFields, scores="quantities", needs_train=False, quantities=QUANTITIES, metrics=NAMES)
