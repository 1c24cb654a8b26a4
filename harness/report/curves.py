"""Rows that are points of a curve: how they differ from other rows, and which of them form one curve.

A task that runs at several points has one row per point, with a protocol named `<protocol>[<field>=<value>,…]`. Such rows are not ranked
and have no column: they are read as curves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.axes import KEPT, Value, axis_of, order
from harness.report.board import Row, encoders_of, is_ranked, parsed, reason, status
from harness.report.points import base_protocol, is_point, point_fields
from harness.report.units import is_defined

Place = tuple[Value, ...]
"""Values of some fields, in the order of a list of fields kept elsewhere."""
FLOORS = ("_floor", "_chance")
"""Endings of metrics that are the floor of the metric named before them."""
SPREAD = "_sd"
"""Ending of metrics that are the spread of the metric named before them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvePoint:
    """A row and where it lies on its curve."""

    row: Row
    place: Mapping[str, Value]

    @property
    def is_drawn(self) -> bool:
        return is_defined(self.row["value"])


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A metric with those that belong to it."""

    metric: str
    floor: str | None = None
    """The metric's floor: its value by chance, or without the property that is measured."""
    spread: str | None = None
    """The metric's standard deviation over draws."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(metric for metric in (self.metric, self.floor, self.spread) if metric)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """All points of one task under one protocol, of every encoder."""

    task: str
    """With its data set."""
    protocol: str
    """Without the point."""
    level: str
    dataset: str
    encoders: tuple[str, ...]
    x: str
    """The field that varies along the curve."""
    others: tuple[str, ...]
    """Other fields that vary."""
    fixed: Mapping[str, Value]
    """Fields of the point that have one value only."""
    places: tuple[Place, ...]
    """Values of the other fields, each combination once; `((),)` where there are none."""
    panels: tuple[Panel, ...]
    points: tuple[CurvePoint, ...]

    @property
    def title(self) -> str:
        return f"{self.task} · {self.protocol}"

    def along(self, encoder: str, metric: str, place: Place = ()) -> list[CurvePoint]:
        """The points of one line, ok or not, by ascending x; those that stand apart come last."""
        points = [
            point
            for point in self.points
            if point.row["encoder"] == encoder and point.row["metric"] == metric and tuple(point.place[name] for name in self.others) == place
        ]
        return sorted(points, key=lambda point: order(self.x, point.place[self.x]))

    def values(self) -> list[Value]:
        """Every x, ascending; those that stand apart come last."""
        return sorted({point.place[self.x] for point in self.points}, key=lambda value: order(self.x, value))

    def main_points(self) -> list[CurvePoint]:
        """The points of the first metric, and of rows that failed before they had one."""
        return [point for point in self.points if point.row["metric"] in (None, self.panels[0].metric if self.panels else None)]


def curves(results: Sequence[Row]) -> list[Curve]:
    """Every curve of a run, in the order of its results.

    A row under the bare protocol of a curve is its point where nothing is set, and also stays an ordinary row elsewhere.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for row in results:
        if is_point(row["protocol"]):
            fields = names.setdefault((row["task"], base_protocol(row["protocol"])), [])
            fields += [name for name in point_fields(row["protocol"]) if name not in fields]
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in results:
        key = (row["task"], base_protocol(row["protocol"]))
        if key in names:
            grouped.setdefault(key, []).append(row)
    return [_curve(rows, names[key]) for key, rows in grouped.items()]


def _curve(rows: Sequence[Row], fields: Sequence[str]) -> Curve:
    points = tuple(CurvePoint(row=row, place=_place(row, fields)) for row in rows)
    counts = {name: len({point.place[name] for point in points}) for name in fields}
    x = max(fields, key=lambda name: (any(_is_number(point.place[name]) for point in points), counts[name]))
    others = tuple(name for name in fields if name != x and counts[name] > 1)
    first = rows[0]
    return Curve(
        task=first["task"],
        protocol=base_protocol(first["protocol"]),
        level=first["level"],
        dataset=first["dataset"],
        encoders=encoders_of(rows),
        x=x,
        others=others,
        fixed={name: points[0].place[name] for name in fields if name != x and counts[name] == 1},
        places=tuple(dict.fromkeys(tuple(point.place[name] for name in others) for point in points)),
        panels=_panels(list(dict.fromkeys(row["metric"] for row in rows if row["metric"]))),
        points=points,
    )


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(row: Row, fields: Sequence[str]) -> dict[str, Value]:
    """Values of the point's fields, from the protocol's fields, or else from the protocol's name."""
    recorded, named = parsed(row["protocol_fields"]), point_fields(row["protocol"])
    return {name: _plain(recorded[name]) if name in recorded else _from_text(named.get(name)) for name in fields}


def _plain(value: Any) -> Value:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _from_text(text: str | None) -> Value:
    if text is None:
        return None
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text


def _panels(metrics: Sequence[str]) -> tuple[Panel, ...]:
    """A panel for each metric that is neither floor nor spread of another one."""

    def belonging(metric: str, endings: Iterable[str]) -> str | None:
        return next((f"{metric}{ending}" for ending in endings if f"{metric}{ending}" in metrics), None)

    attached = {belonging(metric, (ending,)) for metric in metrics for ending in (*FLOORS, SPREAD)}
    return tuple(
        Panel(metric=metric, floor=belonging(metric, FLOORS), spread=belonging(metric, (SPREAD,))) for metric in metrics if metric not in attached
    )


# --- what is not ok, and a line for each curve ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NotOk:
    """Points of one encoder and curve that have one status for one reason."""

    encoder: str
    curve: str
    status: str
    reason: str
    points: int
    of: int

    @property
    def share(self) -> str:
        return "every point" if self.points == self.of else f"{self.points} of {self.of} points"

    @property
    def where(self) -> str:
        return f"{self.curve} ({self.share})"


def not_ok(run_curves: Sequence[Curve]) -> list[NotOk]:
    """The points of the curves' first metrics that are not ok, one entry per encoder, curve, status and reason."""
    lines = []
    for curve in run_curves:
        for encoder in curve.encoders:
            rows = [point.row for point in curve.main_points()]
            # other rows are reported in their own columns
            encoder_rows = [row for row in rows if row["encoder"] == encoder and is_point(row["protocol"])]
            counts = Counter((status(row), reason(row)) for row in encoder_rows if not is_ranked(row))
            lines += [
                NotOk(encoder=encoder, curve=curve.title, status=state, reason=why, points=count, of=len(encoder_rows))
                for (state, why), count in counts.items()
            ]
    return lines


def ends(curve: Curve, encoder: str) -> list[CurvePoint]:
    """The first and the last point of an encoder's curve that have a value, then those that stand apart; empty where there is none.

    They belong to the first metric and to the first value of the other fields.
    """
    apart = axis_of(curve.x).apart
    for panel in curve.panels[:1]:
        for place in curve.places:
            drawn = [point for point in curve.along(encoder, panel.metric, place) if point.is_drawn]
            along = [point for point in drawn if point.place[curve.x] not in apart]
            if drawn:
                return list(dict.fromkeys([*along[:1], *along[-1:], *(point for point in drawn if point not in along)]))
    return []


def speeds(curve: Curve, encoder: str, place: Place = ()) -> list[tuple[Value, float]]:
    """(x, images per second at x over images per second with everything kept), ascending; empty where the latter was not measured.

    For curves along the share of kept tokens: how much time dropping them saves.
    """
    if curve.x != KEPT or not curve.panels:
        return []
    per_share = {
        point.place[KEPT]: point.row["images_per_second"]
        for point in curve.along(encoder, curve.panels[0].metric, place)
        if is_defined(point.row["images_per_second"])
    }
    intact = per_share.get(1)
    return [(value, speed / intact) for value, speed in per_share.items()] if intact and len(per_share) > 1 else []
