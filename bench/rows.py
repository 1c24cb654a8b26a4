"""What a benchmark comes to: rows, each a ratio and its target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

NOT_MEASURED = "not measured"
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. Without a ratio it was not measured, and `reason` says why."""

    row: str
    """Names the row among all rows of all benchmarks."""
    what: str
    against: str
    ratio: float | None
    """What was measured over what it is compared with."""
    target: float | None
    """The ratio that is to be reached; None where a row is shown for comparison alone."""
    lower_is_better: bool
    measured: Mapping[str, float] = field(default_factory=dict)
    """Name, with its unit, to seconds, rates or bytes."""
    reason: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; None where there is no ratio or no target."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target if self.lower_is_better else self.ratio >= self.target

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers to four significant digits. Raises ValueError for a ratio that is no finite number."""
        if self.ratio is not None and not math.isfinite(self.ratio):
            raise ValueError(f"{self.row}: expected a finite ratio, got {self.ratio}")
        plain = asdict(self)
        plain["ratio"] = None if self.ratio is None else rounded(self.ratio)
        plain["measured"] = {name: rounded(value) for name, value in self.measured.items()}
        return plain

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Row:
        return Row(**{name: plain[name] for name in Row.__dataclass_fields__ if name in plain})


def not_measured(row: str, reason: str, *, what: str = "", against: str = "", target: float | None = None, lower_is_better: bool = True) -> Row:
    """A row without a ratio."""
    return Row(row=row, what=what, against=against, ratio=None, target=target, lower_is_better=lower_is_better, reason=reason)


def rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def ratio_text(row: Row) -> str:
    return NOT_MEASURED if row.ratio is None else f"{row.ratio:.3g}"


def target_text(row: Row) -> str:
    return "–" if row.target is None else f"{'≤' if row.lower_is_better else '≥'} {row.target:g}"


def verdict_text(row: Row) -> str:
    return {True: "met", False: "missed", None: "–"}[row.is_met]


def table(rows: Sequence[Row]) -> str:
    """Rows for a terminal: name, ratio, target, whether it is met, and what was compared with what."""
    lines = [("row", "ratio", "target", "", "what")]
    for row in rows:
        about = row.reason if row.ratio is None else f"{row.what} / {row.against}"
        lines.append((row.row, ratio_text(row), target_text(row), verdict_text(row), about))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip() for line in lines)
