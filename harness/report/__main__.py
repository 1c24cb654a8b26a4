"""`python -m harness.report DIR`: draw the report of a run again. Exit status: 0 written; 1 it could not be written; 2 the request was wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.command import OK, Parser, run_command
from harness.report.page import write_report
from harness.report.run import read_run
from harness.report.terminal import terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the page; the exit status."""
    parser = Parser(prog="python -m harness.report", description="Draw the report of a run again.", allow_abbrev=False)
    parser.add_argument("dir", metavar="DIR", type=Path, help="the folder that python -m harness.sweep wrote")
    parser.add_argument("--shards", metavar="DIR", help="where the data sets are now (default: as the run's sweep.yaml says)")
    return run_command(parser, arguments, _draw, out=lambda options: vars(options).get("dir"))


def _draw(options: argparse.Namespace) -> int:
    run = read_run(options.dir)
    page = write_report(options.dir, shards=options.shards or run.shards)
    terminal(run.results, Console())
    print(f"report: {page}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
