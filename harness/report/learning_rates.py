"""Score on the selection split against learning rate: a panel for every study that searched one, a line for every readout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.board import Row, parsed
from harness.report.drawing import INK, MUTED, Drawing, canvas, png
from harness.report.palette import WRONG, Palette, Style, mix
from harness.report.points import is_point
from harness.report.units import is_defined, plain, scale

NAME = "learning_rates"
EDGE = 0.1
"""Share of the rates' range, in logarithms, that counts as its edge on either side."""
_LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)))
_MARKERS = "os^Dv<>p"
_TINTS = (0.0, 0.35, 0.55, 0.0, 0.55, 0.35)

TaskKey = tuple[str, str]
"""Task and protocol."""


@dataclass(frozen=True, kw_only=True)
class SearchedStudy:
    """The heads of one (encoder, task, protocol) that have a learning rate, and the chosen one if any."""

    encoder: str
    task: TaskKey
    heads: Sequence[Row]
    chosen: Mapping[str, Any]
    """The chosen head's hyperparameters; empty where none was chosen."""

    def is_chosen(self, head: Row) -> bool:
        return bool(self.chosen) and all(self.chosen.get(name) == head[name] for name in ("lr", "readout"))

    @property
    def edge(self) -> str:
        """Where the chosen rate lies, as `edge_of` says."""
        return edge_of(self.chosen.get("lr"), [head["lr"] for head in self.heads])

    @property
    def failed(self) -> list[Row]:
        return [head for head in self.heads if not is_defined(head["val_value"])]


def edge_of(rate: float | None, tried: Sequence[float]) -> str:
    """`lower` or `upper`, where `rate` lies within EDGE of that end of the rates that were tried; else empty."""
    low, high = min(tried, default=0.0), max(tried, default=0.0)
    if rate is None or not 0 < low < high:
        return ""
    place = math.log(rate / low) / math.log(high / low)
    return "lower" if place <= EDGE else "upper" if place >= 1 - EDGE else ""


def studies(results: Sequence[Row], trials: Sequence[Row]) -> list[SearchedStudy]:
    """Studies in the order of the trials. Points of curves are left out: there is one study per point, and the curves' tables show what it chose."""
    chosen: dict[tuple[str, TaskKey], Mapping[str, Any]] = {}
    for row in results:
        chosen.setdefault((row["encoder"], (row["task"], row["protocol"])), {"readout": row["readout"], **parsed(row["hyperparameters"])})
    grouped: dict[tuple[str, TaskKey], list[Row]] = {}
    for trial in trials:
        if trial["lr"] is not None and not is_point(trial["protocol"]):
            grouped.setdefault((trial["encoder"], (trial["task"], trial["protocol"])), []).append(trial)
    return [
        SearchedStudy(encoder=encoder, task=task, heads=sorted(heads, key=lambda head: head["lr"]), chosen=chosen.get((encoder, task), {}))
        for (encoder, task), heads in grouped.items()
    ]


def learning_rates(searched: Sequence[SearchedStudy], encoders: Sequence[str], palette: Palette) -> Drawing:
    """Encoders down, tasks across; the chosen head ringed, twice at an edge of the rates, failed heads as crosses on the floor."""
    tasks = sorted({study.task for study in searched}, key=lambda task: (task[0].rpartition("/")[2], task))  # object before part
    rows = [encoder for encoder in encoders if any(study.encoder == encoder for study in searched)]
    if not searched or not rows:
        return Drawing(name=NAME, absent="no task of this run searches a learning rate")
    by_place = {(study.encoder, study.task): study for study in searched}
    readouts = list(dict.fromkeys(head["readout"] for study in searched for head in study.heads))
    across, down = len(tasks), len(rows)
    width = max(6.4, 0.9 + 2.9 * across)
    legend_rows = -(-(len(readouts) + 2) // int(width / 1.3))
    below = 0.55 + 0.2 * legend_rows
    height = below + 0.35 + 1.5 * down
    with canvas(width, height) as figure:
        grid = figure.add_gridspec(
            down, across, left=0.62 / width, right=1 - 0.12 / width, bottom=below / height, top=1 - 0.45 / height, wspace=0.16, hspace=0.3
        )
        for column, task in enumerate(tasks):
            shared = None
            for row, encoder in enumerate(rows):
                axes = figure.add_subplot(grid[row, column], sharex=shared, sharey=shared)
                shared = shared or axes
                study = by_place.get((encoder, task))
                if study is None:
                    axes.text(0.5, 0.5, "nothing was searched", transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
                else:
                    _panel(axes, study, readouts, palette.styles[encoder])
                axes.tick_params(labelbottom=row == down - 1)
                axes.text(0.0, 1.03, plain(encoder, 40), transform=axes.transAxes, fontsize=8, color=mix(palette.styles[encoder].colour, INK, 0.35))
            _floor(shared)
            title = _title(task, tasks)
            x = (grid[0, column].get_position(figure).x0 + grid[0, column].get_position(figure).x1) / 2
            figure.text(x, 1 - 0.09 / height, plain(title, 44), ha="center", va="top", fontweight="bold", fontsize=9.5)
        metrics = sorted({head["metric"] for study in searched for head in study.heads if head["metric"]})
        percent = " (%)" if all(scale(metric) == 100 for metric in metrics) else ""
        figure.text(0.16 / width, 0.5, plain(f"{' or '.join(metrics)} on the selection split{percent}"), rotation=90, va="center", ha="center")
        figure.text(0.5, (below - 0.38) / height, "learning rate", ha="center", va="bottom")
        _legend(figure, readouts, legend_rows, failed=any(study.failed for study in searched))
        data = png(figure)
    return Drawing(
        name=NAME, png=data, alt=f"Score on the selection split against learning rate, {len(searched)} studies", notes=tuple(_notes(searched))
    )


def _panel(axes: Any, study: SearchedStudy, readouts: Sequence[str], style: Style) -> None:
    axes.set_xscale("log")
    for i, readout in enumerate(readouts):
        heads = [head for head in study.heads if head["readout"] == readout and is_defined(head["val_value"])]
        values = [head["val_value"] * scale(head["metric"]) for head in heads]
        line = {"color": mix(style.colour, "#ffffff", _TINTS[i % len(_TINTS)]), "linestyle": _LINES[i % len(_LINES)], "linewidth": 1.2}
        face = style.face if style.random else line["color"]
        axes.plot([h["lr"] for h in heads], values, marker=_MARKERS[i % len(_MARKERS)], markersize=3.6, markerfacecolor=face, zorder=2, **line)
        for head, value in zip(heads, values, strict=True):
            if study.is_chosen(head):
                for size in (10, 15) if study.edge else (10,):
                    axes.plot(
                        head["lr"], value, marker="o", markersize=size, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.5, zorder=4
                    )
    for head in study.failed:
        axes.plot(head["lr"], 0.05, marker="x", color=WRONG, markersize=5.5, markeredgewidth=1.5, transform=axes.get_xaxis_transform(), zorder=3)


def _floor(axes: Any) -> None:
    """Room below the lowest score for the crosses of failed heads, and decades that stay readable."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    if math.isfinite(low) and high > low:
        axes.set_ylim(low - 0.14 * (high - low), high + 0.06 * (high - low))
    axes.xaxis.set_major_locator(LogLocator(base=10, numticks=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))


def _legend(figure: Any, readouts: Sequence[str], rows: int, *, failed: bool) -> None:
    from matplotlib.lines import Line2D

    handles, words = [], []
    for i, readout in enumerate(readouts):
        colour = mix("#24292f", "#ffffff", _TINTS[i % len(_TINTS)])
        handles.append(
            Line2D([], [], color=colour, linestyle=_LINES[i % len(_LINES)], marker=_MARKERS[i % len(_MARKERS)], markersize=4, linewidth=1.2)
        )
        words.append(plain(readout, 24))
    handles.append(Line2D([], [], color=INK, marker="o", markersize=9, markerfacecolor="none", markeredgewidth=1.5, linestyle=""))
    words.append("chosen")
    if failed:
        handles.append(Line2D([], [], color=WRONG, marker="x", markersize=6, markeredgewidth=1.5, linestyle=""))
        words.append("failed, no score")
    figure.legend(handles, words, loc="lower center", ncols=-(-len(words) // rows), frameon=False, fontsize=8)


def _title(task: TaskKey, tasks: Sequence[TaskKey]) -> str:
    """The task, with its data set and its protocol where there are several."""
    several_sets = len({name.rpartition("/")[0] for name, _ in tasks}) > 1
    several_protocols = sum(name == task[0] for name, _ in tasks) > 1
    name = task[0] if several_sets else task[0].rpartition("/")[2]
    return f"{name} · {task[1]}" if several_protocols else name


def _notes(searched: Sequence[SearchedStudy]) -> list[str]:
    notes = []
    at_edge = [study for study in searched if study.edge]
    if at_edge:
        which = ", ".join(f"{study.encoder} on {study.task[0].rpartition('/')[2]} ({study.edge})" for study in at_edge)
        notes.append(f"at the edge of the searched range (within {EDGE:.0%} of an end, in logarithms): {which}; widen it")
    lost = [head for study in searched for head in study.failed]
    if not lost:
        return notes
    heads, studies_hit = sum(len(study.heads) for study in searched), sum(bool(study.failed) for study in searched)
    why = lost[0]["error"] or "no reason was recorded"
    return [*notes, f"{len(lost)} of {heads} heads, in {studies_hit} of {len(searched)} studies, have no score; the first of them: {why}"]
