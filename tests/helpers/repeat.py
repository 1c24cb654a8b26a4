"""`python tests/helpers/repeat.py --times 30 [--busy] TEST`: run a test again and again, until it fails once.

Exit status: 0 it passed every time; that of pytest where it did not, with the output of the run that failed; 2 no test is named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPIN = "while True: pass"


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """Processes that do nothing but compute, at the priority of everything else."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def repeat(tests: Sequence[str], times: int) -> int:
    """The status of the first run that fails, else 0."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", *tests]
    for number in range(1, times + 1):
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(f"{number}/{times}: {'passed' if done.returncode == 0 else 'failed'}, {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            print(done.stdout)
            return done.returncode
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run tests again and again, until one fails.")
    parser.add_argument("tests", nargs="+", metavar="TEST", help="as pytest takes them: tests/test_x.py::test_y")
    parser.add_argument("--times", type=int, default=30, metavar="N")
    parser.add_argument("--busy", action="store_true", help="beside as many processes that compute as there are cores")
    options = parser.parse_args(arguments)
    with hogs((os.cpu_count() or 1) if options.busy else 0):
        return repeat(options.tests, options.times)


if __name__ == "__main__":
    sys.exit(main())
