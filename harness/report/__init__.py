"""A run's tables as a terminal table, figures and one self-contained HTML page. Reads the run's folder and computes no score again."""

from __future__ import annotations

from harness.report.page import write_report
from harness.report.terminal import terminal

__all__ = ["terminal", "write_report"]
