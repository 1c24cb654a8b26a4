"""Overrides of protocol fields: for every task that has them, and for a single task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import load_sweep
from harness.errors import RequestError
from harness.tasks import select
from tests.helpers import tiny

TASKS = ["tiny/dropped-tokens", "tiny/misplaced-tokens", "tiny/shuffled-patches"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.build(tmp_path_factory.mktemp("overrides"), splits={"test": 3}).parent)


def points(shards: str, overrides: dict[str, Any], field: str) -> dict[str, set[Any]]:
    values: dict[str, set[Any]] = {}
    for task in select(TASKS, shards, overrides)[0]:
        values.setdefault(task.name.partition("/")[2], set()).add(dict(task.protocol.fields).get(field))
    return values


def test_a_shared_override_is_for_every_task_that_has_the_field(shards: str) -> None:
    shares = points(shards, {"kept_shares": [0.5]}, "kept_share")
    assert shares == {"dropped-tokens": {0.5}, "misplaced-tokens": {0.5}, "shuffled-patches": {None}}


def test_an_override_of_one_task_goes_before_the_shared_one_and_leaves_the_others_alone(shards: str) -> None:
    shares = points(shards, {"kept_shares": [0.5], "misplaced-tokens": {"kept_shares": [0.25, 0.75]}}, "kept_share")
    assert shares == {"dropped-tokens": {0.5}, "misplaced-tokens": {0.25, 0.75}, "shuffled-patches": {None}}


def test_the_command_line_can_name_a_task_too(shards: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(Path(shards), tasks=TASKS, protocol={}))
    sweep = load_sweep(tmp_path / "sweep.yaml", ["protocol.misplaced-tokens.kept_shares=[0.25]"])
    assert points(shards, sweep.protocol, "kept_share")["misplaced-tokens"] == {0.25}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kept_share": 0.5}, "no task of these data sets has this field; did you mean 'kept_shares'"),
        ({"dropped-tokens": {"theta": 0.5}}, "protocol.dropped-tokens.theta: dropped-tokens has no such field"),
        ({"dropped-tokens": {"kept_shares": ["half"]}}, "protocol.kept_shares.0: expected a valid number, got 'half'"),
        ({"misplaced-tokens": {"readouts": ["cls"]}}, "protocol.misplaced-tokens.readouts: misplaced-tokens has no such field"),
        ({"thetas": [0.2, 1.0]}, "protocol.thetas.1: expected less than 1, got 1.0"),
        ({"grids": []}, "protocol.grids: expected at least one, got an empty list"),
    ],
)
def test_what_cannot_be_overridden_is_said_in_one_line(shards: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        select(TASKS, shards, overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_value_and_integers_are_taken_as_the_field_has_them(shards: str) -> None:
    shares = points(shards, {"kept_shares": 1, "grids": 4, "blocks": -2}, "kept_share")
    assert shares["dropped-tokens"] == {1.0}
    assert all(isinstance(share, float) for share in shares["dropped-tokens"])
    assert points(shards, {"grids": 4}, "grid")["shuffled-patches"] == {4}
    assert points(shards, {"blocks": -2}, "readouts")["misplaced-tokens"] == {("tokens@-2",)}
