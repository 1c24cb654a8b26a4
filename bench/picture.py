"""The one picture of the benchmarks: how far each row is from its target."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from bench.rows import Row, target_text
from harness.report.drawing import INK, canvas
from harness.report.palette import RIGHT, WRONG

_SVG = {"svg.hashsalt": "partwise", "svg.fonttype": "none"}
"""The same bytes for the same rows, and text as text."""


def advantage(row: Row) -> float | None:
    """How many times better than its target a row is, above 1 where it is met; None without a ratio above 0 or without a target."""
    if not row.ratio or not row.target:
        return None
    return row.target / row.ratio if row.lower_is_better else row.ratio / row.target


def svg(title: str, rows: Sequence[Row]) -> str:
    """Rows that have a ratio and a target as points on a logarithmic axis, 1 where the target is."""
    import matplotlib

    points = [(row, better) for row in rows if (better := advantage(row)) is not None]
    with canvas(8.4, 0.9 + 0.32 * len(points)) as figure, matplotlib.rc_context(_SVG):
        axes = figure.subplots()
        for place, (row, better) in enumerate(points):
            colour = RIGHT if row.is_met else WRONG
            axes.plot([1, better], [place, place], color=colour, linewidth=1.2)
            axes.plot([better], [place], marker="o" if row.is_met else "X", color=colour, markersize=6)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log", base=2)
        reach = max([1.0, *(abs(math.log2(better)) for _, better in points)]) * 1.1
        axes.set_xlim(2**-reach, 2**reach)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.minorticks_off()
        axes.set_yticks(range(len(points)), [f"{row.row}  ({target_text(row)})" for row, _ in points])
        axes.invert_yaxis()
        axes.set_xlabel("times better than the target (right of 1×: met)")
        axes.set_title(title)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
