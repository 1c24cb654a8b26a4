"""Proposals are a function of the history alone, selection of the scores alone, and the search of Ray Tune's Tuner."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.search import Searcher

from harness.cluster import tuner as search
from harness.cluster.tuner import MAX_FAILURES, Losses, Proposer, StudyTrial
from harness.core import Fields
from harness.errors import BankError, ProbeError, RunError
from harness.features.bank import BankSpec
from harness.features.device import device_type
from harness.search import steps
from harness.search.halving import RungJob
from harness.search.journal import Journal
from harness.search.propose import HeadScore, choose, first_rates, propose
from harness.search.runner import Runner
from harness.search.state import StudyState
from harness.search.study import BankRef, Round, Score, Study

READOUTS = ("cls", "mean")


def head(lr: float | None, value: float | None, readout: str = "cls", number: int = 0, round_index: int = 0) -> HeadScore:
    return HeadScore(round=round_index, head=number, lr=lr, readout=readout, value=value)


def off(lr: float) -> float:
    """How many powers of ten `lr` is from the best rate, 0.1."""
    return abs(math.log10(lr) + 1)


def history() -> list[HeadScore]:
    rates = first_rates(1e-3, 10.0, 8)
    return [head(lr, 1 - off(lr) / 4, readout, number) for number, (readout, lr) in enumerate((r, lr) for r in READOUTS for lr in rates)]


def ask(scores: list[HeadScore], *, round_index: int = 1, seed: int = 0, study: str = "a") -> list[tuple[str, float]]:
    return propose(study=study, seed=seed, round_index=round_index, history=scores, readouts=READOUTS, stack=8, lr=(1e-3, 10.0))


def test_the_first_round_cuts_the_log_range_evenly() -> None:
    rates = first_rates(1e-3, 10.0, 4)
    assert rates == pytest.approx([10**-2.5, 10**-1.5, 10**-0.5, 10**0.5])
    assert ask([], round_index=0) == [(readout, rate) for readout in READOUTS for rate in first_rates(1e-3, 10.0, 8)]


def test_one_allowed_rate_is_always_that_rate() -> None:
    proposals = propose(study="a", seed=0, round_index=3, history=history(), readouts=("cls",), stack=2, lr=(0.5, 0.5))
    assert [rate for _, rate in proposals] == pytest.approx([0.5, 0.5])


def test_proposals_repeat_and_depend_on_seed_study_round_and_history() -> None:
    base = ask(history())
    assert base == ask(history())
    assert all(1e-3 <= rate <= 10 for _, rate in base)
    assert len({rate for _, rate in base}) == len(base)
    others = [ask(history(), seed=1), ask(history(), study="b"), ask(history(), round_index=2), ask([head(s.lr, 0.0, s.readout) for s in history()])]
    assert all(base != other for other in others)


def test_later_rounds_look_where_it_was_good() -> None:
    scores, proposed = history(), []
    for round_index in range(1, 4):
        proposed = ask(scores, round_index=round_index)
        scores += [head(rate, 1 - off(rate) / 4, readout) for readout, rate in proposed]
    distances = sorted(off(rate) for _, rate in proposed)
    even = sorted(off(rate) for rate in first_rates(1e-3, 10.0, len(distances)))
    assert distances[len(distances) // 2] < even[len(even) // 2] / 1.5


def test_failed_heads_are_no_obstacle() -> None:
    failed = [head(score.lr, None, score.readout) for score in history()]
    assert len(ask(failed)) == 16


def test_the_best_value_is_chosen_and_failed_heads_never() -> None:
    assert choose([head(0.1, 0.5), head(0.2, 0.7), head(0.3, None)], READOUTS) == head(0.2, 0.7)
    assert choose([head(0.1, None)], READOUTS) is None
    assert choose([], READOUTS) is None


def test_of_tied_heads_the_middle_of_the_plateau_of_the_first_readout_is_chosen() -> None:
    tied = [head(lr, 0.9, readout) for readout in ("mean", "cls") for lr in (1.0, 0.01, 0.1, 3.0)]
    for order in range(5):
        random.Random(order).shuffle(tied)
        assert choose(tied, READOUTS) == head(0.1, 0.9, "cls")


def test_a_search_waits_for_a_node_that_fits_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now, nodes = [0.0], list[dict[str, Any]]()
    monkeypatch.setattr(search.ray, "nodes", lambda: nodes)
    fits = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
    callback = search.Nodes(cpus=2, gpus=0.5, timeout=60.0, clock=lambda: now[0])

    def look(at: float, *present: dict[str, Any]) -> None:
        now[0], nodes[:] = at, present
        callback.on_step_begin(0, [])

    look(50, fits)
    look(100, {**fits, "Alive": False})
    look(110, fits)
    look(170, {"Alive": True, "Resources": {}})
    look(170.5)
    with pytest.raises(RunError, match=r"no node could run a trial for 60 s: expected one with 2 CPUs and 0.5 GPUs, got none that is alive; "):
        look(171)
    look(172, fits)
    look(232, {"Alive": True, "Resources": {"CPU": 4.0}})
    with pytest.raises(RunError, match="got 4 CPUs and 0 GPUs; 1 CPUs and 1 GPUs; look at"):
        look(233, {"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 1.0, "GPU": 1.0}})


def study(name: str, trials: int = 2, probe: str = "linear", lr: tuple[float, ...] = (0.01, 1.0)) -> Study:
    return Study(
        name=name,
        probe=probe,
        metrics=("accuracy",),
        classes=3,
        protocol=Fields(),
        readouts=("cls",),
        train={},
        val={},
        holds_out=False,
        trials=trials,
        stack=2,
        lr=lr,
        seed=0,
        contents="",
    )


def test_where_lower_is_better_the_merit_of_a_head_is_the_negative_of_its_value() -> None:
    sums = np.array([3.0, 4.0])
    assert study("a").merit(sums) == (0.75, None)
    by_bce = replace(study("a"), metrics=("AUROC", "bce"), chosen_by="bce")
    assert by_bce.merit(sums) == (-0.75, None)
    assert by_bce.merit(np.zeros(2)) == (None, "bce is undefined on the selection split")
    assert by_bce.id != study("a").id


def test_more_than_two_rates_are_tried_as_they_are_in_one_round() -> None:
    state = StudyState(study=study("a", trials=4, lr=(0.1, 1e-5, 3.0, 0.2)), test={})
    assert state.planned_rounds == 1
    assert state.next_step() == steps.Fit(round=0, proposals=(("cls", 0.1), ("cls", 1e-5), ("cls", 3.0), ("cls", 0.2)))


def finish(proposer: Proposer, trial: str, config: dict, value: float = 0.5) -> None:
    step = steps.from_plain(config["step"])
    if isinstance(step, steps.Score):
        outcome: Round | Score = Score(head=step.chosen, values=(), n=1, seconds=0.0)
    else:
        heads = tuple(head(lr, value, readout, number, step.round) for number, (readout, lr) in enumerate(step.proposals))
        outcome = Round(index=step.round, heads=heads, seconds=0.0)
    proposer.on_trial_complete(trial, {"payload": outcome.to_json()})


def test_a_study_has_at_most_one_unfinished_trial_and_is_scored_once_at_its_end() -> None:
    states = [StudyState(study=study(name), test={}) for name in "ab"]
    steps = []
    proposer = Proposer(states, lambda state: steps.append(state.study.name))
    first, second = proposer.suggest("1"), proposer.suggest("2")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert {first["study"], second["study"]} == {0, 1}
    assert proposer.suggest("3") is None, "both studies are busy"
    finish(proposer, "2", second)
    third = proposer.suggest("4")
    assert isinstance(third, dict)
    assert (third["study"], third["step"]["round"]) == (1, 1)
    finish(proposer, "1", first)
    finish(proposer, "4", third)
    trial = 5
    while isinstance(config := proposer.suggest(str(trial)), dict):
        finish(proposer, str(trial), config)
        trial += 1
    assert config == Searcher.FINISHED
    assert all(len(state.rounds) == 2 and state.score is not None for state in states)
    assert len(steps) == 6, "two rounds and a score for each study"


def test_what_is_proposed_does_not_depend_on_who_finishes_first() -> None:
    def run(last_first: bool) -> list[list[HeadScore]]:
        states = [StudyState(study=study(name, trials=3), test={}) for name in "abc"]
        proposer = Proposer(states, lambda _: None)
        running: list[tuple[str, dict]] = []
        number = 0
        while True:
            config = proposer.suggest(str(number))
            if isinstance(config, dict):
                running.append((str(number), config))
                number += 1
            elif config == Searcher.FINISHED:
                return [state.heads for state in states]
            else:
                finish(proposer, *running.pop(-1 if last_first else 0))

    assert run(True) == run(False)


@pytest.mark.parametrize(
    "step",
    [
        steps.Fit(round=1, proposals=(("cls", 0.1), ("mean@-3", 1 / 3))),
        steps.Fit(round=0, proposals=(("cls", None),)),
        steps.Rung(round=0, proposals=(("mean", 1e-3), ("mean", 1e-5)), job=RungJob(head=1, rung=0, epochs=2)),
        steps.Score(chosen=replace(head(1 / 3, 0.7), epochs=4)),
    ],
)
def test_a_step_goes_through_json_and_comes_back_as_it_was(step: steps.Step) -> None:
    again = steps.from_plain(json.loads(json.dumps(steps.to_plain(step))))
    assert again == step
    assert hash(again) == hash(step)


def test_a_step_of_no_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a step of kind fit, rung or score, got 'rest'"):
        steps.from_plain({"kind": "rest", "round": 0, "proposals": []})


def test_a_trial_that_is_lost_for_good_fails_its_study_alone() -> None:
    proposer = Proposer([StudyState(study=study(name), test={}) for name in "ab"], lambda _: None)
    lost = proposer.suggest("1")
    assert isinstance(lost, dict)
    proposer.on_trial_complete("1", None, error=True)
    assert list(proposer.errors) == [lost["study"]]
    following = proposer.suggest("2")
    assert isinstance(following, dict)
    assert following["study"] != lost["study"]


def test_a_study_that_cannot_be_done_tells_why_and_is_not_tried_again() -> None:
    proposer = Proposer([StudyState(study=study("a"), test={})], lambda _: None)
    assert isinstance(proposer.suggest("1"), dict)
    proposer.on_trial_complete("1", {"error": "bank x, a.tar: cannot be read", "done": True})
    assert proposer.errors == {0: "bank x, a.tar: cannot be read"}
    assert proposer.suggest("2") == Searcher.FINISHED


def step_of(device: str, tmp_path: Path) -> dict[str, Any]:
    trial = StudyTrial.__new__(StudyTrial)
    bank = BankSpec(dataset="x", split="test", shards=(("a.tar", "", 1),), readout="cls", view="v", identity=())
    step = steps.Score(chosen=head(None, 0.5))
    states = [(replace(study("a", probe="retrieval"), decided=True), {"cls": BankRef(bank=bank)})]
    trial.config = {"study": 0, "step": steps.to_plain(step)}
    trial.setup(trial.config, states=states, cache=str(tmp_path), gpu=False, threads=1, device_type=device)
    return trial.step()


def test_a_trial_gives_the_reason_of_what_it_cannot_do(tmp_path: Path) -> None:
    outcome = step_of(device_type(False), tmp_path)
    assert outcome["done"]
    assert "run the sweep again to encode this shard anew" in outcome["error"]


def test_a_trial_on_another_device_than_the_runs_is_refused(tmp_path: Path) -> None:
    outcome = step_of("NVIDIA H100 80GB HBM3", tmp_path)
    assert "expected every process of a run on NVIDIA H100 80GB HBM3, got cpu:" in outcome["error"]


def test_a_study_whose_heads_all_fail_ends_with_the_reason() -> None:
    state = StudyState(study=study("a", trials=1), test={})
    proposer = Proposer([state], lambda _: None)
    config = proposer.suggest("1")
    assert isinstance(config, dict)
    heads = tuple(HeadScore(round=0, head=0, lr=lr, readout=readout, value=None, error="diverged") for readout, lr in config["step"]["proposals"])
    proposer.on_trial_complete("1", {"payload": Round(index=0, heads=heads, seconds=0.0).to_json()})
    assert proposer.suggest("2") == Searcher.FINISHED
    assert state.score is not None
    assert state.score.error == "diverged"


def test_the_journal_brings_a_study_back_to_where_it_was(tmp_path: Path) -> None:
    state = StudyState(study=study("a"), test={})
    proposer = Proposer([state], Journal(tmp_path).save)
    for trial in range(2):
        config = proposer.suggest(str(trial))
        assert isinstance(config, dict)
        finish(proposer, str(trial), config)
    again = StudyState(study=study("a"), test={})
    Journal(tmp_path).load(again, lambda *_: True)
    assert again.rounds == state.rounds
    assert again.next_step() == state.next_step()
    without_heads = StudyState(study=study("a"), test={})
    Journal(tmp_path).load(without_heads, lambda *_: False)
    assert without_heads.rounds == [], "rounds whose heads the cache has lost are run again"
    other = StudyState(study=study("b"), test={})
    Journal(tmp_path).load(other, lambda *_: True)
    assert other.rounds == []


# --- what could not be done ---------------------------------------------------------------------------------------------------


def test_what_is_of_the_place_is_tried_again_some_times_and_then_fails_its_study_for_this_run() -> None:
    states = [StudyState(study=study(name), test={}) for name in "ab"]
    journalled: list[str] = []
    proposer = Proposer(states, lambda state: journalled.append(state.study.name))
    configs = []
    for trial in range(MAX_FAILURES + 1):
        config = proposer.suggest(str(trial))
        assert isinstance(config, dict)
        configs.append(config)
        proposer.on_trial_complete(str(trial), {"error": "OSError: [Errno 5] Input/output error", "again": True, "done": True})
    assert all(config == configs[0] for config in configs), "the same step again"
    assert proposer.errors == {0: f"gave up after {MAX_FAILURES + 1} attempts: OSError: [Errno 5] Input/output error"}
    following = proposer.suggest("next")
    assert isinstance(following, dict)
    assert following["study"] == 1
    assert journalled == []


def test_a_step_that_goes_well_at_the_second_try_is_as_if_at_the_first() -> None:
    values = []
    for failures in (0, 2):
        state = StudyState(study=study("a"), test={})
        proposer = Proposer([state], lambda _: None)
        trial = 0
        while isinstance(config := proposer.suggest(str(trial)), dict):
            if trial < failures:
                proposer.on_trial_complete(str(trial), {"error": "x", "again": True})
            else:
                finish(proposer, str(trial), config)
            trial += 1
        assert proposer.errors == {}
        values.append((state.heads, state.score))
    assert values[0] == values[1]


def test_an_unexpected_exception_keeps_its_traceback_and_is_not_tried_again(tmp_path: Path) -> None:
    state = StudyState(study=study("a"), test={})
    proposer = Proposer([state], lambda _: None, tmp_path)
    proposer.suggest("1")
    proposer.on_trial_complete("1", {"error": "TypeError: x", "traceback": "Traceback …\nTypeError: x\n", "done": True})
    assert proposer.errors == {0: f"TypeError: x; the traceback is in errors/{state.study.id}.txt"}
    assert (tmp_path / "errors" / f"{state.study.id}.txt").read_text() == "Traceback …\nTypeError: x\n"
    assert proposer.suggest("2") == Searcher.FINISHED


def test_a_lost_process_is_told_with_what_ray_says_of_it() -> None:
    class Trial:
        config: ClassVar = {"study": 0}

        def get_pickled_error(self) -> Exception:
            return RayActorError()

    proposer = Proposer([StudyState(study=study("a"), test={})], lambda _: None)
    proposer.suggest("1")
    proposer.on_trial_complete("1", None, error=True)
    Losses(proposer).on_trial_error(0, [], Trial())
    assert proposer.errors[0].startswith(f"the trial's process was lost {MAX_FAILURES + 1} times: RayActorError: The actor ")


def step_ending_in(error: Exception, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def run_round(*_: Any) -> Round:
        raise error

    monkeypatch.setattr(search.time, "sleep", lambda _: None)
    trial = StudyTrial.__new__(StudyTrial)
    trial.config = {"study": 0, "step": steps.to_plain(steps.Fit(round=0, proposals=(("cls", 0.1),)))}
    trial.setup(trial.config, states=[(study("a"), {})], cache="", gpu=False, threads=1, device_type=device_type(False))
    monkeypatch.setattr(Runner, "run_round", run_round)
    return trial.step()


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError(), BankError("a part is damaged"), TimeoutError("slow"), OutOfMemoryError("x")]
)
def test_a_step_says_that_it_may_go_better(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = step_ending_in(error, monkeypatch)
    assert (outcome["again"], outcome["done"], "payload" in outcome) == (True, True, False)
    assert str(error) in outcome["error"]


def test_a_step_that_met_a_fault_of_the_program_gives_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = step_ending_in(TypeError("two\nlines"), monkeypatch)
    assert outcome["error"] == "TypeError: two"
    assert "in run_round" in outcome["traceback"]
    assert "again" not in outcome


@pytest.mark.parametrize("error", [ProbeError("no rows"), RunError("another device")])
def test_a_step_that_has_an_answer_gives_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_ending_in(error, monkeypatch) == {"error": str(error), "done": True}


def bank_of(shard: str) -> BankRef:
    return BankRef(bank=BankSpec(dataset="x", split="train", shards=((shard, "", 1),), readout="cls", view="v", identity=()))


def test_a_bank_that_cannot_be_read_is_no_outcome_of_a_round(tmp_path: Path) -> None:
    lost = replace(study("a"), train={"cls": bank_of("a.tar")}, val={"cls": bank_of("b.tar")})
    with pytest.raises(BankError, match="run the sweep again"):
        Runner(str(tmp_path), gpu=False, threads=1).run_round(lost, 0, [("cls", 0.1)])
    assert not (tmp_path / "studies").exists()


def test_a_journal_that_was_cut_short_is_written_again(tmp_path: Path) -> None:
    state = StudyState(study=study("a"), test={})
    journal = Journal(tmp_path)
    proposer = Proposer([state], journal.save)
    for trial in range(2):
        finish(proposer, str(trial), proposer.suggest(str(trial)))  # type: ignore[arg-type]
    second = journal.folder(state.study) / "round-1.json"
    whole = second.read_text()
    for cut in ("", whole[:40], "[]", "{}"):
        second.write_text(cut)
        again = StudyState(study=study("a"), test={})
        journal.load(again, lambda *_: True)
        assert again.rounds == state.rounds[:1]
        again.rounds = state.rounds
        journal.save(again)
        assert second.read_text() == whole


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', '{"head": null, "values": [[1]]}', '{"head": null, "values": null}', "[" * 100_000, "\0"])
def test_a_journalled_score_that_is_none_is_done_again(tmp_path: Path, text: str) -> None:
    state = StudyState(study=replace(study("a"), decided=True), test={})
    file = Journal(tmp_path).folder(state.study) / "score.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    Journal(tmp_path).load(state, lambda *_: True)
    assert state.score is None
    assert not file.exists(), "so that it can be written again"
