"""Damaged data ends in a value, a loss with a name or a refusal in one line, and the fuzzer would notice if it did not."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.data.shards import attempt
from harness.errors import SampleError, ShardError
from tests.helpers import fuzz


@pytest.mark.slow
def test_two_thousand_mutations_end_in_a_value_or_in_words() -> None:
    command = [sys.executable, "-m", "tests.helpers.fuzz", "--mutations", "2000"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_seed_fixes_every_mutation() -> None:
    for damage, seeds in ((fuzz.damaged_picture, [fuzz.LABELS]), (fuzz.restructured, fuzz.annotations()), (fuzz.damaged_tar, fuzz.archives())):
        made = [damage(seeds, random.Random(f"0/{index}")) for index in range(20)]
        assert made == [damage(seeds, random.Random(f"0/{index}")) for index in range(20)]
        assert len(set(made)) > 10
        assert made != [damage(seeds, random.Random(f"1/{index}")) for index in range(20)]


def failing(error: Exception) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job


def test_a_loss_without_a_name_is_a_fault() -> None:
    assert fuzz.outcome_of(attempt(failing(ShardError("broken image")))) == "lost: broken image"
    assert fuzz.outcome_of(attempt(failing(SampleError("too large: 9", reason="too large")))) == "lost: too large"
    for error in (ZeroDivisionError("x"), MemoryError(), fuzz.Fault("an input of another size")):
        with pytest.raises(fuzz.Fault):
            fuzz.outcome_of(attempt(failing(error)))


@pytest.mark.parametrize("message", ["two\nlines", "", "x" * 3000, "\x1b[31m"])
def test_a_message_that_is_no_line_is_a_fault(message: str) -> None:
    with pytest.raises(fuzz.Fault):
        fuzz.one_line(message)


def test_what_a_reader_raises_is_a_fault_and_the_others_are_read(tmp_path: Path) -> None:
    def read(data: bytes) -> str:
        if data.startswith(b"b"):
            raise KeyError("missing")
        return "sample"

    target = fuzz.Target(seeds=[b"a", b"b"], read=read, share=100, damage=lambda seeds, rng: rng.choice(seeds))
    with (tmp_path / "here").open("w") as here:
        outcomes, faults = fuzz.run("letters", target, 0, range(20), here.fileno())
    assert outcomes["sample"] + len(faults) == 20
    assert faults[0].endswith("KeyError: 'missing'")


def test_undamaged_inputs_are_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "WORK", tmp_path)
    fuzz.lay_out_coco()
    for name, target in fuzz.targets().items():
        outcomes = [target.read(seed) for seed in target.seeds]
        assert {outcome for outcome in outcomes if "range" not in outcome} == {"sample"}, name
