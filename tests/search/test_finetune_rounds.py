"""Fine-tuning in rounds: who comes to which rung, what an interruption costs (nothing), what is scored, what is accounted for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.tune.search import Searcher
from safetensors.torch import load_file

from harness.cluster.tuner import Proposer
from harness.config import load_sweep
from harness.core import StreamSetting
from harness.data.augment import draw
from harness.data.epochs import Epoch
from harness.encoders import load
from harness.errors import RequestError
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type
from harness.metrics import metric
from harness.plan.plan import Plan, make_plan
from harness.probes.finetune.training import FinetuneScorer, FinetuneTrainer
from harness.probes.lib.streaming import PaddedEncoder
from harness.search import build, steps
from harness.search.accounts import Accounts
from harness.search.halving import Halving, RungJob, RungResult
from harness.search.head_store import HeadStore
from harness.search.propose import HeadScore, choose, propose, survivors
from harness.search.runner import Runner
from harness.search.state import StudyState
from harness.search.steps import Step
from harness.search.study import BankRef, Round, Score, Study
from harness.tasks import select
from tests.helpers import tiny

torch.set_num_threads(1)
PROTOCOL = {"epochs": 2, "batch_size": 8, "rungs": 2, "eta": 2, "init_std": 0.02, "layer_decay": 0.9}
RATES = (1e-6, 1e-4, 1e-3, 3e-3)
PROPOSALS: list[tuple[str, float | None]] = [("mean", rate) for rate in RATES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    tiny.build(root, name="tiny")
    tiny.build(root, name="noval", splits={"train": 40, "test": 12})
    return root


@pytest.fixture(scope="module")
def compute() -> Compute:
    return Compute("float32", False, 1)


def plan_of(root: Path, folder: Path, task: str = "tiny/finetune", architecture: str = "test_vit", **protocol: Any) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = {"size": 32, "resize": 34, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    encoder = {"name": "e", "architecture": architecture, "random": True, "preprocessing": preprocessing}
    (folder / "sweep.yaml").write_text(tiny.sweep_text(root, tasks=[task], encoders=[encoder], protocol={**PROTOCOL, **protocol}))
    return make_plan(load_sweep(folder / "sweep.yaml"), folder, device_type(False), "float32")


def state_of(root: Path, folder: Path, *, every_step: bool = False, **how: Any) -> tuple[StudyState, Accounts]:
    """The one study of a plan, and its accounts; `every_step` saves a checkpoint after each of them."""
    plan = plan_of(root, folder, **how)
    if every_step:
        plan.sweep = plan.sweep.model_copy(update={"resources": plan.sweep.resources.model_copy(update={"checkpoint_seconds": 0.0})})
    accounts = Accounts(plan, BankStore(str(folder / "cache")), {})
    state = build.state_of(plan, plan.studies[0], accounts)
    return state, accounts


def studied(root: Path, folder: Path, **how: Any) -> tuple[Study, dict[str, BankRef], Accounts]:
    state, accounts = state_of(root, folder, **how)
    return state.study, dict(state.test), accounts


def runner_in(folder: Path) -> Runner:
    return Runner(str(folder / "cache"), gpu=False, threads=1)


# --- the task ---------------------------------------------------------------------------------------------------------


def test_only_patterns_that_say_so_select_it(data: Path) -> None:
    assert not [task for task in select(["tiny/*"], str(data), {})[0] if task.probe.name == "finetune"]
    assert not [task for task in select(["tiny/*-streamed"], str(data), {})[0] if task.probe.name == "finetune"]
    for pattern in ("tiny/finetune", "tiny/*finetune*"):
        (task,), _ = select([pattern], str(data), {})
        assert (task.name, task.level, task.feed, task.readouts) == ("tiny/finetune", "object", "streamed", ("mean",))


def test_a_wrong_field_is_told_before_anything_runs(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="layer_decay"):
        plan_of(data, tmp_path, layer_decay=1.5)


def test_rates_are_searched_within_bounds_of_its_own(data: Path, tmp_path: Path) -> None:
    state, _ = state_of(data, tmp_path, lr_bounds=[1e-5, 1e-2])
    assert state.study.lr == (1e-3, 1.0)
    step = state.next_step()
    assert isinstance(step, steps.Fit)
    assert [rate for _, rate in step.proposals] == pytest.approx([10**-4.5, 10**-3.5, 10**-2.5])


# --- who goes on ------------------------------------------------------------------------------------------------------


def scores(values: list[float | None], rates: list[float] | None = None) -> list[HeadScore]:
    given = rates or [10.0**-index for index in range(len(values))]
    return [HeadScore(round=0, head=head, lr=rate, readout="mean", value=value) for head, (value, rate) in enumerate(zip(values, given, strict=True))]


@pytest.mark.parametrize(("values", "eta", "going"), [
    ([0.1, 0.9, 0.3, 0.8, 0.2, 0.7], 3, [1, 3]),
    ([0.1, 0.9, 0.3, 0.8, 0.2, 0.7], 2, [1, 3, 5]),
    ([0.1, None, None, None, 0.2, None], 2, [0, 4]),
    ([0.4, 0.5], 3, [1]),
    ([None, None], 2, []),
    ([0.5, 0.5, 0.5, 0.5, 0.5], 3, [2]),
    ([0.5, 0.5, 0.5, 0.5, 0.9, 0.1], 2, [1, 2, 4]),
])  # fmt: skip
def test_the_best_of_a_rung_go_on_and_of_tied_ones_the_middle(values: list[float | None], eta: int, going: list[int]) -> None:
    assert [head.head for head in survivors(scores(values), eta)] == going
    assert [head.head for head in survivors(list(reversed(scores(values))), eta)] == going


CURVES = [[0.2, 0.3, 0.9], [0.5, 0.6, 0.6], [0.4, 0.7, 0.8], [0.6, 0.5, 0.4], [None, None, None], [0.3, 0.9, 0.9], [0.1, 0.9, 0.9], [0.7, 0.65, 0.7]]
"""Value of each of eight heads at the ends of three rungs."""


def result_of(job: RungJob) -> RungResult:
    value = CURVES[job.head][job.rung]
    return RungResult(value=value, error=None if value is not None else "diverged", epochs=job.epochs if value is not None else 0)


HALVING = Halving(round_index=0, proposals=[("mean", 10.0 ** -(index + 1)) for index in range(len(CURVES))], ends=(2, 4, 8), eta=2)
HEADS = [(0.2, 2, True), (0.6, 4, True), (0.8, 8, False), (0.5, 4, True), (None, 0, False), (0.3, 2, True), (0.1, 2, True), (0.7, 8, False)]
"""By hand: at 2 epochs the best half of eight are 7 (0.7), 3 (0.6), 1 (0.5), 2 (0.4); of these at 4 epochs 2 (0.7) and 7 (0.65)."""


@pytest.mark.parametrize("order", range(4))
def test_heads_climb_as_halving_by_hand_whatever_comes_first(order: int) -> None:
    done: dict[tuple[int, int], RungResult] = {}
    seen: list[set[int]] = [set(), set(), set()]
    while jobs := HALVING.open(done):
        job = random.Random(order).choice(jobs)
        assert (job.rung, job.head) not in done
        assert job.epochs == (2, 4, 8)[job.rung]
        seen[job.rung].add(job.head)
        done[job.rung, job.head] = RungResult.from_json(result_of(job).to_json())
    assert seen == [set(range(8)), {1, 2, 3, 7}, {2, 7}]
    heads = HALVING.heads(done)
    assert [(head.value, head.epochs, head.stopped) for head in heads] == HEADS
    assert heads[4].error == "diverged"
    assert choose(heads, ("mean",)) == heads[2]


def test_a_head_that_was_stopped_is_never_chosen_however_good() -> None:
    best = HeadScore(round=0, head=0, lr=0.1, readout="mean", value=0.9, epochs=1, stopped=True)
    last = HeadScore(round=0, head=1, lr=0.2, readout="mean", value=0.2, epochs=8)
    assert choose([best, last], ("mean",)) == last
    assert choose([best], ("mean",)) is None


def value_of(rate: float, rung: int) -> float:
    """Best at 1e-3; what is best early is not best late."""
    return 1 - abs(math.log10(rate) + (4 if rung == 0 else 3)) / 4


def searched(state: StudyState, order: int) -> tuple[list[Round], int]:
    """Every round of a study in a search whose trials come back in some order, and the most that ran at once."""
    draws, running, most, number = random.Random(order), list[tuple[str, Step]](), 0, 0
    proposer = Proposer([state], lambda _: None)
    while True:
        config = proposer.suggest(str(number))
        if isinstance(config, dict):
            running.append((str(number), steps.from_plain(config["step"])))
            number, most = number + 1, max(most, len(running))
            continue
        if config == Searcher.FINISHED:
            return state.rounds, most
        trial, step = running.pop(draws.randrange(len(running)) if order else 0)
        if isinstance(step, steps.Rung):
            rate = step.proposals[step.job.head][1]
            outcome: Any = RungResult(value=value_of(rate or 0.0, step.job.rung), error=None, epochs=step.job.epochs)
        elif isinstance(step, steps.Fit):
            assert not running, "a round ends when all its rungs have"
            halving = Halving.planned("finetune", state.study.protocol, step.round, step.proposals)
            assert halving is not None
            done: dict[tuple[int, int], RungResult] = {}
            while jobs := halving.open(done):
                for job in jobs:
                    value = value_of(halving.proposals[job.head][1] or 0.0, job.rung)
                    done[job.rung, job.head] = RungResult(value=value, error=None, epochs=job.epochs)
            outcome = Round(index=step.round, heads=tuple(halving.heads(done)), seconds=0.0)
        else:
            outcome = Score(head=step.chosen, values=(), n=1, seconds=0.0)
        proposer.on_trial_complete(trial, {"payload": outcome.to_json()})


def test_jobs_of_a_rung_run_side_by_side_and_their_order_changes_nothing(data: Path, tmp_path: Path) -> None:
    (first, most), *others = [searched(state_of(data, tmp_path / str(order))[0], order) for order in range(4)]
    assert most == 3, "the stack of the sweep"
    assert len(first) == 2
    assert all(rounds == first for rounds, _ in others)
    assert all(sum(not head.stopped for head in round_.heads) == 1 for round_ in first)


def test_what_was_stopped_early_guides_less_than_what_was_not() -> None:
    """Proposals look where finished heads were good, though stopped ones told of higher values elsewhere."""

    def proposed(stopped: bool) -> list[float]:
        low = [HeadScore(round=0, head=i, lr=10 ** (-4 + i / 10), readout="mean", value=0.9, epochs=1, stopped=stopped) for i in range(8)]
        high = [HeadScore(round=0, head=8 + i, lr=10 ** (-1 + i / 10), readout="mean", value=0.5, epochs=9) for i in range(8)]
        proposals = propose(study="a", seed=0, round_index=1, history=low + high, readouts=("mean",), stack=8, lr=(1e-5, 1.0))
        return [rate for _, rate in proposals]

    def among_the_low(rates: list[float]) -> int:
        return sum(rate < 1e-3 for rate in rates)

    assert among_the_low(proposed(stopped=True)) < among_the_low(proposed(stopped=False))
    assert proposed(stopped=True) == proposed(stopped=True)


def test_rounds_of_stopped_heads_survive_the_journal() -> None:
    round_ = Round(index=0, heads=(HeadScore(round=0, head=0, lr=0.1, readout="mean", value=0.5, epochs=3, stopped=True),), seconds=1.0)
    assert Round.from_json(round_.to_json()) == round_
    old = json.loads(round_.to_json())
    for head in old["heads"]:
        del head["epochs"], head["stopped"]
    assert Round.from_json(json.dumps(old)).heads[0] == HeadScore(round=0, head=0, lr=0.1, readout="mean", value=0.5)


# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["test_vit", "test_efficientnet"])
def test_a_planted_task_is_learned(architecture: str, data: Path, tmp_path: Path) -> None:
    study, test, _ = studied(data, tmp_path, architecture=architecture, epochs=9, eta=3, drop_path=0.0)
    runner = runner_in(tmp_path)
    proposals: list[tuple[str, float | None]] = [("mean", 1e-6), ("mean", 1e-3), ("mean", 1e-2)]
    round_ = runner.run_round(study, 0, proposals)
    chosen = choose(round_.heads, study.readouts)
    assert chosen is not None
    score = runner.score(study, chosen, test["mean"])
    assert [value.value for value in score.values] == [1.0, 1.0]
    assert score.n == 24
    assert score.predictions["target"] == score.predictions["prediction"]


def by_hand(study: Study, rate: float, epochs: int, compute: Compute) -> tuple[float, dict[str, torch.Tensor]]:
    """Accuracy on val and the network after so many epochs of the whole schedule, in the plainest of loops."""
    assert study.stream is not None
    network = PaddedEncoder(load(study.stream.encoder), compute, 8)
    setting = StreamSetting(encoder=network, protocol=study.protocol, classes=study.classes, seed=study.seed)
    trainer = FinetuneTrainer(setting, [("mean", rate)])
    source, step = study.train["mean"].source, 0
    assert source is not None
    for epoch in range(epochs):
        order = draw(study.seed, epoch, "order of the samples")
        seen = Epoch(source=source, threads=1, order=order)
        drawn = [fed.value for fed in seen.read(lambda sample, epoch=epoch: trainer.draw(sample, draw(study.seed, epoch, sample.key)))]  # type: ignore[misc]
        for start in range(0, len(drawn), 8):
            trainer.step(drawn[start : start + 8], step, 2 * 5)
            step += 1
    (state,) = trainer.fitted()
    scorer = FinetuneScorer(setting, [("mean", state)])
    held = study.val["mean"].source
    assert held is not None
    samples = list(Epoch(source=held, threads=1).read(scorer.view))
    (predictions,) = scorer.predict([sample.key for sample in samples], [sample.value for sample in samples])
    assert not isinstance(predictions, Exception)
    accuracy = metric("accuracy")
    return float(accuracy.value(accuracy.counts(predictions, 3).sum(axis=0))), state


def test_a_round_is_each_training_alone_and_the_best_half_of_them_to_the_end(data: Path, compute: Compute, tmp_path: Path) -> None:
    study, _, _ = studied(data, tmp_path)
    round_ = runner_in(tmp_path).run_round(study, 0, PROPOSALS)
    assert len(round_.heads) == 4
    first = [by_hand(study, rate, 1, compute)[0] for rate in RATES]
    going = [score.head for score in survivors(scores(list(first), list(RATES)), 2)]
    assert len(going) == 2
    for head in round_.heads:
        assert head.stopped == (head.head not in going)
        assert head.epochs == (1 if head.stopped else 2)
        if head.stopped:
            assert head.value == first[head.head]
            continue
        value, state = by_hand(study, RATES[head.head], 2, compute)
        assert head.value == value
        stored = HeadStore(BankStore(str(tmp_path / "cache"))).state(study, head)
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], state[name]) for name in state)
    states = load_file(tmp_path / "cache" / "studies" / study.id / "round-0.safetensors")
    assert {int(name.split("/")[0]) for name in states} == set(going), "only what can be chosen is kept"


def test_rungs_in_processes_of_their_own_give_the_same_bits(data: Path, tmp_path: Path) -> None:
    alone, _, _ = studied(data, tmp_path / "alone")
    whole = runner_in(tmp_path / "alone").run_round(alone, 0, PROPOSALS)
    study, _, accounts = studied(data, tmp_path / "apart")
    halving = Halving.planned(study.probe, study.protocol, 0, PROPOSALS)
    assert halving is not None
    done: dict[tuple[int, int], RungResult] = {}
    while jobs := halving.open(done):
        for job in reversed(jobs):
            done[job.rung, job.head] = runner_in(tmp_path / "apart").run_rung(study, 0, PROPOSALS, job)
    again = runner_in(tmp_path / "apart").run_round(study, 0, PROPOSALS)
    assert again.heads == whole.heads
    assert again.seconds >= sum(result.seconds for result in done.values()) > 0
    first, second = (tmp_path / name / "cache" / "studies" / study.id / "round-0.safetensors" for name in ("alone", "apart"))
    assert first.read_bytes() == second.read_bytes()
    (train,) = [bank for bank in accounts.banks() if bank.split == "train"]
    assert [(receipt.seen, receipt.attempts) for receipt in accounts.of(train)] == [(12, 1)] * 3
    # four heads of one epoch, two of which go on for another one
    assert sum(receipt.images for receipt in accounts.of(train)) == 36 * (4 + 2)


class Stopped(Exception):
    """An interruption."""


@pytest.mark.parametrize(("architecture", "saves"), [("test_vit", 1), ("test_vit", 6), ("test_vit", 29), ("test_efficientnet", 7)])
def test_an_interrupted_round_goes_on_to_the_same_bits(
    architecture: str, saves: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study_in(name: str) -> Study:
        return studied(data, tmp_path / name, every_step=name == "stopped", architecture=architecture, drop_path=0.2)[0]

    def published(name: str, study: Study) -> bytes:
        return (tmp_path / name / "cache" / "studies" / study.id / "round-0.safetensors").read_bytes()

    straight, study = study_in("straight"), study_in("stopped")
    whole = runner_in(tmp_path / "straight").run_round(straight, 0, PROPOSALS)
    runner, written = runner_in(tmp_path / "stopped"), 0
    publish = BankStore.publish

    def counted(store: BankStore, names: Sequence[str], data: bytes, *, replace: bool = False) -> bool:
        nonlocal written
        published = publish(store, names, data, replace=replace)
        written += names[-1].startswith("checkpoint-")
        if written == saves and names[-1].startswith("checkpoint-"):
            raise Stopped
        return published

    monkeypatch.setattr(BankStore, "publish", counted)
    with pytest.raises(Stopped):
        runner.run_round(study, 0, PROPOSALS)
    steps: list[int] = []
    step = FinetuneTrainer.step
    monkeypatch.setattr(FinetuneTrainer, "step", lambda self, batch, at, total: (steps.append(at), step(self, batch, at, total)))
    again = runner_in(tmp_path / "stopped").run_round(study, 0, PROPOSALS)
    assert again.heads == whole.heads
    assert published("stopped", study) == published("straight", straight)
    # an epoch of five steps for four heads, and another one for two of them; each epoch saves once more at its end, but for the last one of a head
    assert len(steps) == 30 - (saves - saves // 6)
    assert not list((tmp_path / "stopped" / "cache").glob("*/checkpoint-*"))

    assert runner_in(tmp_path / "stopped").run_round(study, 0, PROPOSALS).heads == whole.heads
    assert len(steps) == 30 - (saves - saves // 6), "what is done is not done again"
    if saves == 1:
        (tmp_path / "stopped" / "cache" / "studies" / study.id / "round-0.safetensors").unlink()
        runner_in(tmp_path / "stopped").run_round(study, 0, PROPOSALS)
        assert published("stopped", study) == published("straight", straight), "what the cache has lost is made again"


@pytest.mark.parametrize("dataset", ["tiny", "noval"])
def test_the_account_says_that_every_sample_was_seen_once(dataset: str, data: Path, tmp_path: Path) -> None:
    study, test, accounts = studied(data, tmp_path, task=f"{dataset}/finetune")
    runner = runner_in(tmp_path)
    round_ = runner.run_round(study, 0, PROPOSALS[1:3])
    assert all(head.error is None and head.value is not None for head in round_.heads)
    chosen = choose(round_.heads, study.readouts)
    assert chosen is not None
    score = runner.score(study, chosen, test["mean"])
    receipts = {bank.split: accounts.of(bank) for bank in accounts.banks()}
    expected = {"train": 36, "val": 18, "test": 24} if dataset == "tiny" else {"train": 40, "test": 12}
    assert {split: sum(receipt.seen for receipt in of_split) for split, of_split in receipts.items()} == expected
    assert score.n == expected["test"]
    assert {receipt.status for of_split in receipts.values() for receipt in of_split} == {"ok"}
    assert {receipt.attempts for receipt in receipts["train"]} == {1}


def test_a_broken_image_costs_that_sample_and_is_named(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "root")
    rng = np.random.default_rng(0)
    records = [tiny.members(rng, f"train-{index:05d}", index % 3) for index in range(12)]
    records[5][0] = (records[5][0][0], b"no picture")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0] = tiny.write_tar(folder / "train-000.tar", records)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    study, _, accounts = studied(tmp_path / "root", tmp_path)
    round_ = runner_in(tmp_path).run_round(study, 0, PROPOSALS[1:3])
    assert all(head.value is not None for head in round_.heads)
    (train,) = [bank for bank in accounts.banks() if bank.split == "train"]
    assert [(receipt.status, receipt.seen, receipt.failed) for receipt in accounts.of(train)] == [("incomplete", 11, 1), ("ok", 12, 0), ("ok", 12, 0)]
    assert accounts.of(train)[0].reasons == {"broken image": ["train-00005"]}


def test_a_round_needs_no_test_shards_and_leaves_the_encoder_alone(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "root")
    study, _, _ = studied(tmp_path / "root", tmp_path)
    for shard in folder.glob("test-*.tar"):
        shard.unlink()
    assert study.stream is not None
    encoder = load(study.stream.encoder)
    runner = Runner(str(tmp_path / "cache"), gpu=False, threads=1, load_encoder=lambda _: encoder)
    assert runner.run_round(study, 0, PROPOSALS[1:3]).heads[0].value is not None
    assert encoder.module.digest() == encoder.info.weights_sha256
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())


def test_a_rate_that_diverges_costs_itself_alone(data: Path, tmp_path: Path) -> None:
    study, _, _ = studied(data, tmp_path)
    round_ = runner_in(tmp_path).run_round(study, 0, [("mean", 1e30), ("mean", 1e-3)])
    assert (round_.heads[0].value, round_.heads[0].stopped) == (None, False)
    assert "search below it" in (round_.heads[0].error or "")
    assert (round_.heads[1].epochs, round_.heads[1].stopped) == (2, False)
    assert choose(round_.heads, study.readouts) == round_.heads[1]
