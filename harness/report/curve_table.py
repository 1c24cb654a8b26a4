"""The points of a curve as a table, and each encoder's line in words; everything formatted, nothing escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.files import file_name
from harness.report.axes import Value, axis_of, field_text, order
from harness.report.board import Row, is_ranked, parsed, reason, status
from harness.report.curves import Curve, ends
from harness.report.palette import Palette
from harness.report.sections import Name, name
from harness.report.units import NONE, interval, is_defined, label, number


@dataclass(frozen=True, kw_only=True)
class Line:
    """One point of one encoder."""

    name: Name
    places: Sequence[str]
    cells: Sequence[tuple[str, str]]
    """Value and interval, metric by metric."""
    words: Sequence[str]
    """Items, readout, learning rate, images per second."""
    status: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class CurveSection:
    """One curve on the page."""

    title: str
    figure: Mapping[str, Any]
    caption: str
    fields: Sequence[str]
    metrics: Sequence[str]
    lines: Sequence[Line]


def curve_section(curve: Curve, palette: Palette, figure: Mapping[str, Any], caption: str) -> CurveSection:
    fields = (*curve.others, curve.x)
    metrics = [metric for panel in curve.panels for metric in panel.metrics]
    return CurveSection(
        title=curve.title,
        figure=figure,
        caption=caption,
        fields=[axis_of(field).label for field in fields],
        metrics=[label(metric) for metric in metrics],
        lines=list(_lines(curve, palette, fields, metrics)),
    )


def _lines(curve: Curve, palette: Palette, fields: Sequence[str], metrics: Sequence[str]) -> Iterator[Line]:
    by_place: dict[tuple[str, tuple[Value, ...]], dict[str | None, Row]] = {}
    for point in curve.points:
        by_place.setdefault((point.row["encoder"], tuple(point.place[field] for field in fields)), {})[point.row["metric"]] = point.row
    place_of = {encoder: i for i, encoder in enumerate(curve.encoders)}
    for encoder, place in sorted(
        by_place, key=lambda key: (place_of[key[0]], [order(field, value) for field, value in zip(fields, key[1], strict=True)])
    ):
        rows = by_place[encoder, place]
        main = next((rows[metric] for metric in metrics if metric in rows), next(iter(rows.values())))
        yield Line(
            name=name(encoder, palette),
            places=[axis_of(field).text(value) for field, value in zip(fields, place, strict=True)],
            cells=[_cell(rows.get(metric), metric) for metric in metrics],
            words=_words(main),
            status=status(main),
            reason="" if is_ranked(main) else reason(main),
        )


def _cell(row: Row | None, metric: str) -> tuple[str, str]:
    return (number(row["value"], metric), interval(row["ci_low"], row["ci_high"], metric)) if row is not None else ("", "")


def _words(row: Row) -> list[str]:
    rate, speed = parsed(row["hyperparameters"]).get("lr"), row["images_per_second"]
    return [
        f"{row['n']:,}" if row["n"] is not None else NONE,
        row["readout"] or NONE,
        f"{rate:.3g}" if rate is not None else NONE,
        f"{speed:.0f}" if is_defined(speed) else NONE,
    ]


@dataclass(frozen=True, kw_only=True)
class InWords:
    """An encoder's curve by its ends."""

    encoder: str
    curve: str
    text: str


def in_words(run_curves: Sequence[Curve]) -> list[InWords]:
    """A line for each encoder and curve that has a value."""
    lines = []
    for curve in run_curves:
        for encoder in curve.encoders:
            shown = ends(curve, encoder)
            if shown:
                others = ", ".join(field_text(field, shown[0].place[field]) for field in curve.others)
                opening = f"{curve.panels[0].metric}{f' at {others}' if others else ''}, {axis_of(curve.x).label}: "
                parts = [f"{axis_of(curve.x).text(point.place[curve.x])} → {_value(point.row)}" for point in shown]
                lines.append(InWords(encoder=encoder, curve=curve.title, text=opening + "; ".join(parts)))
    return lines


def _value(row: Row) -> str:
    mark = "*" if status(row) == "incomplete" else ""
    return f"{number(row['value'], row['metric'])}{mark} {interval(row['ci_low'], row['ci_high'], row['metric'])}".rstrip()


def figure_names(run_curves: Sequence[Curve]) -> list[str]:
    """A file name for each curve, no two alike."""
    names: list[str] = []
    for curve in run_curves:
        stem = file_name(f"curve_{curve.task.replace('/', '-')}_{curve.protocol}")
        names.append(next(name for name in (stem, *(f"{stem}-{i}" for i in range(2, len(run_curves) + 2))) if name not in names))
    return names
