"""`python -m bench`: measure, print the table, write bench/results/<date>-<machine>.json.

Each benchmark runs in a process of its own, so that neither threads nor memory of one are another's. Exit status: 0 all were measured; 1 one failed
or the time was over; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.machine import commit, machine, versions
from bench.results import FOLDER, Measurement, save
from bench.rows import table
from bench.running import benchmarks, chosen, in_process
from harness.command import OK, PARTIAL, Parser, run_command
from harness.errors import RequestError

MINUTES = 90.0
"""Time of all benchmarks together, after which what is left is not measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for; the exit status."""
    return run_command(_parser(), arguments, _run)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench", description="Time the harness against lower bounds and against its peers.", allow_abbrev=False)
    parser.add_argument("--only", metavar="NAME", action="append", default=[], help=f"one of {', '.join(benchmarks())}; may be given several times")
    parser.add_argument("--gpu", action="store_true", help="only what needs a GPU")
    parser.add_argument("--tiny", action="store_true", help="at a size at which a ratio says nothing, to see that all run; writes no results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all together (default: %(default)g)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=FOLDER, help="where the results go (default: bench/results)")
    return parser


def _run(options: argparse.Namespace) -> int:
    deadline, about, installed, revision = time.monotonic() + 60 * options.minutes, machine(), versions(), commit()
    if options.gpu and about["gpu"] is None:
        raise RequestError("--gpu: expected a CUDA GPU, got none; run it on a machine that has one")
    print(f"{about['processor']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['gpu'] or 'no GPU'}")
    print(", ".join(f"{package} {number}" for package, number in installed.items()))
    failed, measured = False, []
    for name in chosen(options.only, gpu=options.gpu):
        started = time.monotonic()
        rows, reason = in_process(name, tiny=options.tiny, seconds=deadline - started)
        if reason:
            print(f"{name}: {reason}", file=sys.stderr)
            failed = True
            continue
        print(f"\n{name}, {time.monotonic() - started:.0f} s\n{table(rows)}", flush=True)
        today = datetime.now(UTC).date().isoformat()
        measured.append(
            Measurement(
                benchmark=name,
                date=today,
                commit=revision,
                machine=about,
                versions=installed,
                seconds=time.monotonic() - started,
                rows=tuple(rows),
            )
        )
        if not options.tiny:
            print(save(measured[-1:], options.out))
    return PARTIAL if failed else OK


if __name__ == "__main__":
    sys.exit(main())
