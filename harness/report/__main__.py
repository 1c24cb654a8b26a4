"""`python -m harness.report DIR`: draw the report of a run again, or with `--explain ENCODER TASK` show where a record comes from.

Exit status: 0 success; 1 nothing could be written, or a value is not what its predictions give; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.command import OK, PARTIAL, Parser, default_cache, run_command
from harness.config import resolve_path
from harness.report.explain import explain
from harness.report.page import write_report
from harness.report.run import read_run
from harness.report.terminal import terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the page; the exit status."""
    parser = Parser(prog="python -m harness.report", description="Draw the report of a run again.", allow_abbrev=False)
    parser.add_argument("dir", metavar="DIR", type=Path, help="the folder that python -m harness.sweep wrote")
    parser.add_argument("--shards", metavar="DIR", help="where the data sets are now (default: as the run's sweep.yaml says)")
    parser.add_argument(
        "--explain",
        nargs=2,
        metavar=("ENCODER", "TASK"),
        help="draw nothing; print what a record rests on, down to its shards, and recompute its value; TASK may be TASK@PROTOCOL",
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="with --explain: where the run's feature banks are (default: as python -m harness.sweep has it)"
    )
    return run_command(parser, arguments, _run, out=lambda options: vars(options).get("dir"))


def _run(options: argparse.Namespace) -> int:
    return _draw(options) if options.explain is None else _explain(options)


def _explain(options: argparse.Namespace) -> int:
    cache = resolve_path(options.cache, Path.cwd()) if options.cache else str(default_cache())
    encoder, task = options.explain
    explanation = explain(read_run(options.dir), encoder, task, cache)
    print("\n".join(explanation.lines))
    return PARTIAL if explanation.differs else OK


def _draw(options: argparse.Namespace) -> int:
    run = read_run(options.dir)
    page = write_report(options.dir, shards=options.shards or run.shards)
    terminal(run.results, Console())
    print(f"report: {page}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
