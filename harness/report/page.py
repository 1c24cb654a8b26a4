"""The report of a run: figures/*.png and one self-contained HTML page, from nothing but the run's folder (and, for the gallery, the shards)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from harness.report.board import Board, make_board
from harness.report.curves import learning_rates, studies
from harness.report.drawing import Drawing
from harness.report.gallery import galleries
from harness.report.mosaic import mosaic
from harness.report.paired import Comparisons, compare
from harness.report.palette import RIGHT, WRONG, Look, look
from harness.report.published import compare_published, read_encoders
from harness.report.run import Run, random_twins, read_run
from harness.report.scatter import object_part
from harness.report.sections import headline, ledger_sum, paired_table, provenance, published_table, records, study_lines
from harness.tables import file_name, publish

GALLERY = "gallery"


def write_report(out: Path, *, shards: str | None) -> Path:
    """Write `out`/figures/*.png and `out`/report.html; the path of the page.

    `shards` is where the gallery's images are cut from, a folder or URL; without it, or where it cannot be read, the page says why there is no
    gallery. Raises RequestError where `out` holds no results, or tables of another schema; RunError where nothing can be written.
    """
    run = read_run(out)
    board = make_board(run.results)
    looks = look(board.encoders, random_twins(run.sweep))
    compared = compare(run, board, looks.twins)
    drawings = _drawings(run, board, looks, shards)
    for drawing in drawings:
        _publish(out / "figures" / f"{drawing.name}.png", drawing.png)
    page = out / "report.html"
    _publish(page, _html(run, board, looks, compared, drawings).encode())
    return page


def _drawings(run: Run, board: Board, looks: Look, shards: str | None) -> list[Drawing]:
    drawings = [object_part(board, looks), learning_rates(studies(run.results, run.trials), board.encoders, looks)]
    found = galleries(run, board, shards)
    if not found:
        return [*drawings, Drawing(name=GALLERY, absent="no retrieval task of this run kept its nearest neighbours")]
    for i, gallery in enumerate(found):
        drawings.append(mosaic(gallery, looks, GALLERY if i == 0 else f"{GALLERY}-{file_name(gallery.column.dataset)}-{i}"))
    return drawings


def _publish(path: Path, data: bytes | None) -> None:
    """Write, or, where there is nothing to write, leave no older file either."""
    if data is None:
        path.unlink(missing_ok=True)
        return
    with publish(path) as temporary:
        temporary.write_bytes(data)


def _html(run: Run, board: Board, looks: Look, compared: Sequence[Comparisons], drawings: Sequence[Drawing]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = {drawing.name: _figure(drawing) for drawing in drawings}
    return environment.get_template("report.html.j2").render(
        title=str(run.sweep.get("name") or run.out.resolve().name),
        headline=headline(board, looks, compared),
        scatter=figures["object_part"],
        curves=figures["learning_rates"],
        galleries=[figure for name, figure in figures.items() if name.startswith(GALLERY)],
        paired=paired_table(board, looks, compared),
        published=published_table(compare_published(run.results, read_encoders(run.out)), looks),
        studies=study_lines(board, looks, run.trials),
        selected_on=sorted({row["selected_on"] for row in run.results if row["selected_on"]}),
        ledger=ledger_sum(run.ledger),
        provenance=provenance(run.results, looks),
        records=records(run.results, looks),
        sweep=_sweep_text(run),
        has_twins=bool(looks.twins),
        right=RIGHT,
        wrong=WRONG,
    )


def _figure(drawing: Drawing) -> Mapping[str, Any]:
    uri = f"data:image/png;base64,{base64.b64encode(drawing.png).decode()}" if drawing.png else None
    return {"uri": uri, "alt": drawing.alt, "notes": drawing.notes, "absent": drawing.absent}


def _sweep_text(run: Run) -> str:
    path = run.out / "sweep.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else ""
