"""What the commands have in common: whatever is wrong is told in one line on stderr."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from harness.errors import HarnessError, RequestError


class Parser(argparse.ArgumentParser):
    """Raises RequestError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; --help lists what there is")


def complain(error: HarnessError) -> None:
    print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
