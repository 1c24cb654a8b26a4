"""Tables to a terminal table, figures and one HTML page that needs nothing else. Reads a run's folder, and computes no score anew."""

from __future__ import annotations

from harness.report.page import write_report
from harness.report.terminal import terminal

__all__ = ["terminal", "write_report"]
