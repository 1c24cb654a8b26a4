"""The low-shot probe: logistic regression on a seeded, stratified share of a split's images, or on k images per class.

The regularisation is chosen on the whole selection split. The subset is drawn by the sweep's seed; it is not the published list of any paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import numpy as np
import pydantic
import torch

from harness.core import RowProbe, Rows
from harness.errors import ProbeError
from harness.features.rows import take
from harness.probes.fields import Count
from harness.probes.lib.features import needed
from harness.probes.lib.softmax import SoftmaxStack
from harness.probes.logistic import PROBE as LOGISTIC
from harness.probes.logistic import LogisticFields

NAME = "lowshot"


def low_shot(rows: Rows, *, share: float | None = None, shots: int | None = None, seed: int = 0) -> Rows:
    """The rows of a share (a fraction, at least one image per class) or a number of each class's images (groups), in their order.

    Images are drawn per class, with the rows of that class: an image that shows several parts may be drawn for one part and not for another. A class
    with too few images gives all. The subset is a function of the seed and of the images' names, not of their order; a smaller subset is part of a
    larger one of the same seed. Raises ProbeError unless exactly one of `share`, in (0, 1], and `shots`, at least 1, is given.
    """
    if (share is None) == (shots is None) or (share is not None and not 0 < share <= 1) or (shots is not None and shots < 1):
        raise ProbeError(f"low shot: expected either a share in (0, 1] or at least 1 shot, got share {share} and shots {shots}; give one of them")
    generator = np.random.default_rng(seed)
    images: dict[int, set[str]] = {}
    for group, target in zip(rows.groups, rows.targets.tolist(), strict=True):
        images.setdefault(target, set()).add(group)
    chosen: set[tuple[int, str]] = set()
    for target in sorted(images):
        names = sorted(images[target])
        count = shots if shots is not None else max(1, round((share or 0) * len(names)))
        chosen |= {(target, names[i]) for i in generator.permutation(len(names))[:count]}
    index = [i for i, (group, target) in enumerate(zip(rows.groups, rows.targets.tolist(), strict=True)) if (target, group) in chosen]
    return take(rows, np.array(index, np.int64))


class LowShotFields(LogisticFields):
    """The fields of logistic regression, and the subset that it is fitted to: exactly one of `share` and `shots` is set."""

    share: Annotated[float, pydantic.Field(gt=0, le=1)] | None = 0.01
    """Share of each class's training images, at least one image."""
    shots: Count | None = None
    """Training images per class."""

    @pydantic.model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.share is None) == (self.shots is None):
            raise ValueError(f"expected either share or shots, got share {self.share} and shots {self.shots}")
        return self


class LowShotProbe(RowProbe[LowShotFields]):
    """Regularised softmax regression on few rows. As for logistic regression, the `lrs` are the values of C in `grid`."""

    def grid(self, fields: LowShotFields) -> tuple[float | None, ...]:
        """The protocol's values of C."""
        return fields.c_grid

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: LowShotFields, seed: int, device: torch.device
    ) -> SoftmaxStack:
        """One head per value of C, all fitted to the rows that `seed` draws. Raises ProbeError on invalid rows or values."""
        few = low_shot(needed(NAME, train), share=protocol.share, shots=protocol.shots, seed=seed)
        return LOGISTIC.fit(few, lrs, classes=classes, protocol=protocol, seed=seed, device=device)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: LowShotFields, seed: int, device: torch.device
    ) -> SoftmaxStack:
        """The stack of one head that `state` was taken from. Raises ProbeError where the state has another number of classes."""
        return LOGISTIC.restore(state, train, classes=classes, protocol=protocol, seed=seed, device=device)


PROBE = LowShotProbe(name=NAME, fields=LowShotFields)
