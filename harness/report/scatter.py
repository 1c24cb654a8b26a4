"""Object against part scores: a panel for every object task and its corresponding part task, with both intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.board import Board, Column, Row, status, titles
from harness.report.drawing import INK, MUTED, Drawing, canvas, png
from harness.report.palette import Palette, Style, mix
from harness.report.units import FRACTION, axis_label, is_defined, plain, scale, unit

NAME = "object_part"
_LABELLED = 8  # more encoders than these have no room for names beside their points
_LONGEST = 22  # nor have longer names
_ACROSS = 3

Named = Mapping[Column, tuple[str, str]]


def pairs(board: Board) -> list[tuple[Column, Column]]:
    """(object, part) columns that belong together: of one kind (both retrieval, say), if possible of one data set and one protocol name.

    Each pair of tasks comes once, under the protocol that comes first. Where no two are of one kind, the first of each level are paired.
    """
    objects = [column for column in board.columns if column.level == "object"]
    parts = [column for column in board.columns if column.level == "part"]
    paired: dict[tuple[str, str], tuple[Column, Column]] = {}
    for part in parts:
        akin = [column for column in objects if column.family == part.family]
        if akin:
            best = max(akin, key=lambda column: (column.dataset == part.dataset, column.protocol == part.protocol, -objects.index(column)))
            paired.setdefault((best.task, part.task), (best, part))
    if not paired and objects and parts:
        return [(objects[0], parts[0])]
    return list(paired.values())


def object_part(board: Board, palette: Palette) -> Drawing:
    """One panel per pair; an encoder is a point with both 95 % intervals, and a dotted line leads to it from its random twin."""
    column_pairs = pairs(board)
    if not column_pairs:
        missing = " and ".join(level for level in ("object", "part") if all(column.level != level for column in board.columns))
        return Drawing(name=NAME, absent=f"it takes an object task and a part task, and this run has no {missing} task")
    across = min(_ACROSS, len(column_pairs))
    down = -(-len(column_pairs) // across)
    width = {1: 5.6, 2: 9.4}.get(across, 12.6)
    in_a_row = min(len(board.encoders), 2 if across == 1 else 4)
    legend_height = 0.12 + 0.2 * -(-len(board.encoders) // in_a_row)
    height = 4.1 * down + legend_height
    named = titles(board.columns)
    notes: list[str] = []
    drawn = 0
    with canvas(width, height) as figure:
        grid = figure.add_gridspec(
            down,
            across,
            left=0.75 / width,
            right=1 - 0.2 / width,
            bottom=(0.65 + legend_height) / height,
            top=1 - 0.4 / height,
            wspace=0.28,
            hspace=0.36,
        )
        for i, pair in enumerate(column_pairs):
            axes = figure.add_subplot(grid[i // across, i % across])
            points = _points(board, pair, named, notes)
            drawn += len(points)
            _panel(axes, pair, points, palette, named)
            if len(board.encoders) <= _LABELLED:
                _label(figure, axes, points, palette)
        if not drawn:
            return Drawing(name=NAME, absent="no encoder has a value for both an object task and its part task", notes=tuple(notes))
        _legend(figure, board.encoders, palette.styles, in_a_row)
        data = png(figure)
    panels = "; ".join(f"{named[o][0]} against {named[p][0]}" for o, p in column_pairs)
    return Drawing(name=NAME, png=data, alt=f"Scatter of object against part scores with 95 % intervals: {plain(panels)}", notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class ScatterPoint:
    """An encoder's two values and their intervals, (value, low, high), as drawn."""

    encoder: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    incomplete: bool


def _points(board: Board, pair: tuple[Column, Column], named: Named, notes: list[str]) -> list[ScatterPoint]:
    points = []
    for encoder in board.encoders:
        cells = [board.cells.get((encoder, column)) for column in pair]
        rows = [row for row in cells if row is not None and is_defined(row["value"])]
        if len(rows) == len(pair):
            x, y = (_scaled(row, column) for row, column in zip(rows, pair, strict=True))
            points.append(ScatterPoint(encoder=encoder, x=x, y=y, incomplete=any(status(row) == "incomplete" for row in rows)))
        for column, row in zip(pair, cells, strict=True):
            if row is None or not is_defined(row["value"]):
                notes.append(f"{encoder} is absent: {named[column][0]} {status(row) if row else 'was not run'}")
    return points


def _scaled(row: Row, column: Column) -> tuple[float, float, float]:
    """Value, low and high as drawn; without an interval all three are the value."""
    factor, value = scale(column.metric), row["value"]
    low, high = (bound if is_defined(bound) else value for bound in (row["ci_low"], row["ci_high"]))
    return value * factor, low * factor, high * factor


def _panel(axes: Any, pair: tuple[Column, Column], points: Sequence[ScatterPoint], palette: Palette, named: Named) -> None:
    places = {point.encoder: point for point in points}
    for random, trained in palette.twins.items():
        if random in places and trained in places:
            ends = [places[random], places[trained]]
            colour = palette.styles[trained].colour
            axes.plot([end.x[0] for end in ends], [end.y[0] for end in ends], linestyle=":", linewidth=1.2, color=colour, alpha=0.55, zorder=1)
    for point in points:
        style = palette.styles[point.encoder]
        bars = {"color": style.colour, "linewidth": 1.3, "alpha": 0.8, "linestyle": style.line, "zorder": 2}
        axes.plot(point.x[1:], [point.y[0]] * 2, **bars)
        axes.plot([point.x[0]] * 2, point.y[1:], **bars)
        fill = {"color": style.colour, "markerfacecolor": style.face, "markeredgewidth": 1.6, "markersize": 8}
        axes.plot(point.x[0], point.y[0], marker=style.marker, zorder=4, **fill)
        if point.incomplete:
            axes.plot(point.x[0], point.y[0], marker="x", markersize=13, color=INK, markeredgewidth=1.2, zorder=5)
    if not points:
        axes.text(0.5, 0.5, "no encoder has both values", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set(xticks=[], yticks=[])
    axes.margins(0.12)
    for column, limits, limit in zip(pair, (axes.get_xlim(), axes.get_ylim()), (axes.set_xlim, axes.set_ylim), strict=True):
        if unit(column.metric) == FRACTION:
            limit(max(limits[0], -2), min(limits[1], 102))
    for column, label in zip(pair, (axes.set_xlabel, axes.set_ylabel), strict=True):
        label(plain(axis_label(" · ".join(word for word in named[column] if word), column.metric), 60))
    kinds = {column.family for column in pair}
    axes.set_title(plain(kinds.pop() if len(kinds) == 1 else "object and part", 40))


_SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_REACHES = (9.0, 16.0, 26.0)  # points of type


def _label(figure: Any, axes: Any, points: Sequence[ScatterPoint], palette: Palette) -> None:
    """Names beside the points, each where it covers least of the other names, points and bars; the dotted lines identify random twins."""
    from matplotlib.patheffects import withStroke

    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    frame = _box(axes.get_window_extent(renderer))
    taken = [box for point in points for box in _ink(axes, point, pixels)]
    for point in points:
        if palette.twins.get(point.encoder) or len(point.encoder) > _LONGEST:
            continue
        anchor = axes.transData.transform((point.x[0], point.y[0]))
        halo = [withStroke(linewidth=2.5, foreground="white", alpha=0.85)]
        style = {"color": mix(palette.styles[point.encoder].colour, INK, 0.35), "fontsize": 8, "zorder": 6, "path_effects": halo}
        text = axes.annotate(plain(point.encoder), (point.x[0], point.y[0]), xytext=(0, 0), textcoords="offset points", **style)
        size = text.get_window_extent(renderer)
        spots = [(reach, side, _beside(anchor, side, reach * pixels, size.width, size.height)) for reach in _REACHES for side in _SIDES]
        reach, side, box = min(spots, key=lambda spot: sum(_overlap(spot[2], other) for other in taken) + 20 * _outside(spot[2], frame) + spot[0])
        text.xyann = (side[0] * reach * 0.8, side[1] * reach * 0.8)
        text.set(ha={1: "left", -1: "right", 0: "center"}[side[0]], va={1: "bottom", -1: "top", 0: "center"}[side[1]])
        taken.append(box)


Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""


def _ink(axes: Any, point: ScatterPoint, pixels: float) -> list[Box]:
    """What a point and its bars cover."""
    (x, y), (x0, y0), (x1, y1) = axes.transData.transform([(point.x[i], point.y[i]) for i in range(3)])
    thin, wide = 1.5 * pixels, 7 * pixels
    return [(x0, y - thin, x1, y + thin), (x - thin, y0, x + thin, y1), (x - wide, y - wide, x + wide, y + wide)]


def _beside(anchor: Sequence[float], side: tuple[int, int], reach: float, width: float, height: float) -> Box:
    """Where a text of that size lies when it is set off to a side of its anchor."""
    x, y = (anchor[i] + side[i] * reach * 0.8 for i in range(2))
    left, bottom = x + (side[0] - 1) / 2 * width, y + (side[1] - 1) / 2 * height
    return (left, bottom, left + width, bottom + height)


def _box(extent: Any) -> Box:
    return (extent.x0, extent.y0, extent.x1, extent.y1)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)


def _legend(figure: Any, encoders: Sequence[str], styles: Mapping[str, Style], in_a_row: int) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for encoder in encoders:
        style = styles[encoder]
        handles.append(Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.line, markerfacecolor=style.face, markeredgewidth=1.5))
    legend = figure.legend(handles, [str(i) for i in range(len(handles))], loc="lower center", ncols=in_a_row, frameon=False, fontsize=8)
    for text, encoder in zip(legend.get_texts(), encoders, strict=True):
        text.set_text(plain(encoder, 40))  # not as a label: matplotlib leaves out labels that begin with an underscore
