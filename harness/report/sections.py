"""The page's sections as plain text in rows and cells, everything formatted but nothing escaped: the template does that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.report.board import LEVELS, Board, Column, Row, note, parsed, reason, status, titles
from harness.report.curves import Curve, not_ok
from harness.report.learning_rates import edge_of
from harness.report.paired import Comparisons, shows_all_pairs
from harness.report.palette import Palette, Style
from harness.report.points import is_point
from harness.report.published import Comparison, Published
from harness.report.units import FRACTION, interval, is_defined, number, unit


@dataclass(frozen=True, kw_only=True)
class Name:
    """An encoder as the page shows it."""

    text: str
    style: Style


@dataclass(frozen=True, kw_only=True)
class ScoreCell:
    """One score."""

    text: str = ""
    between: str = ""
    status: str = ""
    """Empty where there is no row."""
    reason: str = ""
    best: bool = False
    level_with_best: bool = False
    bar: tuple[float, float, float] | None = None
    """Start, width and place of the value on a track from 0 to 100."""


@dataclass(frozen=True, kw_only=True)
class ColumnHead:
    """The top of one of the headline's columns."""

    title: str
    qualifier: str
    metric: str
    items: str


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The table of main metrics."""

    levels: Sequence[tuple[str, int]]
    """Level and how many columns it has."""
    heads: Sequence[ColumnHead]
    rows: Sequence[tuple[Name, Sequence[ScoreCell]]]
    not_ok: Sequence[tuple[str, str, str, str]]
    """Encoder, task, status, reason."""
    notes: Sequence[tuple[str, str, str]]
    """Encoders, task, note on their values, which are ok."""
    not_ok_count: int
    """Number of records that these lines cover: a line may cover many points of one curve."""
    counts: Sequence[tuple[str, int]]
    """Status → number of records, one for each point of a curve."""
    curves: int


def headline(board: Board, palette: Palette, compared: Sequence[Comparisons], run_curves: Sequence[Curve] = ()) -> Headline:
    """The board as a table; for curves only the points that are not ok, and the number of curves."""
    named = titles(board.columns)
    by_column = {comparisons.column: comparisons for comparisons in compared}
    points = [point.row for curve in run_curves for point in curve.main_points() if is_point(point.row["protocol"])]
    odd, odd_points = board.not_ok(), not_ok(run_curves)
    return Headline(
        levels=[(level, count) for level in _levels(board) if (count := sum(column.level == level for column in board.columns))],
        heads=[_head(board, column, named) for column in board.columns],
        rows=[
            (name(encoder, palette), [_cell(board, encoder, column, by_column.get(column)) for column in board.columns]) for encoder in board.encoders
        ],
        not_ok=[
            *((row["encoder"], " · ".join(word for word in named[column] if word), status(row), reason(row)) for column, row in odd),
            *((line.encoder, line.where, line.status, line.reason) for line in odd_points),
        ],
        notes=[(encoders, " · ".join(word for word in named[column] if word), text) for column, encoders, text in board.notes()],
        not_ok_count=len(odd) + sum(line.points for line in odd_points),
        counts=Counter(status(row) for row in (*board.cells.values(), *points)).most_common(),
        curves=len(run_curves),
    )


def name(encoder: str, palette: Palette) -> Name:
    return Name(text=encoder, style=palette.styles[encoder])


def _levels(board: Board) -> list[str]:
    return [*LEVELS, *dict.fromkeys(column.level for column in board.columns if column.level not in LEVELS)]


def _metric(metric: str | None) -> str:
    return f"{metric} (%)" if unit(metric) == FRACTION else metric or ""


def _head(board: Board, column: Column, named: Mapping[Column, tuple[str, str]]) -> ColumnHead:
    return ColumnHead(title=named[column][0], qualifier=named[column][1], metric=_metric(column.metric), items=_items(board, column))


def _items(board: Board, column: Column) -> str:
    counts = {row["n"] for encoder in board.encoders if (row := board.cells.get((encoder, column))) and row["n"] and is_defined(row["value"])}
    return f"{min(counts):,} items" if len(counts) == 1 else f"{min(counts):,}–{max(counts):,} items" if counts else ""


def _cell(board: Board, encoder: str, column: Column, compared: Comparisons | None) -> ScoreCell:
    row = board.cells.get((encoder, column))
    if row is None:
        return ScoreCell()
    state, value = status(row), row["value"]
    best = board.best(column)
    if not is_defined(value):
        return ScoreCell(text=state, status=state, reason=reason(row))
    level = (
        compared is not None
        and encoder not in best
        and any(leader in best for leader in compared.encoders[:1])
        and encoder in compared.level_with_best()
    )
    return ScoreCell(
        text=number(value, column.metric),
        between=interval(row["ci_low"], row["ci_high"], column.metric) or "no interval",
        status=state,
        reason=note(row) if state == "ok" else reason(row),
        best=encoder in best,
        level_with_best=level,
        bar=_bar(row) if unit(column.metric) == FRACTION else None,
    )


def _bar(row: Row) -> tuple[float, float, float]:
    value = 100 * row["value"]
    low, high = (100 * row[bound] if is_defined(row[bound]) else value for bound in ("ci_low", "ci_high"))
    return low, high - low, value


@dataclass(frozen=True, kw_only=True)
class PairedTable:
    """Paired differences: a line per pair of encoders and a column per task."""

    heads: Sequence[ColumnHead]
    rows: Sequence[tuple[Name, Name | None, Sequence[ScoreCell]]]
    """First encoder, second encoder (None: the best of each column), first less second by column; `best` marks an interval that leaves zero out."""
    notes: Sequence[str]


def paired_table(board: Board, palette: Palette, compared: Sequence[Comparisons]) -> PairedTable:
    """All pairs of few encoders; with many, each against the best of each column, then trained encoders against their random twins.

    A pair that was not compared in a column has an empty cell there.
    """
    named = titles(board.columns)
    rows: list[tuple[Name, Name | None, Sequence[ScoreCell]]] = []
    if shows_all_pairs(board):
        pairs = [(first, second) for i, first in enumerate(board.encoders) for second in board.encoders[i + 1 :]]
    else:
        pairs = [(trained, random) for random, trained in palette.twins.items() if trained in board.encoders]
        rows = [(name(encoder, palette), None, [_against_best(comparisons, encoder) for comparisons in compared]) for encoder in board.encoders]
    for first, second in pairs:
        rows.append((name(first, palette), name(second, palette), [_difference(comparisons, first, second) for comparisons in compared]))
    return PairedTable(
        heads=[_head(board, comparisons.column, named) for comparisons in compared],
        rows=[row for row in rows if any(cell.text for cell in row[2])],
        notes=[f"{' · '.join(word for word in named[comparisons.column] if word)}: {note}" for comparisons in compared for note in comparisons.notes],
    )


def _against_best(compared: Comparisons, encoder: str) -> ScoreCell:
    if compared.encoders[:1] == (encoder,):
        return ScoreCell(text="best", status="ok")
    return _difference(compared, encoder, compared.encoders[0]) if compared.encoders else ScoreCell()


def _difference(compared: Comparisons, first: str, second: str) -> ScoreCell:
    difference = compared.of(first, second)
    if difference is None:
        return ScoreCell()
    metric, estimate = compared.column.metric, difference.estimate
    return ScoreCell(
        text=number(estimate.value, metric, signed=True),
        between=interval(estimate.low, estimate.high, metric, signed=True) or estimate.reason or "no interval",
        status="ok",
        best=difference.is_clear,
    )


@dataclass(frozen=True, kw_only=True)
class LedgerSum:
    """The accounts of the samples of every data set and split."""

    rows: Sequence[Sequence[str]]
    """Data set, split, shards, samples, banks, expected, seen, failed, duplicates."""
    total: Sequence[str]
    adds_up: bool
    """Whether seen + failed = expected, over everything."""
    odd: Sequence[Sequence[str]]
    """Data set, split, shard, status, banks, reason, affected samples."""


COUNTS = ("expected", "seen", "failed")
"""Columns of the ledger that must add up."""


def ledger_sum(ledger: Sequence[Row]) -> LedgerSum:
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in ledger:
        grouped.setdefault((row["dataset"], row["split"]), []).append(row)
    return LedgerSum(
        rows=[[*key, *_counts(rows)] for key, rows in grouped.items()],
        total=_counts(ledger)[3:],
        adds_up=all(row[name] is not None for row in ledger for name in COUNTS)
        and _sum(ledger, "seen") + _sum(ledger, "failed") == _sum(ledger, "expected"),
        odd=_odd(ledger),
    )


def _counts(rows: Sequence[Row]) -> list[str]:
    shards = {row["shard"]: row["expected"] or 0 for row in rows}
    sums = [_sum(rows, name) for name in (*COUNTS, "duplicates")]
    return [f"{count:,}" for count in (len(shards), sum(shards.values()), len({row["bank_key"] for row in rows}), *sums)]


def _sum(rows: Sequence[Row], column: str) -> int:
    """Sum of a column of counts; a value that a table of another version lacks counts as 0."""
    return sum(row[column] or 0 for row in rows)


def _odd(ledger: Iterable[Row]) -> list[list[str]]:
    """Shards that are not ok: each of their reasons once, with the number of banks that met it."""
    met: Counter[tuple[str, ...]] = Counter()
    for row in ledger:
        if row["status"] == "ok":
            continue
        for why, affected in (parsed(row["reasons"]) or {"no reason was recorded": []}).items():
            detail = ", ".join(map(str, affected)) if isinstance(affected, list) else str(affected)
            met[row["dataset"], row["split"], row["shard"], row["status"], why, detail] += 1
    return [[*key[:4], str(banks), *key[4:]] for key, banks in met.items()]


@dataclass(frozen=True, kw_only=True)
class StudyLine:
    """The choice of one study's search."""

    name: Name
    task: str
    readout: str
    lr: str
    edge: str
    """Where the chosen rate lies at an end of the rates that the study tried; else empty."""
    tried: str
    failed: str
    selected_on: str
    selection_value: str
    seconds: str
    images_per_second: str


def study_lines(board: Board, palette: Palette, trials: Sequence[Row]) -> list[StudyLine]:
    named = titles(board.columns)
    heads: dict[tuple[str, str, str | None], list[Row]] = {}
    for trial in trials:
        heads.setdefault((trial["encoder"], trial["task"], trial["protocol"]), []).append(trial)
    lines = []
    for column in board.columns:
        for encoder in board.encoders:
            row = board.cells.get((encoder, column))
            if row is not None:
                task = " · ".join(word for word in named[column] if word)
                lines.append(_study_line(row, heads.get((encoder, column.task, column.protocol), []), name(encoder, palette), task))
    return lines


def _study_line(row: Row, heads: Sequence[Row], encoder: Name, task: str) -> StudyLine:
    lr = parsed(row["hyperparameters"]).get("lr")
    edge = edge_of(lr, [head["lr"] for head in heads if head["lr"] is not None])
    chosen = [head for head in heads if head["readout"] == row["readout"] and head["lr"] == lr and is_defined(head["val_value"])]
    failed = sum(not is_defined(head["val_value"]) for head in heads)
    return StudyLine(
        name=encoder,
        task=task,
        readout=row["readout"] or "–",
        lr=f"{lr:.3g}" if lr is not None else "–",
        edge=f"{edge} edge" if edge else "",
        tried=str(row["num_trials"] if row["num_trials"] is not None else "–"),
        failed=str(failed) if failed else "",
        selected_on=row["selected_on"] or "–",
        selection_value=number(chosen[0]["val_value"], chosen[0]["metric"]) if chosen else "–",
        seconds=f"{row['seconds']:.1f}" if is_defined(row["seconds"]) else "–",
        images_per_second=f"{row['images_per_second']:.0f}" if is_defined(row["images_per_second"]) else "–",
    )


@dataclass(frozen=True, kw_only=True)
class SelectionSummary:
    """What heads were chosen on."""

    splits: Sequence[str]
    decided: Sequence[str]
    """Tasks where there was nothing to choose."""


def selection(results: Sequence[Row]) -> SelectionSummary:
    splits: dict[str, set[str]] = {}
    for row in results:
        if row["selected_on"]:
            splits.setdefault(row["task"], set()).add(row["selected_on"])
    return SelectionSummary(
        splits=sorted(set().union(*splits.values()) - {"nothing"}),
        decided=[task.rpartition("/")[2] for task, selected_on in splits.items() if selected_on == {"nothing"}],
    )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the numbers come from."""

    facts: Sequence[tuple[str, str]]
    encoders: Sequence[tuple[Name, str, str, str]]
    """Name, millions of parameters, SHA-256 of the weights, preprocessing and where it comes from."""
    protocols: Sequence[tuple[str, str, str, str, Sequence[tuple[str, str]]]]
    """Task, protocol, view, probe, fields."""
    banks: Sequence[tuple[str, str, str]]
    """Encoder, task, keys."""
    versions: Sequence[tuple[str, str]] = field(default_factory=tuple)


def provenance(results: Sequence[Row], palette: Palette, described: Mapping[str, Mapping[str, Any]]) -> Provenance:
    """`described` holds the facts about the run's encoders, as in encoders.json."""
    encoders = {row["encoder"]: row for row in results}
    protocols = {(row["task"], row["protocol"], row["protocol_fields"], row["view"], row["probe"]): None for row in results}
    banks = {(row["encoder"], row["task"], ", ".join(row["bank_keys"] or ())): None for row in results}
    versions = {(package, str(number)) for row in results for package, number in parsed(row["versions"]).items()}
    dates = _distinct(results, "created_at")
    return Provenance(
        facts=[
            ("run", ", ".join(_distinct(results, "run_id"))),
            ("scored", f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else ", ".join(dates)),
            ("device", ", ".join(_distinct(results, "device"))),
            ("precision", _precisions(results)),
            (
                "data sets",
                ", ".join(f"{dataset[0]} {dataset[1]}" for dataset in sorted({(row["dataset"], str(row["dataset_version"])) for row in results})),
            ),
            ("search seed", ", ".join(_distinct(results, "seed"))),
            ("git commit", ", ".join(_distinct(results, "git_commit")) or "not run from a checkout"),
        ],
        encoders=[
            (
                name(encoder, palette),
                f"{row['params_m']:.1f}" if is_defined(row["params_m"]) else "–",
                row["weights_sha256"] or "–",
                _preprocessing(described.get(encoder) or {}),
            )
            for encoder, row in encoders.items()
        ],
        protocols=[(task, str(protocol), str(view), str(probe), _fields(fields)) for task, protocol, fields, view, probe in protocols],
        banks=list(banks),
        versions=sorted(versions),
    )


def _preprocessing(encoder: Mapping[str, Any]) -> str:
    """How an encoder's images are prepared and where that comes from, in words; a dash where the run does not say."""
    values = encoder.get("preprocessing")
    if not values:
        return "–"
    mean, std = (" ".join(f"{value:.3f}" for value in values[name]) for name in ("mean", "std"))
    size = "×".join(map(str, values["size"]))
    source = encoder.get("preprocessing_source")
    return f"shorter side {values['resize']} ({values['interpolation']}), crop {size}, mean {mean}, std {std}" + (f"; {source}" if source else "")


def _precisions(results: Sequence[Row]) -> str:
    """The precision of most encoders, and the encoders with another one."""
    by_precision: dict[str, dict[str, None]] = {}
    for row in results:
        if row["precision"]:
            by_precision.setdefault(row["precision"], {})[row["encoder"]] = None
    first, *others = sorted(by_precision, key=lambda precision: -len(by_precision[precision])) or [""]
    return first + "".join(f", {other} for {', '.join(by_precision[other])}" for other in others)


def _fields(document: str | None) -> list[tuple[str, str]]:
    return [(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) for key, value in sorted(parsed(document).items())]


def _distinct(results: Sequence[Mapping[str, Any]], column: str) -> list[str]:
    return sorted({str(row[column]) for row in results if row[column] is not None})


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of the results, for the table of all metrics."""

    name: Name
    words: Sequence[str]
    """Task, protocol, metric, value, interval, items, failed samples, readout."""
    status: str
    reason: str


def records(results: Sequence[Row], palette: Palette) -> list[Record]:
    return [
        Record(
            name=name(row["encoder"], palette),
            words=[
                row["task"],
                row["protocol"] or "–",
                _metric(row["metric"]) or "–",
                number(row["value"], row["metric"]),
                interval(row["ci_low"], row["ci_high"], row["metric"]),
                f"{row['n']:,}" if row["n"] is not None else "–",
                f"{row['n_failed']:,}" if row["n_failed"] is not None else "–",
                row["readout"] or "–",
            ],
            status=status(row),
            reason=note(row) if status(row) == "ok" else reason(row),
        )
        for row in results
    ]


@dataclass(frozen=True, kw_only=True)
class PublishedLine:
    """A measured value beside the published one."""

    name: Name
    words: Sequence[str]
    """Task, protocol, metric, published, measured, interval, difference, interval of the difference."""
    source: str
    remarks: Sequence[int]
    """Numbers, from 1, of the table's remarks."""
    is_clear: bool
    """Whether the interval of the difference leaves zero out."""


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """Measured values beside published ones, in the order of the results: never a ranking."""

    lines: Sequence[PublishedLine]
    remarks: Sequence[str]
    apart: Sequence[tuple[Name, str, str]]
    """Encoder, task with protocol and metric, why the record stands beside no figure."""
    unknown: Sequence[str]


def published_table(comparison: Comparison, palette: Palette) -> PublishedTable:
    remarks: dict[str, int] = {}
    lines = []
    for match in comparison.beside:
        record, metric, shifted = match.record, match.figure.metric, match.interval
        lines.append(
            PublishedLine(
                name=name(record["encoder"], palette),
                words=[
                    record["task"],
                    record["protocol"],
                    _metric(metric),
                    number(match.figure.value, metric),
                    number(record["value"], metric),
                    interval(record["ci_low"], record["ci_high"], metric) or "no interval",
                    number(match.difference, metric, signed=True),
                    interval(*shifted, metric, signed=True) if shifted else "no interval",
                ],
                source=_source(match.figure),
                remarks=[remarks.setdefault(remark, len(remarks) + 1) for remark in match.remarks],
                is_clear=shifted is not None and not shifted[0] <= 0 <= shifted[1],
            )
        )
    apart = [
        (
            name(mismatch.record["encoder"], palette),
            f"{mismatch.record['task']} @ {mismatch.record['protocol']}, {mismatch.figure.metric}",
            "; ".join(mismatch.reasons),
        )
        for mismatch in comparison.apart
    ]
    return PublishedTable(lines=lines, remarks=list(remarks), apart=apart, unknown=[_unknown(figure) for figure in comparison.unknown])


def _source(figure: Published) -> str:
    return f"{figure.paper} (arXiv {figure.arxiv}), {figure.place}"


def _unknown(figure: Published) -> str:
    words = (figure.encoder, " or ".join(figure.tasks), "/".join(figure.readouts), figure.metric)
    return f"{', '.join(word for word in words if word)}: {figure.status}{f' ({figure.note})' if figure.note else ''}; {figure.paper}"
