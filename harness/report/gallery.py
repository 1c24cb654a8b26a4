"""The galleries of nearest items: their images, cut from the shards again by the view of their task, and which queries are shown.

There is one kind for retrieval, which looks for items of the query's class, and one for locality, which shows whether a patch's neighbours are of the
same part, of the same image, of an image of the same class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from harness.core import NeighbourKind, Task, View
from harness.data.item_key import sample_of
from harness.data.manifest import load_manifest, shard_url
from harness.data.shards import ShardAudit, attempt, read_samples
from harness.errors import HarnessError, ShardError
from harness.probes import probes
from harness.report.board import Board, Column, parsed
from harness.report.run import Run
from harness.tasks import select

_ROWS = 16
"""Approximate number of lines of a figure, each of one encoder and one query."""
_QUERIES = 6
DEPTH = 10


Tables = Mapping[str, Sequence[Mapping[str, Any]]]
"""Encoder → its rows of neighbours."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """An item as its view makes it, and facts about its image."""

    image: np.ndarray
    """uint8 [H, W, 3], of any size."""
    target: int | None
    group: str
    label: int | None
    """The label of the whole image."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One of a query's nearest items."""

    key: str
    relevant: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """A few queries of one task with every encoder's nearest items, or why there are none."""

    column: Column
    kind: NeighbourKind = "relevant"
    asks: str = "class"
    """What the query and a right neighbour have in common."""
    encoders: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    neighbours: Mapping[tuple[str, str], tuple[Neighbour, ...]] = field(default_factory=dict)
    """(encoder, query) → the nearest items, the nearest first; an encoder may lack a query."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Item key → the name of its class."""
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    """By item key."""
    absent: str | None = None
    notes: tuple[str, ...] = ()

    def shares(self, query: str, neighbour: str) -> str:
        """What else a query and its neighbour have in common: `image`, `class` (of their images), or empty where nothing is known."""
        first, second = self.cuts.get(query), self.cuts.get(neighbour)
        if first is None or second is None:
            return ""
        if first.group == second.group:
            return "image"
        return "class" if first.label is not None and first.label == second.label else ""


def galleries(run: Run, board: Board, shards: str | None) -> list[Gallery]:
    """First one retrieval gallery for each part-level task (without any, for each object-level task), under the protocol that comes first.

    Then one for each task and protocol of locality.
    """
    columns = [column for column in board.columns if any(run.neighbours(encoder, column.task, column.protocol) for encoder in board.encoders)]
    kinds = {column: _kind(board, column) for column in columns}
    retrieval: dict[str, Column] = {}
    for level in ("part", "object"):
        for column in columns:
            if column.level == level and kinds[column] == "relevant":
                retrieval.setdefault(column.task, column)
        if retrieval:
            break
    local = [column for column in columns if kinds[column] == "shared"]
    return [_gallery(run, board, column, shards, kinds[column]) for column in (*retrieval.values(), *local)]


def _kind(board: Board, column: Column) -> NeighbourKind:
    rows = [row for encoder in board.encoders if (row := board.cells.get((encoder, column))) is not None]
    shared = {name for name, spec in probes().items() if spec.neighbours == "shared"}
    return "shared" if any(row["probe"] in shared for row in rows) else "relevant"


def thumbnails(shards: str, dataset: str, split: str, view: View, keys: Collection[str]) -> dict[str, Cut]:
    """The items `keys` that `view` makes of a split's samples; those that are not there, or do not decode, are left out.

    Shards are read in order until all keys were found; only samples that can hold one are decoded. Raises ManifestError or ShardError where
    the data set or a shard cannot be read.
    """
    manifest = load_manifest(shards, dataset)
    samples = {sample_of(key) for key in keys}
    cuts: dict[str, Cut] = {}
    for shard in (shard for name in split.split("+") for shard in manifest.split(name).shards):
        audit = ShardAudit(shard=shard.file, expected=shard.samples)
        for key, decode in read_samples(shard_url(shards, dataset, shard), shard, manifest.rules, audit):
            if key not in samples:
                continue
            sample = attempt(decode)
            items = sample if isinstance(sample, ShardError) else attempt(partial(view, sample))
            if isinstance(sample, ShardError) or isinstance(items, ShardError):
                continue
            cuts |= {item.key: Cut(image=item.image, target=item.target, group=item.group, label=sample.label) for item in items if item.key in keys}
            if len(cuts) == len(keys):
                return cuts
    return cuts


def _gallery(run: Run, board: Board, column: Column, shards: str | None, kind: NeighbourKind) -> Gallery:
    tables = {}
    for encoder in board.encoders:
        if (encoder, column) in board.cells and (rows := run.neighbours(encoder, column.task, column.protocol)):
            tables[encoder] = rows
    if shards is None:
        return Gallery(column=column, kind=kind, absent="sweep.yaml does not say where the shards are")
    try:
        task = _task(column, shards)
        queries, neighbours, cuts, targets = _shown(run, column, shards, task, tables)
    except HarnessError as error:
        return Gallery(column=column, kind=kind, absent=f"its images could not be read again: {error}")
    if not any(query in cuts for query in queries):
        return Gallery(column=column, kind=kind, absent=f"{shards} no longer holds the items that were queried")
    keys = _keys(queries, neighbours)
    lost = len(keys - cuts.keys())
    return Gallery(
        column=column,
        kind=kind,
        asks="part" if kind == "shared" and task.reference_view is not None else "class",
        encoders=tuple(tables),
        queries=queries,
        neighbours={place: nearest for place, nearest in neighbours.items() if nearest},
        classes={key: _class(task, targets[key]) for key in keys if key in targets},
        cuts={key: cut for key, cut in cuts.items() if key in keys},
        notes=(f"{lost} of {len(keys)} items could not be cut again and are grey",) if lost else (),
    )


Nearest = dict[tuple[str, str], tuple[Neighbour, ...]]


def _shown(
    run: Run, column: Column, shards: str, task: Task, tables: Tables
) -> tuple[tuple[str, ...], Nearest, Mapping[str, Cut], Mapping[str, int]]:
    """Queries, their neighbours, the items cut again, and items' targets: those of the predictions, or else those of the cut items."""
    candidates, split = _common_queries(tables), column.split or "test"
    count = max(1, min(_QUERIES, _ROWS // max(1, len(tables))))
    if task.probe.neighbours == "relevant":
        targets = _targets(run, tables, column)
        queries = spread(candidates, targets, count)
        nearest = _all_nearest(tables, queries)
        return queries, nearest, thumbnails(shards, column.dataset, split, task.view, _keys(queries, nearest)), targets
    cuts = thumbnails(shards, column.dataset, split, task.view, _keys(candidates, _all_nearest(tables, candidates)))
    targets = {key: cut.target for key, cut in cuts.items() if cut.target is not None}
    queries = spread(candidates, targets, count)
    return queries, _all_nearest(tables, queries), cuts, targets


def _all_nearest(tables: Tables, queries: Sequence[str]) -> Nearest:
    return {(encoder, query): _nearest(rows, query) for encoder, rows in tables.items() for query in queries}


def _keys(queries: Sequence[str], nearest: Nearest) -> set[str]:
    """The queries shown and all their neighbours."""
    return {*queries, *(neighbour.key for neighbours in nearest.values() for neighbour in neighbours)}


def _task(column: Column, shards: str) -> Task:
    """The task as it ran. Raises RequestError where this version, or the data set in its present state, has no such task."""
    tasks, _ = select([f"{column.task}@{column.protocol}"], shards, parsed(column.protocol_fields))
    return tasks[0]


def _targets(run: Run, encoders: Collection[str], column: Column) -> dict[str, int]:
    """Item key → class, from the predictions."""
    targets: dict[str, int] = {}
    for encoder in encoders:
        table = run.predictions(encoder, column.task, column.protocol)
        if table is not None:
            targets |= dict(zip(table.keys, table.targets.tolist(), strict=True))
    return targets


def _common_queries(tables: Tables) -> list[str]:
    """Queries that all encoders answered, or, where there are none, those of the first encoder."""
    queries = [dict.fromkeys(row["query"] for row in rows) for rows in tables.values()]
    common = [query for query in queries[0] if all(query in others for others in queries[1:])]
    return common or list(queries[0])


def spread(queries: Sequence[str], targets: Mapping[str, int], count: int) -> tuple[str, ...]:
    """`count` queries, one of each class in turn and evenly spaced within a class: nobody picks them."""
    by_class: dict[int, list[str]] = {}
    for query in queries:
        by_class.setdefault(targets.get(query, -1), []).append(query)
    turns = -(-count // len(by_class))
    chosen = []
    for turn in range(turns):
        for _, members in sorted(by_class.items()):
            place = (2 * turn + 1) * len(members) // (2 * turns)
            if members[place] not in chosen:
                chosen.append(members[place])
    return tuple(chosen[:count])


def _nearest(rows: Sequence[Mapping[str, Any]], query: str) -> tuple[Neighbour, ...]:
    ranked = sorted((row for row in rows if row["query"] == query), key=lambda row: row["rank"])
    return tuple(Neighbour(key=row["neighbour"], relevant=row["relevant"]) for row in ranked[:DEPTH])


def _class(task: Task, target: int) -> str:
    return task.classes[target] if 0 <= target < len(task.classes) else ""
