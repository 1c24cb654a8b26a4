"""The atomic writing of tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import RunError
from harness.tables import publish


def test_a_name_that_the_file_system_refuses_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 400)
    with pytest.raises(RunError, match=r"cannot write .*File name too long"), publish(path) as temporary:
        temporary.write_bytes(b"")
