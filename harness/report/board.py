"""Results as a board: encoders down, tasks across, and only what may be ranked together in one column.

Two rows may be ranked together where they share task, metric, protocol with all its fields, data set version, split and device. An encoder that loses
too much in a run's precision is computed in float32 and ranked with the others: that is how it is meant to be run. Rows that are not `ok` stand on
the board with their reason and are never ranked. Points of a curve are not columns: harness.report.curves reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from harness.probes import quantities
from harness.report.points import is_point
from harness.report.units import FRACTION, is_defined, sense_of, unit

Row = Mapping[str, Any]
LEVELS = ("object", "part")


@dataclass(frozen=True, kw_only=True)
class Column:
    """Everything that rows of one ranking share."""

    level: str
    task: str
    """With its data set."""
    metric: str | None
    protocol: str | None
    protocol_fields: str
    """JSON, its keys sorted."""
    dataset: str
    dataset_version: str | None
    split: str | None
    device: str | None

    @property
    def family(self) -> str:
        """What the task asks for, without data set and level: `stamps/part-linear` → `linear`."""
        return self.task.rpartition("/")[2].removeprefix(f"{self.level}-")

    def fits(self, other: Column) -> bool:
        """Whether `other` agrees with this column in everything that it states: a failed row may know neither metric nor device."""
        return all(getattr(other, f.name) in (None, "{}", getattr(self, f.name)) for f in fields(self))


@dataclass(frozen=True, kw_only=True, eq=False)
class Board:
    """One cell for each encoder and column that has a row."""

    encoders: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[str, Column], Row]

    def ranked(self, column: Column) -> list[Row]:
        """The column's rows that can be ranked, the best first; none where neither end is better, as without a fraction or a score."""
        if unit(column.metric) != FRACTION or column.metric in quantities():
            return []
        rows = [row for encoder in self.encoders if is_ranked(row := self.cells.get((encoder, column)))]
        better = sense_of(column.metric)
        return sorted((row for row in rows if row is not None), key=lambda row: -better * row["value"])

    def best(self, column: Column) -> frozenset[str]:
        """The encoders with the column's best value; none where fewer than two can be ranked."""
        rows = self.ranked(column)
        return frozenset(row["encoder"] for row in rows if row["value"] == rows[0]["value"]) if len(rows) > 1 else frozenset()

    def not_ok(self) -> list[tuple[Column, Row]]:
        """Rows that are incomplete, failed or undefined, column by column."""
        return [
            (column, row)
            for column in self.columns
            for encoder in self.encoders
            if (row := self.cells.get((encoder, column))) is not None and status(row) != "ok"
        ]

    def notes(self) -> list[tuple[Column, str, str]]:
        """Column, encoders and text of the notes on values that are ok; a note on several encoders comes once."""
        encoders_of_note: dict[tuple[Column, str], list[str]] = {}
        for column in self.columns:
            for encoder in self.encoders:
                if text := note(self.cells.get((encoder, column))):
                    encoders_of_note.setdefault((column, text), []).append(encoder)
        everyone = list(self.encoders) if len(self.encoders) > 1 else None
        return [
            (column, "all encoders" if encoders == everyone else ", ".join(encoders), text) for (column, text), encoders in encoders_of_note.items()
        ]


def note(row: Row | None) -> str:
    """The note on a value that is ok; empty where there is none, or the row is not ok."""
    return str(row["error"] or "") if row is not None and status(row) == "ok" else ""


def status(row: Row) -> str:
    """The row's status; `undefined` where it claims to be ok and has no value."""
    return "undefined" if row["status"] == "ok" and not is_defined(row["value"]) else str(row["status"])


def is_ranked(row: Row | None) -> bool:
    return row is not None and status(row) == "ok"


def reason(row: Row) -> str:
    """Why a row is not ok."""
    return str(row["error"] or "no reason was recorded")


def canonical(document: str | None) -> str:
    """A JSON document with its keys sorted, so that equal ones are equal texts."""
    return json.dumps(parsed(document), sort_keys=True)


def parsed(document: str | None) -> dict[str, Any]:
    """The JSON object of a column; empty where there is none."""
    content = json.loads(document) if document else {}
    return content if isinstance(content, dict) else {"value": content}


def column_of(row: Row) -> Column:
    same = ("level", "task", "metric", "protocol", "dataset", "dataset_version", "split", "device")
    return Column(**{name: row[name] for name in same}, protocol_fields=canonical(row["protocol_fields"]))


def encoders_of(results: Iterable[Row]) -> tuple[str, ...]:
    """Every encoder once, in the order of the results."""
    return tuple(dict.fromkeys(row["encoder"] for row in results))


def main_rows(results: Sequence[Row]) -> list[Row]:
    """The rows of each task's first metric, and those that failed before they had one."""
    first: dict[str, str] = {}
    for row in results:
        if row["metric"]:
            first.setdefault(row["task"], row["metric"])
    return [row for row in results if not row["metric"] or row["metric"] == first[row["task"]]]


def make_board(results: Sequence[Row]) -> Board:
    """The board of each task's main metric: object tasks first, then part tasks, each in the order of the results. Points of curves are left out."""
    rows = main_rows([row for row in results if not is_point(row["protocol"])])
    columns: list[Column] = []
    cells: dict[tuple[str, Column], Row] = {}
    for row in sorted(rows, key=lambda row: not is_defined(row["value"])):  # rows with a value know their columns
        column = column_of(row)
        if column not in columns:
            fitting = next((candidate for candidate in columns if not is_defined(row["value"]) and candidate.fits(column)), None)
            if fitting is None:
                columns.append(column)
            column = fitting or column
        cells[row["encoder"], column] = row
    order = list(dict.fromkeys((row["task"], row["protocol"]) for row in rows))
    level = {name: place for place, name in enumerate(LEVELS)}
    columns.sort(key=lambda column: (level.get(column.level, len(LEVELS)), order.index((column.task, column.protocol))))
    return Board(encoders=encoders_of(results), columns=tuple(columns), cells=cells)


def titles(columns: Sequence[Column]) -> dict[Column, tuple[str, str]]:
    """For each column the task's name, with its data set where there are several, and what distinguishes it from the task's other columns."""
    several_sets = len({column.dataset for column in columns}) > 1
    named = {}
    for column in columns:
        name = column.task if several_sets else column.task.rpartition("/")[2]
        others = [other for other in columns if other.task == column.task and other != column]
        named[column] = (name, " · ".join(_told_apart(column, others)))
    return named


def _told_apart(column: Column, others: Sequence[Column]) -> list[str]:
    words = []
    if any(other.protocol != column.protocol for other in others):
        words.append(str(column.protocol))
    akin = [other for other in others if other.protocol == column.protocol]
    protocol_fields = parsed(column.protocol_fields)
    for name, value in protocol_fields.items():
        if any(parsed(other.protocol_fields).get(name) != value for other in akin):
            words.append(f"{name}={value}")
    for attribute in ("metric", "dataset_version", "split", "device"):
        if any(getattr(other, attribute) != getattr(column, attribute) for other in akin):
            words.append(str(getattr(column, attribute)))
    return words
