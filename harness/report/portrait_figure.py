"""A portrait as one figure that fits a column of a paper: 3.25 inches wide, 300 dots an inch, and as PDF."""

from __future__ import annotations

import textwrap
from typing import Any

from harness.report.drawing import INK, MUTED, RULE, Drawing, canvas, pdf, png
from harness.report.palette import Palette, mix
from harness.report.portrait import Entry, Mark, Portrait
from harness.report.units import plain

WIDTH = 3.25
_DPI = 300
_LABELS, _VALUES = 1.2, 0.42
"""Inches left and right of the axis."""
_LINE, _GAP, _HEAD = 0.145, 0.09, 0.16
_TOP, _BOTTOM = 0.4, 0.46
_SIZE = 6.2
"""Size of the small type in points."""
_REASON = 50
"""Letters in a line of a reason."""
_REASON_LINE = 0.085
_TWIN = "#8A8F98"
"""What a random twin's colour is mixed with."""


def portrait_figure(portrait: Portrait, palette: Palette, name: str) -> Drawing:
    """Dots with 95 % intervals, group by group; hollow dots are the random twin's, ticks mark chance or the floor of each."""
    places, height = _places(portrait)
    with canvas(WIDTH, height, _DPI) as figure:
        axes = figure.add_axes((_LABELS / WIDTH, _BOTTOM / height, (WIDTH - _LABELS - _VALUES) / WIDTH, (height - _TOP - _BOTTOM) / height))
        axes.set(xlim=(0, 1), ylim=(height - _TOP - _BOTTOM, 0))
        _frame(axes, figure, portrait, height)
        for group, top in places[0]:
            axes.text(_left(axes, 0.06), top, group, fontsize=7, fontweight="bold", va="center", ha="left")
            if group == "bags":
                axes.text(_left(axes, WIDTH - 0.05), top, plain(portrait.bags, 40), fontsize=_SIZE, color=MUTED, va="center", ha="right")
            axes.plot([_left(axes, 0.06), _left(axes, WIDTH - 0.06)], [top - 0.085] * 2, color=RULE, linewidth=0.6, clip_on=False, zorder=0)
        for entry, y in places[1]:
            _line(axes, entry, y, palette, portrait)
        _legend(figure, portrait, palette, height)
        data, vector = png(figure), pdf(figure)
    values = "; ".join(f"{entry.group}, {entry.label}: {100 * entry.mark.value:.1f}" for entry in portrait.entries if entry.mark is not None)
    notes = tuple(f"{entry.group}, {entry.label}: {entry.missing}" for entry in portrait.entries if entry.missing)
    alt = plain(f"{portrait.encoder} on {portrait.dataset}. {values}")
    return Drawing(name=name, png=data, pdf=vector, alt=alt, notes=notes, caption=_caption(portrait))


def _caption(portrait: Portrait) -> str:
    words = ["Ticks: for accuracy 1 / number of classes; else what chance gives, or a measured floor"]
    if any(_twins_floor(entry) is not None for entry in portrait.entries):
        words.append("in the twin's colour its own, where that is another")
    beside = dict.fromkeys(f"objects, {entry.label} {entry.readout}" for entry in portrait.entries if entry.readout)
    if portrait.bags:
        words.append(f"bags: {plain(portrait.bags)}")
        words += [f"the readout that was chosen for {', '.join(beside)}"] if beside else []
    return f"{'; '.join(words)}."


def _twins_floor(entry: Entry) -> float | None:
    """The twin's floor, where it differs from the encoder's."""
    return entry.twin.floor if entry.mark is not None and entry.twin is not None and entry.twin.floor != entry.mark.floor else None


def _places(portrait: Portrait) -> tuple[tuple[list[tuple[str, float]], list[tuple[Entry, float]]], float]:
    """Groups and entries with their heights below the top, in inches, and the figure's height."""
    y = 0.02
    heads, lines = [], []
    for group in portrait.groups:
        y += _GAP
        heads.append((group, y))
        y += _HEAD
        for entry in portrait.entries:
            if entry.group == group:
                lines.append((entry, y))
                y += _LINE + _REASON_LINE * max(0, len(reason_lines(entry)) - 1)
    return (heads, lines), y + _TOP + _BOTTOM


def reason_lines(entry: Entry) -> list[str]:
    """Why an entry has no value, line by line."""
    return textwrap.wrap(plain(entry.missing), _REASON, max_lines=5, placeholder=" …") if entry.mark is None else []


def _left(axes: Any, inches: float) -> float:
    """A distance from the figure's left edge as a place on the axis."""
    return (inches - _LABELS) / (WIDTH - _LABELS - _VALUES)


def _frame(axes: Any, figure: Any, portrait: Portrait, height: float) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.tick_params(axis="x", labelsize=_SIZE, length=2, width=0.5, pad=1.5)
    axes.xaxis.grid(True, color=RULE, linewidth=0.5)
    axes.set_xlabel("percent", fontsize=_SIZE, labelpad=1.5, color=MUTED)
    figure.text(0.06 / WIDTH, 1 - 0.06 / height, plain(portrait.encoder, 44), fontsize=8, fontweight="bold", va="top")
    figure.text(0.06 / WIDTH, 1 - 0.22 / height, plain(f"on {portrait.dataset}, with 95 % intervals", 60), fontsize=_SIZE, color=MUTED, va="top")


def _line(axes: Any, entry: Entry, y: float, palette: Palette, portrait: Portrait) -> None:
    label = f"{entry.label}, {entry.readout}" if entry.readout else entry.label
    axes.text(_left(axes, 0.12), y, plain(label, 27), fontsize=_SIZE, va="center", ha="left")
    if entry.mark is None:
        for i, words in enumerate(reason_lines(entry)):
            axes.text(0.01, y + _REASON_LINE * i, words, fontsize=5, style="italic", color=MUTED, va="center", ha="left")
        return
    style = palette.styles[portrait.encoder]
    for floor, colour in ((entry.mark.floor, INK), (_twins_floor(entry), mix(style.colour, _TWIN, 0.6))):
        if floor is not None:
            axes.plot([min(1, max(0, floor))] * 2, [y - 0.052, y + 0.052], color=colour, linewidth=0.8, zorder=2, clip_on=False)
    if entry.twin is not None and portrait.twin is not None:
        _dot(axes, entry.twin, y, colour=mix(style.colour, _TWIN, 0.6), face="#ffffff", size=2.9, order=3)
    _dot(axes, entry.mark, y, colour=style.colour, face=style.face, size=3.4, order=4)
    text = f"{100 * entry.mark.value:.1f}".replace("-", "−")
    axes.text(_left(axes, WIDTH - 0.05), y, f"{text}{'*' if entry.mark.incomplete else ''}", fontsize=_SIZE, va="center", ha="right")


def _dot(axes: Any, mark: Mark, y: float, *, colour: str, face: str, size: float, order: int) -> None:
    """The value, at the axis' end where it lies beyond it, and its interval."""
    if mark.low is not None and mark.high is not None:
        axes.plot([max(0, mark.low), max(0, mark.high)], [y, y], color=colour, linewidth=1.1, solid_capstyle="butt", zorder=order, clip_on=False)
    marker = "<" if mark.value < 0 else "o"
    place = min(1, max(0, mark.value))
    axes.plot(place, y, marker=marker, markersize=size, color=colour, markerfacecolor=face, markeredgewidth=0.8, zorder=order + 0.5, clip_on=False)


def _legend(figure: Any, portrait: Portrait, palette: Palette, height: float) -> None:
    from matplotlib.lines import Line2D

    style = palette.styles[portrait.encoder]
    handles = [Line2D([], [], linestyle="", marker="o", markersize=3.4, color=style.colour, markerfacecolor=style.face, markeredgewidth=0.8)]
    words = ["the encoder"]
    if any(entry.twin is not None for entry in portrait.entries):
        colour = mix(style.colour, _TWIN, 0.6)
        handles.append(Line2D([], [], linestyle="", marker="o", markersize=2.9, color=colour, markerfacecolor="#ffffff", markeredgewidth=0.8))
        words.append("random weights")
    if any(entry.mark is not None and entry.mark.floor is not None for entry in portrait.entries):
        handles.append(Line2D([], [], linestyle="", marker="|", markersize=5, color=INK, markeredgewidth=0.8))
        words.append("chance or floor")
    if any(entry.mark is not None and entry.mark.incomplete for entry in portrait.entries):
        handles.append(Line2D([], [], linestyle="", marker="$*$", markersize=3, color=INK))
        words.append("incomplete")
    figure.legend(
        handles,
        words,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=len(words),
        frameon=False,
        fontsize=_SIZE,
        handletextpad=0.2,
        columnspacing=1.1,
        borderpad=0.2,
    )
