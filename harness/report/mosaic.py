"""A gallery as a figure: a block for each query, a line for each encoder, its nearest items in order.

Right ones have a blue frame and a tick, wrong ones an orange dashed frame, a cross and the name of their class. In locality galleries a tag
shows what else a neighbour shares with the query.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from harness.report.board import titles
from harness.report.drawing import INK, MUTED, Drawing, canvas, png
from harness.report.gallery import DEPTH, Gallery, Neighbour
from harness.report.palette import NEITHER, RIGHT, WRONG, Palette, mix
from harness.report.units import plain

_SIDE = 112  # pixels of a thumbnail
_PITCH = 1.0  # one cell of the grid, in data units; thumbnails leave a gap in it
_THUMB = 0.84
_QUERY = 1.5
_NAME = 2.9
_INCH = 0.72  # of one cell
_DPI = 125  # photographs are most of what a report weighs


def mosaic(gallery: Gallery, palette: Palette, name: str) -> Drawing:
    """The gallery's figure; absent for the gallery's reason."""
    title = titles([gallery.column])[gallery.column][0]
    if gallery.absent:
        return Drawing(name=name, absent=f"{title}, {gallery.absent}" if gallery.kind == "shared" else gallery.absent)
    shown = [query for query in gallery.queries if query in gallery.cuts]
    lines = max(2, len(gallery.encoders))
    block = max(lines * _PITCH, _QUERY + 0.4) + 0.2
    width, height = _QUERY + _NAME + DEPTH * _PITCH, block * len(shown) + 0.35
    with canvas(width * _INCH, height * _INCH, _DPI) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        left = _QUERY + _NAME
        axes.text(0.12, 0.2, "query", color=MUTED, va="center", fontsize=8)
        axes.text(left, 0.2, "its nearest, by cosine →", color=MUTED, va="center", fontsize=8)
        for i, query in enumerate(shown):
            _block(axes, gallery, query, 0.4 + i * block, palette)
            if i:
                axes.plot([0.1, width - 0.1], [0.29 + i * block] * 2, color="#d8dee4", linewidth=0.8)
        _legend(axes, width, gallery)
        data = png(figure)
    alt = f"{title}: {len(shown)} queries and their {DEPTH} nearest items for {len(gallery.encoders)} encoders, right and wrong ones marked"
    return Drawing(name=name, png=data, alt=plain(alt), notes=gallery.notes, caption=_caption(gallery, title))


def _caption(gallery: Gallery, title: str) -> str:
    signs = f"✓ of the same {gallery.asks}, ✗ of another one, with its name"
    if gallery.kind == "shared":
        about = f"{title} · {gallery.column.protocol}. For each patch, the ten nearest patches of every encoder, nearest first"
        tags = (
            "tags tell a patch of the same image, or of another image of the same class"
            if gallery.asks == "part"
            else "tags tell a patch of the same image"
        )
        return f"{about}: {signs}; {tags}. Patches are spread evenly over what they show and over the split; nobody picked them."
    about = "For each query, the ten nearest items of every encoder, nearest first"
    return f"{about}: {signs}. Queries are spread evenly over the classes and the split; nobody picked them."


def _image(gallery: Gallery, key: str) -> np.ndarray | None:
    cut = gallery.cuts.get(key)
    return cut.image if cut is not None else None


def _block(axes: Any, gallery: Gallery, query: str, top: float, palette: Palette) -> None:
    _thumb(axes, _image(gallery, query), 0.12, top + 0.05, _QUERY - 0.1)
    axes.text(0.12, top + _QUERY + 0.1, plain(gallery.classes.get(query) or query, 20), va="center", fontsize=9, fontweight="bold")
    for line, encoder in enumerate(gallery.encoders):
        y = top + line * _PITCH
        nearest = gallery.neighbours.get((encoder, query), ())
        colour = mix(palette.styles[encoder].colour, INK, 0.35)
        axes.text(_QUERY + _NAME - 0.18, y + 0.34, plain(encoder, 26), ha="right", va="center", fontsize=8, color=colour)
        counted = [neighbour for neighbour in nearest if neighbour.key != query]
        right = sum(neighbour.relevant for neighbour in counted)
        words = f"{right} of {len(counted)} right" if counted else "nothing was kept"
        if gallery.kind == "shared" and counted:
            near = sum(gallery.shares(query, neighbour.key) == "image" for neighbour in counted)
            words = f"{right} same {gallery.asks}, {near} same image, of {len(counted)}"
        axes.text(_QUERY + _NAME - 0.18, y + 0.58, words, ha="right", va="center", fontsize=7, color=MUTED)
        for rank, neighbour in enumerate(nearest):
            _neighbour(axes, gallery, query, neighbour, _QUERY + _NAME + rank * _PITCH, y)


def _neighbour(axes: Any, gallery: Gallery, query: str, neighbour: Neighbour, x: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    colour, symbol = (NEITHER, "=") if neighbour.key == query else (RIGHT, "✓") if neighbour.relevant else (WRONG, "✗")
    _thumb(axes, _image(gallery, neighbour.key), x, y, _THUMB)
    style = "-" if symbol == "✓" else (0, (2.2, 1.2))
    axes.add_patch(Rectangle((x, y), _THUMB, _THUMB, fill=False, edgecolor=colour, linewidth=2.0, linestyle=style, zorder=3))
    axes.add_patch(Rectangle((x + _THUMB - 0.25, y), 0.25, 0.25, facecolor=colour, edgecolor="none", zorder=4))
    axes.text(x + _THUMB - 0.125, y + 0.13, symbol, color="white", ha="center", va="center", fontsize=7.5, fontweight="bold", zorder=5)
    shared = gallery.shares(query, neighbour.key) if gallery.kind == "shared" and neighbour.key != query else ""
    if shared == "image" or (shared and gallery.asks == "part"):
        badge = {"facecolor": INK, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axes.text(x + 0.03, y + 0.1, shared, color="white", ha="left", va="center", fontsize=6.5, zorder=5, bbox=badge)
    if symbol == "✗" and gallery.classes.get(neighbour.key):
        axes.text(
            x + _THUMB / 2,
            y + _THUMB - 0.02,
            plain(gallery.classes[neighbour.key], 12),
            color="white",
            ha="center",
            va="bottom",
            fontsize=6.5,
            zorder=5,
            bbox={"facecolor": WRONG, "edgecolor": "none", "pad": 1.0, "alpha": 0.9},
        )


def _thumb(axes: Any, image: np.ndarray | None, x: float, y: float, side: float) -> None:
    """An image in a square, its shape kept; grey where it is missing."""
    from matplotlib.patches import Rectangle

    if image is None:
        axes.add_patch(Rectangle((x, y), side, side, facecolor="#d8dee4", edgecolor="none", zorder=1))
        return
    height, width = image.shape[:2]
    factor = _SIDE * (2 if side > 1 else 1) / max(height, width)
    small = Image.fromarray(image).resize((max(1, round(width * factor)), max(1, round(height * factor))), Image.Resampling.BICUBIC)
    w, h = side * width / max(height, width), side * height / max(height, width)
    x0, y0 = x + (side - w) / 2, y + (side - h) / 2
    axes.imshow(np.asarray(small), extent=(x0, x0 + w, y0 + h, y0), interpolation="bilinear", aspect="auto", zorder=1)


def _legend(axes: Any, width: float, gallery: Gallery) -> None:
    x = width - 4.9
    signs = ((RIGHT, "✓", f"same {gallery.asks}", 1.45), (WRONG, "✗", f"another {gallery.asks}", 1.75), (NEITHER, "=", "the query itself", 0))
    for colour, symbol, word, step in signs:
        axes.text(
            x, 0.2, symbol, color="white", fontsize=7.5, fontweight="bold", va="center", bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.6}
        )
        axes.text(x + 0.25, 0.2, word, fontsize=8, color=MUTED, va="center")
        x += step
