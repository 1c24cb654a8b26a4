"""Overrides of protocol fields: of every task that has them, and of one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import load_sweep
from harness.tasks import select
from tests.helpers import tiny

TASKS = ["tiny/dropped-tokens", "tiny/misplaced-tokens", "tiny/shuffled-patches"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.build(tmp_path_factory.mktemp("overrides"), splits={"test": 3}).parent)


def points(shards: str, overrides: dict[str, Any], field: str) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for task in select(TASKS, shards, overrides)[0]:
        found.setdefault(task.name.partition("/")[2], set()).add(task.protocol.fields.get(field))
    return found


def test_a_shared_override_is_for_every_task_that_has_the_field(shards: str) -> None:
    found = points(shards, {"kept_shares": [0.5]}, "kept_share")
    assert found == {"dropped-tokens": {0.5}, "misplaced-tokens": {0.5}, "shuffled-patches": {None}}


def test_an_override_of_one_task_goes_before_the_shared_one_and_leaves_the_others_alone(shards: str) -> None:
    found = points(shards, {"kept_shares": [0.5], "misplaced-tokens": {"kept_shares": [0.25, 0.75]}}, "kept_share")
    assert found == {"dropped-tokens": {0.5}, "misplaced-tokens": {0.25, 0.75}, "shuffled-patches": {None}}


def test_the_command_line_can_name_a_task_too(shards: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(Path(shards), tasks=TASKS, protocol={}))
    sweep = load_sweep(tmp_path / "sweep.yaml", ["protocol.misplaced-tokens.kept_shares=[0.25]"])
    assert points(shards, sweep.protocol, "kept_share")["misplaced-tokens"] == {0.25}
