"""The board on a terminal: encoders down, tasks across, as many tables as the width needs; a single encoder is a list of tasks.

Of a curve only the ends are shown, one line per encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report.board import Board, Column, Row, make_board, reason, status, titles
from harness.report.curve_table import in_words
from harness.report.curves import Curve, NotOk, curves, not_ok
from harness.report.units import FRACTION, interval, number, plain, unit

_NAME_WIDTH = 26
_CELL_WIDTH = 14  # "[100.0, 100.0]"
_GAP = 2
_REASONS = 12
_MARKS = {"ok": "", "incomplete": "*"}
_STYLES = {"incomplete": "yellow", "failed": "red", "undefined": "dim"}


def terminal(results: Sequence[Row], console: Console) -> None:
    """Print the main metric of every encoder and task with its 95 % interval, the best of each task in bold, and why rows are not ok.

    Curves are shown by their ends.
    """
    board, along = make_board(results), curves(results)
    if not board.columns and not along:
        console.print("No records.")
        return
    if board.columns and len(board.encoders) == 1:
        console.print(_one_encoder(board))
    elif board.columns:
        for columns in _that_fit(board.columns, console.width):
            console.print()
            console.print(_several_encoders(board, columns))
    for line in (*_curves(along), *_notes(board, not_ok(along), console.width)):
        console.print(line, soft_wrap=True)


def _that_fit(columns: Sequence[Column], width: int) -> Iterator[Sequence[Column]]:
    """All columns where they fit the width, else those of each level in even runs that do."""
    at_once = max(1, (width - _NAME_WIDTH - _GAP) // (_CELL_WIDTH + _GAP))
    if len(columns) <= at_once:
        yield columns
        return
    for level in dict.fromkeys(column.level for column in columns):
        of_level = [column for column in columns if column.level == level]
        size = -(-len(of_level) // -(-len(of_level) // at_once))
        for start in range(0, len(of_level), size):
            yield of_level[start : start + size]


def _several_encoders(board: Board, columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(Text("\n\nencoder"), no_wrap=True, max_width=_NAME_WIDTH, overflow="ellipsis")
    named = titles(board.columns)
    for column in columns:
        title, qualifier = named[column]
        level, dash, rest = title.partition("-")
        head = Text(f"{level}{dash}\n{rest}\n") if dash else Text(f"\n{title}\n")
        head.append(plain(column.metric or ""), style="dim")
        if qualifier:
            head.append(f"\n{plain(qualifier)}", style="italic")
        table.add_column(head, justify="right", width=_CELL_WIDTH)
    for encoder in board.encoders:
        cells = [_cell(board, encoder, column, newline=True) for column in columns]
        table.add_row(Text(plain(encoder, _NAME_WIDTH)), *cells)
    return table


def _one_encoder(board: Board) -> Table:
    (encoder,) = board.encoders
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title=Text(plain(encoder)), title_justify="left")
    for name in ("task", "protocol", "metric"):
        table.add_column(name, overflow="fold")
    table.add_column("value [95 % interval]", justify="right", no_wrap=True)
    table.add_column("items", justify="right")
    named = titles(board.columns)
    for column in board.columns:
        row = board.cells[encoder, column]
        protocol = named[column][1] or column.protocol or ""
        words = [Text(plain(text)) for text in (named[column][0], protocol, column.metric or "")]
        table.add_row(*words, _cell(board, encoder, column, newline=False), Text(str(row["n"] if row["n"] is not None else "")))
    return table


def _cell(board: Board, encoder: str, column: Column, *, newline: bool) -> Text:
    row = board.cells.get((encoder, column))
    if row is None:
        return Text("")
    state = status(row)
    if state not in _MARKS:
        return Text(state, style=_STYLES.get(state, ""))
    best = encoder in board.best(column)
    text = Text(number(row["value"], column.metric) + _MARKS[state], style="bold green" if best else _STYLES.get(state, ""))
    between = interval(row["ci_low"], row["ci_high"], column.metric) or "no interval"
    return text.append("\n" if newline else " ").append(between, style="not bold dim")


def _curves(along: Sequence[Curve]) -> Iterator[Text]:
    """The first and the last point of every encoder's curve, curve by curve."""
    title = ""
    for line in in_words(along):
        if line.curve != title:
            yield Text(f"\n{plain(line.curve)}", style="bold")
        title = line.curve
        yield Text(f"  {plain(line.encoder, _NAME_WIDTH)}  ").append(plain(line.text), style="dim")


def _notes(board: Board, odd_points: Sequence[NotOk], width: int) -> Iterator[Text]:
    percent = all(unit(column.metric) == FRACTION for column in board.columns if column.metric)
    bold = " Bold: the best of those that may be ranked together." if len(board.encoders) > 1 else ""
    yield Text(f"{'Percent' if percent else 'Percent for fractions'}, with 95 % intervals over images.{bold}", style="dim")
    odd = board.not_ok()
    named = titles(board.columns)
    reasons = [(status(row), " · ".join(plain(word) for word in (row["encoder"], *named[column]) if word), reason(row)) for column, row in odd]
    reasons += [(line.status, plain(f"{line.encoder} · {line.where}"), line.reason) for line in odd_points]
    if any(state == "incomplete" for state, _, _ in reasons):
        yield Text("* incomplete: over what was seen, never ranked.", style=_STYLES["incomplete"])
    for state, where, why in reasons[:_REASONS]:
        line = Text(f"{state}: ", style=_STYLES.get(state, ""))
        yield line.append(plain(f"{where}: {why}", max(60, 2 * width)), style="default")
    if len(reasons) > _REASONS:
        yield Text(f"… and {len(reasons) - _REASONS} more that are not ok; the report lists all of them.")
    notes = board.notes()
    for column, encoders, text in notes[:_REASONS]:
        where = " · ".join(plain(word) for word in (encoders, *named[column]) if word)
        yield Text("note: ", style=_STYLES["incomplete"]).append(plain(f"{where}: {text}", max(60, 2 * width)), style="default")
    if len(notes) > _REASONS:
        yield Text(f"… and {len(notes) - _REASONS} more notes; the report has all of them.")
