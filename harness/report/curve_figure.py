"""A curve as a figure: a panel for every metric and every combination of the other varying fields, a line for every encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.axes import Positions, axis_of, field_text, positions
from harness.report.board import status
from harness.report.curves import Curve, CurvePoint, Panel, Place, not_ok, speeds
from harness.report.drawing import INK, MUTED, Drawing, canvas, png
from harness.report.palette import Palette, Style
from harness.report.units import FRACTION, is_defined, known_chance, label, plain, scale, unit

_ACROSS = 3
_BANDS = 4
"""Maximum number of encoders with bands; those of more would hide each other, so these get bars."""
_WIDTH, _HEIGHT = 3.5, 2.6
_FLOOR = (0, (2.5, 2))
_SPEED = "times the images a second of all tokens"


@dataclass(frozen=True, kw_only=True)
class PanelCell:
    """One panel of the figure."""

    panel: Panel | None
    """None for the speed."""
    place: Place


def curve_figure(curve: Curve, palette: Palette, name: str) -> Drawing:
    """The curve's figure; absent where no point has a value."""
    if not any(point.is_drawn for point in curve.points):
        return Drawing(name=name, absent="no point of it has a value")
    places = positions(curve.x, curve.values())
    rows = list(_rows(curve))
    across, down = max(len(row) for row in rows), len(rows)
    in_a_row = max(1, min(len(curve.encoders) + 1, int(across * _WIDTH / 2.1)))
    legend = 0.1 + 0.21 * -(-(len(curve.encoders) + 1) // in_a_row)
    width, height = 0.75 + _WIDTH * across, legend + 0.6 + (_HEIGHT + 0.55) * down
    with canvas(width, height) as figure:
        grid = figure.add_gridspec(
            down, across, left=0.72 / width, right=1 - 0.15 / width, bottom=(legend + 0.62) / height, top=1 - 0.38 / height, wspace=0.26, hspace=0.42
        )
        for i, row in enumerate(rows):
            shared = None
            for j, cell in enumerate(row):
                axes = figure.add_subplot(grid[i, j], sharey=shared if len(curve.places) > 1 else None)
                shared = shared or axes
                _draw(axes, curve, cell, places, palette)
        _legend(figure, curve, palette, in_a_row)
        data = png(figure)
    alt = f"{curve.title}: {', '.join(panel.metric for panel in curve.panels)} against {axis_of(curve.x).label} for {len(curve.encoders)} encoders"
    notes = [f"{line.encoder}, {line.share}: {line.status}, {line.reason}" for line in not_ok([curve])]
    return Drawing(name=name, png=data, alt=plain(alt), notes=tuple(notes))


def caption(curve: Curve, *, random: bool) -> str:
    """What the figure shows, and what its signs mean."""
    fixed = ", ".join(field_text(name, value) for name, value in curve.fixed.items() if value is not None)
    drawn = {point.row["metric"] for point in curve.points if point.is_drawn}
    words = [f"{'Bands' if len(curve.encoders) <= _BANDS else 'Bars'} are 95 % intervals over images"]
    if _has_floor(curve):
        words.append("dashed lines without markers, and dashes, are floors or what chance gives")
    if any(panel.spread in drawn for panel in curve.panels):
        words.append("whiskers with caps reach one standard deviation over draws to either side")
    places = positions(curve.x, curve.values())
    if places.apart and not places.axis.connects_apart:
        words.append("what stands apart on the right is also a dotted line across")
    if any(status(point.row) == "incomplete" for point in curve.points):
        words.append("a large × marks an incomplete record")
    if random:
        words.append("open markers are encoders with random weights")
    if any(speeds(curve, encoder, place) for encoder in curve.encoders for place in curve.places):
        words.append("speed is that of the encoder's passes over the altered images, of each actor, as timed while they ran")
    return f"{'; '.join(words)}.{f' Fixed: {fixed}.' if fixed else ''}"


def _rows(curve: Curve) -> Iterator[list[PanelCell]]:
    """Metrics side by side; where another field varies too, a row per metric and a panel per value of that field."""
    panels: list[Panel | None] = [panel for panel in curve.panels if _has_value(curve, panel)]
    if any(speeds(curve, encoder, place) for encoder in curve.encoders for place in curve.places):
        panels.append(None)
    if len(curve.places) == 1:
        across = 2 if len(panels) == 4 else _ACROSS
        for start in range(0, len(panels), across):
            yield [PanelCell(panel=panel, place=curve.places[0]) for panel in panels[start : start + across]]
        return
    for panel in panels:
        for start in range(0, len(curve.places), _ACROSS):
            yield [PanelCell(panel=panel, place=place) for place in curve.places[start : start + _ACROSS]]


def _has_floor(curve: Curve) -> bool:
    drawn = {point.row["metric"] for point in curve.points if point.is_drawn}
    return any(panel.floor in drawn or (panel.metric in drawn and known_chance(panel.metric) is not None) for panel in curve.panels)


def _has_value(curve: Curve, panel: Panel) -> bool:
    return any(point.is_drawn and point.row["metric"] in panel.metrics for point in curve.points)


def _draw(axes: Any, curve: Curve, cell: PanelCell, places: Positions, palette: Palette) -> None:
    drawn = False
    for encoder in curve.encoders:
        style = palette.styles[encoder]
        if cell.panel is None:
            drawn |= _speed(axes, curve, encoder, cell.place, places, style)
        else:
            drawn |= _line(axes, curve, encoder, cell, places, style)
    places.dress(axes)
    if not drawn:
        axes.text(0.5, 0.5, "no point has a value", transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
        axes.set_yticks([])
    quantity = _SPEED if cell.panel is None else label(cell.panel.metric)
    where = ", ".join(field_text(name, value) for name, value in zip(curve.others, cell.place, strict=True))
    axes.set_title(plain(where or quantity, 46), fontsize=8.5)
    axes.set_ylabel(plain(quantity, 40) if where else "")
    chance = 1.0 if cell.panel is None else known_chance(cell.panel.metric)
    if chance is not None:
        axes.axhline(chance if cell.panel is None else chance * scale(cell.panel.metric), color=MUTED, linewidth=1.0, linestyle=_FLOOR, zorder=1)
    if cell.panel is not None and drawn and unit(cell.panel.metric) == FRACTION and _is_share(curve, cell.panel):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -3), min(high, 103))
        axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0) <= tick <= min(high, 100)])


def _is_share(curve: Curve, panel: Panel) -> bool:
    """Whether nothing that is drawn lies outside of 0 to 1."""
    return all(0 <= point.row["value"] <= 1 for point in curve.points if point.is_drawn and point.row["metric"] in panel.metrics)


def _line(axes: Any, curve: Curve, encoder: str, cell: PanelCell, places: Positions, style: Style) -> bool:
    """Draw an encoder's line of one metric with its intervals, floor and spread; whether there was anything to draw."""
    assert cell.panel is not None
    factor = scale(cell.panel.metric)
    points = [point for point in curve.along(encoder, cell.panel.metric, cell.place) if point.is_drawn]
    x = _x(curve, places)
    along = [point for point in points if places.is_on_line(point.place[curve.x])]
    apart = [point for point in points if point not in along]
    marks = {"color": style.colour, "markerfacecolor": style.face, "markeredgewidth": 1.2, "marker": style.marker, "markersize": 4.5}
    if along:
        axes.plot(
            [x(point) for point in along], [factor * point.row["value"] for point in along], linestyle=style.line, linewidth=1.5, zorder=3, **marks
        )
    for point in apart:
        axes.plot(x(point), factor * point.row["value"], linestyle="", zorder=3, **marks)
        axes.axhline(factor * point.row["value"], color=style.colour, linewidth=0.8, linestyle=":", alpha=0.7, zorder=1)
    _intervals(axes, along, x, factor, style, band=len(curve.encoders) <= _BANDS)
    _intervals(axes, apart, x, factor, style, band=False)
    for point in points:
        if status(point.row) == "incomplete":
            axes.plot(x(point), factor * point.row["value"], marker="x", markersize=10, color=INK, markeredgewidth=1.1, zorder=5)
    if cell.panel.floor:
        floor = [point for point in curve.along(encoder, cell.panel.floor, cell.place) if point.is_drawn]
        dash: dict[str, Any] = {"linestyle": "", "marker": "_", "markersize": 9}
        for on_line in (True, False):
            part = [point for point in floor if places.is_on_line(point.place[curve.x]) == on_line]
            sign = {"linestyle": _FLOOR} if on_line and len(part) > 1 else dash
            axes.plot(
                [x(point) for point in part], [factor * point.row["value"] for point in part], color=style.colour, linewidth=1.0, zorder=2, **sign
            )
    if cell.panel.spread:
        spread = {point.place[curve.x]: point.row["value"] for point in curve.along(encoder, cell.panel.spread, cell.place) if point.is_drawn}
        reach = [(x(point), factor * point.row["value"], factor * spread[point.place[curve.x]]) for point in points if point.place[curve.x] in spread]
        if reach:
            axes.errorbar(
                *zip(*[bar[:2] for bar in reach], strict=True),
                yerr=[bar[2] for bar in reach],
                fmt="none",
                ecolor=style.colour,
                elinewidth=0.9,
                capsize=3,
                zorder=2,
            )
    return bool(points)


def _x(curve: Curve, places: Positions) -> Callable[[CurvePoint], float]:
    return lambda point: places.at[point.place[curve.x]]


def _intervals(axes: Any, points: Sequence[CurvePoint], x: Callable[[CurvePoint], float], factor: float, style: Style, *, band: bool) -> None:
    bounded = [point for point in points if is_defined(point.row["ci_low"]) and is_defined(point.row["ci_high"])]
    if not bounded:
        return
    places, low, high = [x(point) for point in bounded], [factor * p.row["ci_low"] for p in bounded], [factor * p.row["ci_high"] for p in bounded]
    if band and len(bounded) > 1:
        axes.fill_between(places, low, high, color=style.colour, alpha=0.15, linewidth=0, zorder=1)
    else:
        axes.vlines(places, low, high, color=style.colour, linewidth=2.2, alpha=0.35, zorder=2)


def _speed(axes: Any, curve: Curve, encoder: str, place: Place, places: Positions, style: Style) -> bool:
    ratios = speeds(curve, encoder, place)
    if ratios:
        marks = {"color": style.colour, "markerfacecolor": style.face, "markeredgewidth": 1.2, "marker": style.marker, "markersize": 4.5}
        axes.plot([places.at[value] for value, _ in ratios], [ratio for _, ratio in ratios], linestyle=style.line, linewidth=1.5, **marks)
    return bool(ratios)


def _legend(figure: Any, curve: Curve, palette: Palette, in_a_row: int) -> None:
    from matplotlib.lines import Line2D

    handles = []
    encoders = [name for name in curve.encoders if any(point.is_drawn and point.row["encoder"] == name for point in curve.points)]
    for encoder in encoders:
        style = palette.styles[encoder]
        handles.append(Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.line, markerfacecolor=style.face, linewidth=1.5))
    words = [plain(encoder, 34) for encoder in encoders]
    if _has_floor(curve):
        handles.append(Line2D([], [], color=MUTED, linestyle=_FLOOR, linewidth=1.0))
        words.append("floor or chance")
    legend = figure.legend(handles, [str(i) for i in range(len(handles))], loc="lower center", ncols=in_a_row, frameon=False, fontsize=8)
    for text, word in zip(legend.get_texts(), words, strict=True):
        text.set_text(word)  # not as a label: matplotlib leaves out labels that begin with an underscore
