"""Paired differences: how far one encoder is ahead of another on the same images, for columns whose rows may be ranked together.

A difference's interval is the percentile bootstrap of `harness.metrics.bootstrap.paired_interval`: both encoders see the same draws of images. It
is much tighter than two separate intervals where the same images are hard for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.core import Predictions
from harness.errors import ProbeError
from harness.metrics.bootstrap import Interval, paired_interval
from harness.probes import all_metrics
from harness.report.board import Board, Column
from harness.report.run import Run

ALL_PAIRS = 5
"""Up to this many encoders all pairs are compared; above it, each encoder with the best one and with its random twin."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first encoder's value less the second's."""

    first: str
    second: str
    estimate: Interval

    def turned(self) -> Difference:
        """The second's value less the first's: percentiles of the negated draws are the negated percentiles."""
        value, low, high = (None if bound is None else -bound for bound in (self.estimate.value, self.estimate.high, self.estimate.low))
        return Difference(first=self.second, second=self.first, estimate=replace(self.estimate, value=value, low=low, high=high))

    @property
    def is_clear(self) -> bool:
        """Whether the 95 % interval leaves zero out."""
        low, high = self.estimate.low, self.estimate.high
        return low is not None and high is not None and (low > 0 or high < 0)


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """One column's differences, or why it has none."""

    column: Column
    encoders: tuple[str, ...] = ()
    """Those that could be compared, the best first."""
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, first: str, second: str) -> Difference | None:
        """The difference first less second, whichever is ahead; None where they were not compared."""
        for difference in self.differences:
            if (difference.first, difference.second) == (first, second):
                return difference
            if (difference.first, difference.second) == (second, first):
                return difference.turned()
        return None

    def level_with_best(self) -> frozenset[str]:
        """Encoders whose difference to the best one is not clear."""
        return frozenset(difference.second for difference in self.differences if difference.first == self.encoders[0] and not difference.is_clear)


def compare(run: Run, board: Board, twins: Mapping[str, str | None]) -> list[Comparisons]:
    """For every column with two rows that may be ranked together, their paired differences."""
    return [_compare(run, board, column, twins) for column in board.columns if len(board.ranked(column)) > 1]


def shows_all_pairs(board: Board) -> bool:
    return len(board.encoders) <= ALL_PAIRS


def _compare(run: Run, board: Board, column: Column, twins: Mapping[str, str | None]) -> Comparisons:
    ranked = board.ranked(column)
    tables: dict[str, Predictions] = {}
    notes = []
    for row in ranked:
        table = run.predictions(row["encoder"], column.task, column.protocol)
        if table is None or not len(table):
            notes.append(f"{row['encoder']}: its predictions were not kept")
        else:
            tables[row["encoder"]] = table
    values = {row["encoder"]: row["value"] for row in ranked}
    encoders = tuple(row["encoder"] for row in ranked if row["encoder"] in tables)
    differences = []
    for ahead, behind in _chosen_pairs(encoders, twins, everyone=shows_all_pairs(board)):
        try:
            estimate = _difference(column.metric, tables[ahead], tables[behind])
        except ProbeError as error:
            notes.append(f"{ahead} and {behind}: {error}")
            continue
        if estimate.value is None or abs(estimate.value - (values[ahead] - values[behind])) > _ROUNDING:
            notes.append(f"{ahead} and {behind}: the predictions do not give the values of the results; these tables are of different runs")
            continue
        differences.append(Difference(first=ahead, second=behind, estimate=estimate))
    return Comparisons(column=column, encoders=encoders, differences=tuple(differences), notes=tuple(notes))


def _chosen_pairs(encoders: Sequence[str], twins: Mapping[str, str | None], *, everyone: bool) -> list[tuple[str, str]]:
    """(better, worse) pairs of `encoders`, which are sorted with the best first."""
    pairs = [(ahead, behind) for i, ahead in enumerate(encoders) for behind in encoders[i + 1 :]]
    if everyone:
        return pairs
    return [pair for pair in pairs if pair[0] == encoders[0] or twins.get(pair[0]) == pair[1] or twins.get(pair[1]) == pair[0]]


def _difference(metric: str | None, first: Predictions, second: Predictions) -> Interval:
    if metric not in all_metrics():
        raise ProbeError(f"metric: expected one of {', '.join(all_metrics())}, got {metric!r}")
    classes = 1 + max(int(values.max()) for table in (first, second) for values in (table.targets, table.predictions))
    return paired_interval(all_metrics()[metric], first, second, max(classes, 1))
