"""The report of a run: figures/*.png and one self-contained HTML page, from nothing but the run's folder (and, for the gallery, the shards)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from harness.files import file_name, publish
from harness.report.board import Board, make_board
from harness.report.curve_figure import caption, curve_figure
from harness.report.curve_table import CurveSection, curve_section, figure_names
from harness.report.curves import Curve, curves
from harness.report.drawing import Drawing
from harness.report.gallery import Gallery, galleries
from harness.report.learning_rates import learning_rates, studies
from harness.report.mosaic import mosaic
from harness.report.paired import compare
from harness.report.palette import RIGHT, WRONG, Palette, make_palette
from harness.report.portrait import Portrait, portraits
from harness.report.portrait_figure import portrait_figure
from harness.report.published import compare_published, read_encoders
from harness.report.run import Run, random_twins, read_run
from harness.report.scatter import object_part
from harness.report.sections import headline, ledger_sum, paired_table, provenance, published_table, records, selection, study_lines

GALLERY = "gallery"
PORTRAIT = "portrait_"
_SERIES = (f"{GALLERY}-*.png", "curve_*.png", f"{PORTRAIT}*.png", f"{PORTRAIT}*.pdf")
"""Figures whose number depends on the run's galleries, curves and encoders."""


def write_report(out: Path, *, shards: str | None) -> Path:
    """Write `out`/figures/*.png and `out`/report.html; the path of the page.

    `shards` is where the gallery's images are cut from, a folder or URL; without it, or where it cannot be read, the page says why there is no
    gallery. Raises RequestError where `out` holds no results, or tables of another schema; RunError where nothing can be written.
    """
    run = read_run(out)
    board = make_board(run.results)
    palette = make_palette(board.encoders, random_twins(run.sweep))
    run_curves = curves(run.results)
    drawings = _drawings(run, board, palette, shards, run_curves)
    _write_figures(out / "figures", drawings)
    page = out / "report.html"
    _publish(page, _html(run, board, palette, run_curves, drawings).encode())
    return page


def _drawings(run: Run, board: Board, palette: Palette, shards: str | None, run_curves: Sequence[Curve]) -> list[Drawing]:
    drawings = [object_part(board, palette), learning_rates(studies(run.results, run.trials), board.encoders, palette)]
    drawings += [curve_figure(curve, palette, name) for curve, name in zip(run_curves, figure_names(run_curves), strict=True)]
    drawings += _portraits(portraits(run.results, palette.twins, shards), palette)
    return [*drawings, *_mosaics(galleries(run, board, shards), palette)]


def _portraits(run_portraits: Sequence[Portrait], palette: Palette) -> list[Drawing]:
    """A figure per portrait, named after its encoder, and after its data set where there are several."""
    several = len({portrait.dataset for portrait in run_portraits}) > 1
    names = [file_name(f"{PORTRAIT}{portrait.encoder}{f'_{portrait.dataset}' if several else ''}") for portrait in run_portraits]
    return [portrait_figure(portrait, palette, name) for portrait, name in zip(run_portraits, names, strict=True)]


def _mosaics(run_galleries: Sequence[Gallery], palette: Palette) -> list[Drawing]:
    """A figure for each gallery, those of retrieval first."""
    retrieval = [gallery for gallery in run_galleries if gallery.kind == "relevant"]
    local = [gallery for gallery in run_galleries if gallery.kind == "shared"]
    drawings = [
        mosaic(gallery, palette, GALLERY if i == 0 else f"{GALLERY}-{file_name(gallery.column.dataset)}-{i}") for i, gallery in enumerate(retrieval)
    ]
    if not run_galleries:
        drawings.append(Drawing(name=GALLERY, absent="no retrieval task of this run kept its nearest neighbours"))
    return drawings + [
        mosaic(gallery, palette, f"{GALLERY}-locality-{file_name(f'{gallery.column.dataset}-{gallery.column.protocol}')}{f'-{i}' if i else ''}")
        for i, gallery in enumerate(local)
    ]


def _write_figures(folder: Path, drawings: Sequence[Drawing]) -> None:
    """Write every figure and remove figures of an older report."""
    drawn = set()
    for drawing in drawings:
        for ending, data in ((".png", drawing.png), (".pdf", drawing.pdf)):
            _publish(folder / f"{drawing.name}{ending}", data)
            drawn |= {f"{drawing.name}{ending}"} if data is not None else set()
    for path in [path for kind in _SERIES for path in folder.glob(kind)]:
        if path.name not in drawn:
            path.unlink()


def _publish(path: Path, data: bytes | None) -> None:
    """Write the file, or remove an older one where there is nothing to write."""
    if data is None:
        path.unlink(missing_ok=True)
        return
    with publish(path) as temporary:
        temporary.write_bytes(data)


def _html(run: Run, board: Board, palette: Palette, run_curves: Sequence[Curve], drawings: Sequence[Drawing]) -> str:
    compared = compare(run, board, palette.twins)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = {drawing.name: _figure(drawing) for drawing in drawings}
    encoders = read_encoders(run.out)
    return environment.get_template("report.html.j2").render(
        title=str(run.sweep.get("name") or run.out.resolve().name),
        headline=headline(board, palette, compared, run_curves),
        scatter=figures["object_part"],
        learning_rates=figures["learning_rates"],
        curves=_curve_sections(run_curves, palette, figures),
        portraits=[figure for name, figure in figures.items() if name.startswith(PORTRAIT)],
        galleries=[figure for name, figure in figures.items() if name.startswith(GALLERY)],
        paired=paired_table(board, palette, compared),
        published=published_table(compare_published(run.results, encoders), palette),
        studies=study_lines(board, palette, run.trials),
        selection=selection(run.results),
        ledger=ledger_sum(run.ledger),
        provenance=provenance(run.results, palette, encoders),
        records=records(run.results, palette),
        sweep=_sweep_text(run),
        has_twins=bool(palette.twins),
        right=RIGHT,
        wrong=WRONG,
    )


def _curve_sections(run_curves: Sequence[Curve], palette: Palette, figures: Mapping[str, Mapping[str, Any]]) -> list[CurveSection]:
    random = {name for name, style in palette.styles.items() if style.random}
    return [
        curve_section(curve, palette, figures[name], caption(curve, random=bool(random & set(curve.encoders))))
        for curve, name in zip(run_curves, figure_names(run_curves), strict=True)
    ]


def _figure(drawing: Drawing) -> Mapping[str, Any]:
    uri = f"data:image/png;base64,{base64.b64encode(drawing.png).decode()}" if drawing.png else None
    return {"uri": uri, "alt": drawing.alt, "notes": drawing.notes, "absent": drawing.absent, "caption": drawing.caption}


def _sweep_text(run: Run) -> str:
    path = run.out / "sweep.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else ""
