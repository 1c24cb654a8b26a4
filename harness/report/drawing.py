"""What all figures share: a canvas without global state, type, and PNG bytes that are the same for the same figure."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

INK, MUTED, RULE = "#1f2328", "#656d76", "#d8dee4"
_RC = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.parse_math": False,  # a name may hold dollar signs
    "figure.facecolor": "white",
    "hatch.linewidth": 0.6,
    "pdf.fonttype": 42,  # TrueType, which publishers take
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure of the report, or why there is none."""

    name: str
    """File name in figures/, without its extension."""
    png: bytes | None = None
    alt: str = ""
    notes: tuple[str, ...] = ()
    """What is not in it, and why."""
    absent: str | None = None
    caption: str = ""
    """What it shows, where that is not the same for all figures of its section."""
    pdf: bytes | None = None
    """The same figure for print, if it has one."""


@contextmanager
def canvas(width: float, height: float, dpi: int = 160) -> Iterator[Any]:
    """A matplotlib Figure of `width` × `height` inches under the report's type; to be drawn and written inside the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width, height), dpi=dpi)
        FigureCanvasAgg(figure)
        yield figure


def png(figure: Any) -> bytes:
    """The figure as PNG. Glyphs that the font lacks become boxes, without a warning for each."""
    return _saved(figure, format="png", metadata={"Software": None})


def pdf(figure: Any) -> bytes:
    """The figure as PDF, its text as text, without the date on which it was made."""
    return _saved(figure, format="pdf", metadata={"Creator": None, "Producer": None, "CreationDate": None})


def _saved(figure: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, **how)
    return buffer.getvalue()
