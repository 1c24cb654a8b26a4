"""Retrieval: every row queries all rows by cosine, and rows of its own class are relevant.

The average precision of a query is scikit-learn's average_precision_score: items of equal similarity enter together, so a relevant item adds the
precision at its own similarity. Zhu et al., TMLR 2023 (arXiv 2301.11915); their release leaves each query in its own gallery (`exclude: none`).

Shape legend: N rows, Q queries, P relevant rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from harness.core import Fields, Predictions, RowProbe, Rows
from harness.errors import ProbeError, nearest
from harness.probes.fields import Count, PoolFields, no_learning_rate
from harness.probes.lib.features import as_tensor, checked_features, on_device
from harness.probes.lib.similarity import cosines, gallery_chunks, inverse_norms, nearest_rows, unit_length

NAME = "retrieval"
Exclude = Literal["none", "query", "image"]
CELLS = {"cpu": 2**24, "cuda": 2**27}
"""Similarities held at once: 64 MiB on a CPU. A function of the device type alone, so that rounding is too."""


class GalleryFields(Fields):
    """Of a probe whose items look for their neighbours among each other."""

    exclude: Exclude = "image"
    """What a query's gallery lacks: nothing, the query, or every row of the query's image (its group)."""


class RetrievalFields(GalleryFields, PoolFields):
    max_queries: Count | None = None
    """Most queries; a seeded choice among the rows that have a target where there are more."""


class Excluded:
    """Which gallery rows a query must not see."""

    def __init__(self, rows: Rows, exclude: Exclude) -> None:
        self._exclude = exclude
        _, self._group = np.unique(np.asarray(rows.groups), return_inverse=True)
        self._by_group = np.argsort(self._group, kind="stable")
        self._start = np.searchsorted(self._group[self._by_group], np.arange(self._group.max() + 2))

    def hide(self, similarity: torch.Tensor, queries: np.ndarray) -> None:
        """Sets what queries [Q] must not see to -inf in similarity [Q, N], in place."""
        if self._exclude == "none":
            return
        columns = [self._columns(int(query)) for query in queries]
        lines = np.repeat(np.arange(len(queries)), [len(hidden) for hidden in columns])
        where = torch.from_numpy(np.concatenate(columns)).to(similarity.device)
        similarity[torch.from_numpy(lines).to(similarity.device), where] = -torch.inf

    def _columns(self, query: int) -> np.ndarray:
        if self._exclude == "query":
            return np.array([query])
        group = self._group[query]
        return self._by_group[self._start[group] : self._start[group + 1]]


class Gallery:
    """All rows as queries and gallery, in bounded memory."""

    def __init__(self, rows: Rows, exclude: Exclude, device: torch.device) -> None:
        self._features = on_device(checked_features(NAME, rows), device)
        self._inverse = inverse_norms(self._features)
        self._excluded = Excluded(rows, exclude)
        self._device = device

    def similarities(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """A few of the queries [Q] at a time, and their float32 [Q, N] cosines with all rows, -inf where excluded, in one table used again."""
        size = max(1, CELLS[self._device.type] // len(self._features))
        table = torch.empty(min(size, len(queries)), len(self._features), device=self._device)
        for first in range(0, len(queries), size):
            chunk = queries[first : first + size]
            vectors = self._features[torch.from_numpy(chunk).to(self._features.device)].to(self._device)
            similarity = table[: len(chunk)]
            unit = unit_length(vectors)
            for columns in gallery_chunks(self._features):
                cosines(unit, self._features, self._inverse, columns, similarity[:, columns])
            self._excluded.hide(similarity, chunk)
            yield chunk, similarity


def highest(similarity: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """float32 [Q] highest similarities of [Q, N] and int64 [Q] their columns, the first of equals."""
    if similarity.device.type != "cpu":
        best, columns = similarity.max(dim=1).values.cpu().numpy(), similarity.argmax(dim=1).cpu().numpy()
        return best, columns
    columns = similarity.numpy().argmax(axis=1)  # vectorised, as torch's is not
    return similarity.numpy()[np.arange(len(columns)), columns], columns


def ascending(table: torch.Tensor) -> torch.Tensor:
    """Each row sorted; in place on a CPU, where NumPy's vectorised sort is several times faster than torch's."""
    if table.device.type != "cpu":
        return table.sort(dim=1).values
    table.numpy().sort(axis=1)
    return table


def at_least(similarity: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """int64 [Q, P]: of the similarities [Q, N] with all rows, how many are at least `relevant` [Q, P], ascending. Sorts `similarity` in place.

    On a CPU one query after the other, so that what was sorted is searched while it is in a cache.
    """
    if similarity.device.type != "cpu":
        return similarity.shape[1] - torch.searchsorted(ascending(similarity), relevant)
    below = [torch.searchsorted(ascending(line[None])[0], places) for line, places in zip(similarity, relevant, strict=True)]
    return similarity.shape[1] - torch.stack(below)


def average_precisions(similarity: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """float64 [Q] average precisions; NaN where nothing is relevant.

    `similarity` float [Q, N] with all rows, `relevant` float [Q, P] those of the relevant rows, both in any order and sorted in place; -inf marks an
    excluded row.
    """
    places = ascending(relevant)
    size = places.shape[1]
    first = torch.arange(size, device=places.device).expand_as(places)
    ties = places[:, 1:] == places[:, :-1]
    if ties.any():  # the first of equals, for all of them
        first = first.clone()
        first[:, 1:][ties] = 0
        first = first.cummax(dim=1).values
    hits = size - first
    retrieved = at_least(similarity, places)
    counted = places > -torch.inf
    return torch.where(counted, hits.double() / retrieved, 0.0).sum(dim=1) / counted.sum(dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalStack:
    """How rows query each other; nothing is fitted."""

    fields: RetrievalFields
    seed: int
    device: torch.device

    def predict(self, rows: Rows, head: int) -> Predictions:
        """Per query its class, its nearest neighbour's class (-1 without any) and its average precision (NaN without a relevant row).

        Raises ProbeError where `rows` do not fit. With `exclude: none` the nearest neighbour is, but for equals, the query itself.
        """
        gallery, targets = Gallery(rows, self.fields.exclude, self.device), np.asarray(rows.targets, dtype=np.int64)
        queries = self._queries(targets)
        scores, nearest_class = np.full(len(rows), np.nan), np.full(len(rows), -1, dtype=np.int64)
        # queries of one class share their relevant rows, so they come one after the other
        for chunk, similarity in gallery.similarities(queries[np.argsort(targets[queries], kind="stable")]):
            best, where = highest(similarity)
            nearest_class[chunk] = np.where(best > -np.inf, targets[where], -1)
            for target in np.unique(targets[chunk]):
                lines = np.flatnonzero(targets[chunk] == target)
                relevant = as_tensor(np.flatnonzero((targets == target) & (target >= 0))).to(self.device)
                scores[chunk[lines]] = self._scores(similarity[lines[0] : lines[-1] + 1], relevant)
        return Predictions(
            keys=[rows.keys[i] for i in queries],
            groups=[rows.groups[i] for i in queries],
            targets=targets[queries],
            predictions=nearest_class[queries],
            scores=scores[queries],
        )

    def _scores(self, similarity: torch.Tensor, relevant: torch.Tensor) -> np.ndarray:
        """float64 [Q], a few queries at a time, since what comes between is several times the relevant similarities. Sorts `similarity` in place."""
        if not len(relevant):
            return np.full(len(similarity), np.nan)
        step = max(1, CELLS[self.device.type] // 8 // max(1, len(relevant)))
        parts = []
        for start in range(0, len(similarity), step):
            lines = similarity[start : start + step]
            parts.append(average_precisions(lines, lines.index_select(1, relevant)).cpu().numpy())
        return np.concatenate(parts)

    def _queries(self, targets: np.ndarray) -> np.ndarray:
        """int64 [Q] rows that query, ascending."""
        labelled = np.flatnonzero(targets >= 0)
        if self.fields.max_queries is None or len(labelled) <= self.fields.max_queries:
            return np.arange(len(targets))
        order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(self.seed)).numpy()
        return np.sort(labelled[order[: self.fields.max_queries]])

    def state(self, head: int) -> dict[str, torch.Tensor]:
        """Empty: nothing is fitted."""
        return {}


def neighbours(
    rows: Rows, *, queries: Sequence[int] | np.ndarray, top: int = 10, exclude: Exclude = "image", device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of some rows, for galleries to look at: int64 [Q, top] indices and float32 [Q, top] cosines, nearest first, ties by row.

    -1 and NaN where fewer rows are left than `top`. Raises ProbeError where rows, queries or `exclude` cannot be.
    """
    if exclude not in get_args(Exclude):
        raise ProbeError(
            f"neighbours: expected exclude to be one of {', '.join(get_args(Exclude))}, got {exclude!r}{nearest(exclude, get_args(Exclude))}"
        )
    query_rows = np.asarray(queries, dtype=np.int64)
    if top < 1 or query_rows.ndim != 1 or np.any((query_rows < 0) | (query_rows >= len(rows))):
        raise ProbeError(
            f"neighbours: expected top of at least 1 and queries from 0 to {len(rows) - 1}, got {top} and {list(queries)}; name rows of the bank"
        )
    indices, cosines = np.full((len(query_rows), top), -1, dtype=np.int64), np.full((len(query_rows), top), np.nan, dtype=np.float32)
    done = 0
    for chunk, similarity in Gallery(rows, exclude, device or torch.device("cpu")).similarities(query_rows):
        values, columns = (tensor.cpu().numpy() for tensor in nearest_rows(similarity, top))
        is_neighbour, width = values > -np.inf, values.shape[1]
        indices[done : done + len(chunk), :width] = np.where(is_neighbour, columns, -1)
        cosines[done : done + len(chunk), :width] = np.where(is_neighbour, values, np.nan)
        done += len(chunk)
    return indices, cosines


class RetrievalProbe(RowProbe[RetrievalFields]):
    """Every row against all rows of its split. Nothing is trained, so `lrs` is [None] and no training rows are needed."""

    def fit(
        self, train: Rows | None, lrs: Sequence[float | None], *, classes: int, protocol: RetrievalFields, seed: int, device: torch.device
    ) -> RetrievalStack:
        """A stack of one head. Raises ProbeError on protocol fields that cannot be, or on learning rates."""
        no_learning_rate(NAME, lrs)
        return self.restore({}, train, classes=classes, protocol=protocol, seed=seed, device=device)

    def restore(
        self, state: Mapping[str, torch.Tensor], train: Rows | None, *, classes: int, protocol: RetrievalFields, seed: int, device: torch.device
    ) -> RetrievalStack:
        """The same; the seed chooses the queries where `max_queries` limits them."""
        return RetrievalStack(fields=protocol, seed=seed, device=device)


PROBE = RetrievalProbe(
    name=NAME, fields=RetrievalFields, scores="average precisions", needs_train=False, neighbours="relevant", metrics=("AP", "mAP")
)
