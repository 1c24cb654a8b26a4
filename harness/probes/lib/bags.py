"""Bags of patches as rows: the mean of a bag's first n patches, and probes on these means in place of images.

The patches of a bag are encoded once, and every n is read from that pass. Every draw of bags has its own heads.

BagSSL: Chen et al., TMLR 2023 (arXiv 2206.08954). The plain mean of patch features, without normalisation, is that of EMP-SSL (Tong et al., arXiv
2304.03977), whose released evaluation is the nearest executable description.

Shape legend: N rows, I images, D features, n patches of a bag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch

from harness.core import Fields, FittedStack, Predictions, RowProbe, Rows
from harness.data.item_key import ItemKey
from harness.errors import ProbeError
from harness.probes.fields import Count, Share
from harness.probes.lib.features import checked_features, needed

Normalize = Literal["none", "each", "after"]
BagSize = Annotated[int, pydantic.Field(ge=0)]
Side = Annotated[int | float, pydantic.Field(gt=0, le=224)]

ACCURACIES = ("accuracy", "mean_class_accuracy", "accuracy_sd")
"""Metrics of predictions of several draws."""
CHUNK_VALUES = 2**22
"""Patch features per step of averaging: 32 MiB in float64."""


class BagFields(Fields):
    """How a bag of patches is made."""

    patches: Count = 16
    """Encoded patches per draw of an image; any bag size up to this is read from them."""
    patch_area: Share = 0.25
    """A patch's share of the frame's area, as in EMP-SSL; `patch_side` overrides it."""
    patch_side: Side | None = None
    """A patch's side in pixels of a frame of 224."""
    frame: Share = 224 / 256
    """Side of the frame from which patches are cut, as a share of the image's shorter side. The paper does not state its value."""
    patch_seed: Annotated[int, pydantic.Field(ge=0)] = 0
    draws: Count = 3
    """Number of draws of bags per image. A grid is drawn once."""
    placement: Literal["random", "grid"] = "random"
    bag_size: BagSize = 1
    """The number of a draw's first patches that make up a bag; 0 is the whole image, as in other tasks, in place of a bag."""
    normalize: Normalize = "none"
    """Unit length: never, of each patch before the mean, or of the mean."""

    @pydantic.field_validator("placement")
    @classmethod
    def _grids_are_square(cls, placement: str, info: pydantic.ValidationInfo) -> str:
        patches, draws = info.data.get("patches", 1), info.data.get("draws", 1)
        if placement == "grid" and (round(patches**0.5) ** 2 != patches or draws > 1):
            raise ValueError(f"a grid has a square number of patches and one draw, not patches {patches} and draws {draws}")
        return placement

    @pydantic.field_validator("bag_size")
    @classmethod
    def _no_more_than_there_are(cls, size: int, info: pydantic.ValidationInfo) -> int:
        if size > info.data.get("patches", size):
            raise ValueError(f"a bag has at most the {info.data['patches']} patches that are encoded (protocol field patches), got {size}")
        return size


class BagProbeFields(BagFields):
    """For the probes on bags that have training rows."""

    gallery: Literal["bag", "whole"] = "bag"
    """The training rows: bags like those of the test split, or whole images, which shows the effect of averaging patches at evaluation alone."""


# --- means ------------------------------------------------------------------------------------------------------------


def bags(probe: str, rows: Rows, size: int, normalize: Normalize) -> dict[int | None, Rows]:
    """Draw → one row per image, `<key>#<draw>`: the mean of the first `size` patches, float32 [I, D], summed in float64.

    Rows of whole images are bags of one patch, without a draw (None), under their own keys, for any size. `normalize` is that of BagFields.
    Raises ProbeError where rows of both kinds are mixed, or an image has fewer patches than `size`.
    """
    checked_features(probe, rows)
    keys = [ItemKey.parse(key) for key in rows.keys]
    patches = [(key.sample, key.number, key.patch) for key in keys if key.patch is not None]
    if not patches:
        return {None: _mean_of(rows, rows.keys, np.arange(len(rows))[:, None], normalize)}
    if len(patches) < len(rows) or size < 1:
        raise ProbeError(f"{probe} probe: expected patches of bags, at least one of each, got bag size {size} or other rows; give the bank of a bag")
    number = {sample: number for number, sample in enumerate(dict.fromkeys(sample for sample, _, _ in patches))}
    names = list(number)
    samples, draws, indices = np.array([(number[sample], draw, index) for sample, draw, index in patches], dtype=np.int64).T
    by_draw: dict[int | None, Rows] = {}
    for draw in np.unique(draws).tolist():
        chosen = np.flatnonzero((draws == draw) & (indices < size))
        chosen = chosen[np.lexsort((indices[chosen], samples[chosen]))]
        if len(chosen) % size or np.any(indices[chosen].reshape(-1, size) != np.arange(size)):
            raise ProbeError(f"{probe} probe: expected {size} patches of every image, got fewer in draw {draw}; encode more of them (field patches)")
        table = chosen.reshape(-1, size)
        by_draw[draw] = _mean_of(rows, [str(ItemKey(names[samples[first]], draw)) for first in table[:, 0]], table, normalize)
    return by_draw


def _mean_of(rows: Rows, keys: Sequence[str], table: np.ndarray, normalize: Normalize) -> Rows:
    """`table` int64 [I, n] lists the rows of each bag."""
    width = rows.features.shape[1]
    means = np.empty((len(table), width), dtype=np.float32)
    step = max(1, CHUNK_VALUES // (table.shape[1] * width))
    for start in range(0, len(table), step):
        patches = rows.features[table[start : start + step]].astype(np.float64)
        mean = (unit_length(patches) if normalize == "each" else patches).mean(axis=1)
        means[start : start + step] = unit_length(mean) if normalize == "after" else mean
    first = table[:, 0]
    return Rows(keys=keys, groups=[rows.groups[i] for i in first], targets=rows.targets[first], features=means)


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """float64 [..., D] at unit length; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: np.ndarray = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return scaled


# --- probes on means --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class BagStack:
    """A fitted stack for every draw, or one stack for all draws that is fitted to whole images."""

    probe: str
    stacks: Mapping[int | None, FittedStack]
    fields: BagFields

    def predict(self, rows: Rows, head: int) -> Predictions:
        """One prediction per image and draw, draw by draw. Raises ProbeError where `rows` do not fit."""
        predicted = [
            self._of(draw).predict(means, head) for draw, means in bags(self.probe, rows, self.fields.bag_size, self.fields.normalize).items()
        ]
        return Predictions(
            keys=[key for predictions in predicted for key in predictions.keys],
            groups=[group for predictions in predicted for group in predictions.groups],
            targets=np.concatenate([predictions.targets for predictions in predicted]),
            predictions=np.concatenate([predictions.predictions for predictions in predicted]),
            scores=np.concatenate([predictions.scores for predictions in predicted]),
        )

    def _of(self, draw: int | None) -> FittedStack:
        stack = self.stacks.get(draw, self.stacks.get(None))
        if stack is None:
            raise ProbeError(f"{self.probe} probe: expected draws {', '.join(map(str, self.stacks))}, got {draw}; train and test on the same draws")
        return stack

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """The tensors of every draw as `<draw>/<name>`, or `whole/<name>` where whole images were trained on."""
        return {
            f"{'whole' if draw is None else draw}/{name}": tensor for draw, stack in self.stacks.items() for name, tensor in stack.state(head).items()
        }


@dataclass(frozen=True, kw_only=True)
class BagProbe(RowProbe[BagFields]):
    """Another probe on the means of bags, with the same search and one stack of heads per draw.

    Its fields are those of bags and those of the other probe.
    """

    inner: RowProbe[Any]

    def fit(self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: BagFields, seed: int, device: torch.device) -> BagStack:
        """One head per learning rate and draw. Raises ProbeError on invalid rows or rates."""
        how: dict[str, Any] = {"classes": classes, "protocol": protocol, "seed": seed, "device": device}
        train_bags = bags(self.name, needed(self.name, train), protocol.bag_size, protocol.normalize)
        return BagStack(probe=self.name, stacks={draw: self.inner.fit(rows, lrs, **how) for draw, rows in train_bags.items()}, fields=protocol)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: BagFields, seed: int, device: torch.device
    ) -> BagStack:
        """The stacks of the head that `state` was taken from; where it is empty, they are restored from the training rows."""
        how: dict[str, Any] = {"classes": classes, "protocol": protocol, "seed": seed, "device": device}
        if not state:
            train_bags = bags(self.name, needed(self.name, train), protocol.bag_size, protocol.normalize)
            return BagStack(probe=self.name, stacks={draw: self.inner.restore({}, rows, **how) for draw, rows in train_bags.items()}, fields=protocol)
        parts: dict[int | None, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            draw, _, tensor_name = name.partition("/")
            parts.setdefault(None if draw == "whole" else int(draw), {})[tensor_name] = tensor
        return BagStack(probe=self.name, stacks={draw: self.inner.restore(part, None, **how) for draw, part in parts.items()}, fields=protocol)
