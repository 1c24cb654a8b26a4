"""The patch-retrieval gallery's images, cut from the shards once more by the view of their task, and which queries are shown."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.core import Task, View
from harness.errors import HarnessError
from harness.manifest import load_manifest, shard_url
from harness.report.board import Board, Column, parsed
from harness.report.run import Run
from harness.stream import ShardAudit, read_samples
from harness.tasks import select

_ROWS = 16
"""A picture has about so many lines, an encoder and a query each."""
_QUERIES = 6
DEPTH = 10


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One of a query's nearest items."""

    key: str
    relevant: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """A few queries of one task with every encoder's nearest items, or why there are none."""

    column: Column
    encoders: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    neighbours: Mapping[tuple[str, str], tuple[Neighbour, ...]] = field(default_factory=dict)
    """(encoder, query) to the nearest items, the nearest first; an encoder may lack a query."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Item key to the name of its class."""
    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Item key to uint8 [H, W, 3], of any size."""
    absent: str | None = None
    notes: tuple[str, ...] = ()


def galleries(run: Run, board: Board, shards: str | None) -> list[Gallery]:
    """One for each part-level retrieval task (where there is none, each object-level one), under the protocol that comes first."""
    kept: dict[str, Column] = {}
    for level in ("part", "object"):
        for column in board.columns:
            if column.level == level and any(run.neighbours(encoder, column.task, column.protocol) for encoder in board.encoders):
                kept.setdefault(column.task, column)
        if kept:
            break
    return [_gallery(run, board, column, shards) for column in kept.values()]


def thumbnails(shards: str, dataset: str, split: str, view: View, keys: Collection[str]) -> dict[str, np.ndarray]:
    """uint8 [H, W, 3] of the items `keys` that `view` makes of a split's samples; those that are not there, or do not decode, are left out.

    Shards are read in order until all keys were found; only samples that can hold one are decoded. Raises ManifestError or ShardError where
    the data set or a shard cannot be read.
    """
    manifest = load_manifest(shards, dataset)
    wanted = sorted(keys)
    found: dict[str, np.ndarray] = {}
    for shard in (shard for one in split.split("+") for shard in manifest.split(one).shards):
        audit = ShardAudit(shard=shard.file, expected=shard.samples)
        for key, decode in read_samples(shard_url(shards, dataset, shard), shard, manifest.annotations, audit):
            place = bisect_left(wanted, key)
            if place == len(wanted) or not wanted[place].startswith(key):
                continue  # an item's key begins with its sample's
            try:
                items = view(decode())
            except HarnessError:
                continue
            found |= {item.key: item.image for item in items if item.key in keys}
            if len(found) == len(wanted):
                return found
    return found


def _gallery(run: Run, board: Board, column: Column, shards: str | None) -> Gallery:
    tables = {}
    for encoder in board.encoders:
        if (encoder, column) in board.cells and (rows := run.neighbours(encoder, column.task, column.protocol)):
            tables[encoder] = rows
    if shards is None:
        return Gallery(column=column, absent="sweep.yaml does not say where the shards are")
    targets = _targets(run, tables, column)
    queries = _spread(_common_queries(tables), targets, max(1, min(_QUERIES, _ROWS // max(1, len(tables)))))
    neighbours = {(encoder, query): _nearest(rows, query) for encoder, rows in tables.items() for query in queries}
    keys = {*queries, *(one.key for found in neighbours.values() for one in found)}
    try:
        task = _task(column, shards)
        images = thumbnails(shards, column.dataset, column.split or "test", task.view, keys)
    except HarnessError as error:
        return Gallery(column=column, absent=f"its images could not be read again: {error}")
    if not any(query in images for query in queries):
        return Gallery(column=column, absent=f"{shards} no longer holds the items that were queried")
    lost = len(keys - images.keys())
    return Gallery(
        column=column,
        encoders=tuple(tables),
        queries=queries,
        neighbours={place: found for place, found in neighbours.items() if found},
        classes={key: _class(task, targets[key]) for key in keys if key in targets},
        images=images,
        notes=(f"{lost} of {len(keys)} items could not be cut again and are grey",) if lost else (),
    )


def _task(column: Column, shards: str) -> Task:
    """The task as it ran. Raises RequestError where this version, or the data set as it is now, has no such task."""
    tasks, _ = select([f"{column.task}@{column.protocol}"], shards, parsed(column.protocol_fields))
    return tasks[0]


def _targets(run: Run, encoders: Collection[str], column: Column) -> dict[str, int]:
    """Item key to class, from what was predicted."""
    targets: dict[str, int] = {}
    for encoder in encoders:
        table = run.predictions(encoder, column.task, column.protocol)
        if table is not None:
            targets |= dict(zip(table.keys, table.targets.tolist(), strict=True))
    return targets


def _common_queries(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Queries that all encoders answered, or, where there are none, those of the first encoder."""
    asked = [dict.fromkeys(row["query"] for row in rows) for rows in tables.values()]
    common = [query for query in asked[0] if all(query in others for others in asked[1:])]
    return common or list(asked[0])


def _spread(queries: Sequence[str], targets: Mapping[str, int], count: int) -> tuple[str, ...]:
    """`count` queries, one of each class in turn, and within a class evenly from those there are: nobody picks them."""
    by_class: dict[int, list[str]] = {}
    for query in queries:
        by_class.setdefault(targets.get(query, -1), []).append(query)
    turns = -(-count // len(by_class))
    chosen = []
    for turn in range(turns):
        for _, its in sorted(by_class.items()):
            place = (2 * turn + 1) * len(its) // (2 * turns)
            if its[place] not in chosen:
                chosen.append(its[place])
    return tuple(chosen[:count])


def _nearest(rows: Sequence[Mapping[str, Any]], query: str) -> tuple[Neighbour, ...]:
    found = sorted((row for row in rows if row["query"] == query), key=lambda row: row["rank"])
    return tuple(Neighbour(key=row["neighbour"], relevant=row["relevant"]) for row in found[:DEPTH])


def _class(task: Task, target: int) -> str:
    return task.classes[target] if 0 <= target < len(task.classes) else ""
