"""Whether a patch's nearest neighbour among all other patches shows the same part, the same image, the same class.

BagSSL (Chen et al., TMLR 2023, arXiv 2206.08954) shows such neighbours as pictures, in embedding and in projection space; here they are counted.

Shape legend: N patches, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.core import Predictions, Quantity, RowProbe, Rows
from harness.data.item_key import sample_of
from harness.probes.fields import Count, no_learning_rate
from harness.probes.lib.measured import measured, quotient
from harness.probes.retrieval import Exclude, GalleryFields, neighbours

NAME = "locality"
QUANTITIES = tuple(
    Quantity(name=f"same_{trait}{suffix}", unit="fraction", undefined=f"{reason}, or there is no other patch", is_outcome=not suffix)
    for trait, reason in (
        ("part", "these patches have no parts"),
        ("image", "a query's own image is not in its gallery"),
        ("class", "these patches have no class"),
    )
    for suffix in ("", "_chance")
)
NAMES = tuple(quantity.name for quantity in QUANTITIES)


class LocalityFields(GalleryFields):
    exclude: Exclude = "query"
    """What a query's gallery leaves out: the patch itself, or every patch of its image; with `none`, every patch is its own neighbour."""
    max_queries: Count | None = None
    """Maximum number of queries, chosen by the seed among more patches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalityStack:
    """Nothing is fitted."""

    fields: LocalityFields
    seed: int
    device: torch.device

    def predict(self, rows: Rows, head: int) -> Predictions:
        """One row per (patch, quantity), see QUANTITIES: 1 where the neighbour is of the same kind, 0 where it is not, and the chance level.

        Where `rows` have a reference (their whole images), their targets are parts and the reference's targets are classes; otherwise their targets
        are classes. Raises ProbeError where `rows` do not fit.
        """
        queries = self._queries(len(rows))
        index, _ = neighbours(rows, queries=queries, top=1, exclude=self.fields.exclude, device=self.device)
        targets, (_, images) = np.asarray(rows.targets, np.int64), np.unique(np.asarray(rows.groups), return_inverse=True)
        values: dict[str, np.ndarray] = {}
        for name, kind in (
            ("part", targets if rows.reference is not None else np.full_like(targets, -1)),
            ("image", images if self.fields.exclude != "image" else np.full_like(targets, -1)),
            ("class", targets if rows.reference is None else labels(rows, rows.reference)),
        ):
            defined = (kind[queries] >= 0) & (index[:, 0] >= 0)
            values[f"same_{name}"] = np.where(defined, (kind[queries] == kind[index[:, 0]]).astype(np.float64), np.nan)
            values[f"same_{name}_chance"] = np.where(defined, self._chance(kind, images)[queries], np.nan)
        return measured(QUANTITIES, [rows.keys[i] for i in queries], [rows.groups[i] for i in queries], values)

    def _chance(self, kind: np.ndarray, images: np.ndarray) -> np.ndarray:
        """float64 [N]: the share of each patch's gallery that is of the patch's kind."""
        same, gallery = _counted(kind), np.full(len(kind), len(kind))
        if self.fields.exclude == "query":
            same, gallery = same - 1, gallery - 1
        elif self.fields.exclude == "image":
            _, pairs = np.unique(np.stack([kind, images]), axis=1, return_inverse=True)
            same, gallery = same - _counted(pairs.reshape(-1)), gallery - _counted(images)
        return quotient(same, gallery)

    def _queries(self, count: int) -> np.ndarray:
        """int64 [Q], ascending."""
        if self.fields.max_queries is None or count <= self.fields.max_queries:
            return np.arange(count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).numpy()
        return np.sort(order[: self.fields.max_queries])

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """Empty: nothing is fitted."""
        return {}


def labels(rows: Rows, whole: Rows) -> np.ndarray:
    """int64 [N]: the target of each patch's whole image, whose key is that of the patch's sample; -1 where `whole` lacks it."""
    label_of = dict(zip(whole.keys, whole.targets.tolist(), strict=True))
    return np.array([label_of.get(sample_of(key), -1) for key in rows.keys], dtype=np.int64)


def _counted(kind: np.ndarray) -> np.ndarray:
    """int64 [N]: for each item, the number of items of its kind."""
    _, inverse, counts = np.unique(kind, return_inverse=True, return_counts=True)
    group_sizes: np.ndarray = counts[inverse]
    return group_sizes


class LocalityProbe(RowProbe[LocalityFields]):
    """Every patch against all patches of its split. Nothing is trained, so `lrs` is [None]."""

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: LocalityFields, seed: int, device: torch.device
    ) -> LocalityStack:
        """A stack of one head. Raises ProbeError on learning rates."""
        no_learning_rate(NAME, lrs)
        return self.restore({}, train, classes=classes, protocol=protocol, seed=seed, device=device)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: LocalityFields, seed: int, device: torch.device
    ) -> LocalityStack:
        """The same; the seed chooses the queries where `max_queries` limits them."""
        return LocalityStack(fields=protocol, seed=seed, device=device)


PROBE = LocalityProbe(
    name=NAME,
    fields=LocalityFields,
    needs_train=False,
    neighbours="shared",
    quantities=QUANTITIES,
    scores="quantities",
    metrics=NAMES,
)
