"""Values depend neither on how many actors and trials there were nor on who was killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from harness.cluster.tuner import SearchSettings, run_search
from harness.errors import RunError
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type
from harness.local import encode, finish
from harness.search.accounts import Accounts
from harness.search.build import outcome_of
from harness.search.head_store import HeadStore
from harness.search.journal import Journal
from harness.search.runner import Runner
from tests.helpers import here, tiny
from tests.helpers.gates import Gates
from tests.helpers.runs import Run, same_values

pytestmark = pytest.mark.timeout(1200)  # on a machine that is busy with much else

TASKS = ["tiny/object-linear", "tiny/object-knn", "tiny/part-linear", "tiny/part-retrieval"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a sweep over it."""
    root = tmp_path_factory.mktemp("topology")
    tiny.build(root / "shards")
    encoder = {"name": "vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 64}}
    (root / "sweep.yaml").write_text(tiny.sweep_text(root / "shards", encoders=[encoder], tasks=TASKS, protocol={"epochs": 20}))
    return root


def new_run(folder: Path, name: str) -> Run:
    return Run(sweep=folder / "sweep.yaml", out=folder / name, cache=folder / f"{name}.cache")


def gated_run(folder: Path, name: str) -> tuple[Run, Gates]:
    gates = Gates(folder / f"{name}.gates")
    return replace(new_run(folder, name), gates=gates), gates


def leased(run: Run) -> set[str]:
    """Actors that held a lease."""
    return {event["actor"] for event in run.events if event["event"] == "lease"}


def side_by_side(run: Run) -> set[frozenset[int]]:
    """Studies of which a trial ran while one of the other did, by Tune's own account of starts and results."""
    (state,) = (run.out / "tune" / "search").glob("experiment_state*.json")
    trials = [tuple(json.loads(part) for part in trial) for trial in json.loads(state.read_text())["trial_data"]]
    ran = [(times["start_time"], times["last_result_time"], about["_Trial__unresolved_config"]["study"]) for about, times in trials]
    return {
        frozenset((study, other))
        for (start, end, study), (other_start, other_end, other) in itertools.combinations(ran, 2)
        if start < other_end and other_start < end
    }


@pytest.fixture(scope="module")
def alone(folder: Path) -> Run:
    """The undisturbed run with one actor and one trial at a time."""
    run = new_run(folder, "alone")
    assert run.run("--set", "resources.actors=1") == 0, run.log
    return run


def test_the_ledger_sums_to_the_manifest(alone: Run) -> None:
    rows = alone.table("ledger")
    sums: Counter[tuple[str, str]] = Counter()
    for row in rows:
        assert row["status"] == "ok"
        assert (row["seen"], row["failed"], row["duplicates"], row["attempts"]) == (row["expected"], 0, 0, 1)
        sums[row["bank_key"], row["split"]] += row["seen"]
    counts = {"train": 36, "val": 18, "test": 24}
    assert sums
    assert all(total == counts[split] for (_, split), total in sums.items())


def test_two_actors_and_two_trials_at_once_give_the_values_of_one(alone: Run, folder: Path) -> None:
    run, gates = gated_run(folder, "two")
    gates.close("encode")
    gates.close("round")
    process = run.start("--set", "resources.actors=2")
    for gate in ("encode", "round"):
        assert len({arrival.about for arrival in gates.wait(gate, 2, process)}) == 2, "two shards, then two studies, at once"
        gates.open(gate)
    assert run.finish(process) == 0, run.log
    assert len(leased(run)) == 2
    assert not side_by_side(alone)
    assert any(len(studies) == 2 for studies in side_by_side(run)), "trials of two studies ran at once"
    same_values(alone, run)


@contextmanager
def two_nodes(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster whose head computes nothing, beside two nodes of one core, and which soon misses a node that is gone."""
    for name, value in gates.environment().items():
        monkeypatch.setenv(name, value)
    health = {"initial_delay_ms": 500, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4}
    quick = {f"health_check_{name}": value for name, value in health.items()}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick})
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1)
        yield nodes
    finally:
        nodes.shutdown()


@pytest.mark.slow
def test_a_cluster_of_several_nodes_gives_the_values_of_one(alone: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, gates = gated_run(folder, "nodes")
    gates.close("encode")
    with two_nodes(gates, monkeypatch) as nodes:
        process = run.start("--address", nodes.address)
        gates.wait("encode", 2, process)
        gates.open("encode")
        assert run.finish(process) == 0, run.log
    assert len(leased(run)) == 2
    same_values(alone, run)
    assert not list(run.out.glob("tune/search/**/checkpoint*")), "a trial on another node, which does not see this folder, could not keep one"


@pytest.mark.slow
def test_a_node_that_is_lost_and_not_replaced_costs_its_shards_time_and_nothing_else(
    alone: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, gates = gated_run(folder, "lost-node")
    gates.close("encode")
    with two_nodes(gates, monkeypatch) as nodes:
        process = run.start("--address", nodes.address)
        victim = psutil.Process(gates.wait("encode", 2, process)[0].pid)
        raylet = next(parent for parent in victim.parents() if parent.name() == "raylet")
        for lost in [raylet, *raylet.children(recursive=True)]:
            lost.kill()
        gates.open("encode")
        assert run.finish(process) == 0, run.log
    losses = [event for event in run.events if event["event"] == "lost"]
    assert len(losses) == 1, "the one that was leased to it"
    assert not [event for event in run.events if event["event"] == "failed"]
    same_values(alone, run)


@pytest.mark.slow
def test_a_search_whose_nodes_are_all_lost_ends_in_one_line_and_goes_on_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build(tmp_path / "shards")
    plan = here.planned(tmp_path, tiny.sweep_text(tmp_path / "shards", tasks=["tiny/object-linear"], protocol={"epochs": 5}))
    cache = str(tmp_path / "cache")
    store = BankStore(cache)
    accounts = Accounts(plan, store, encode(plan, store, plan.missing(store), Compute("float32", False, 1)))
    lost, resumed, undisturbed = (outcome_of(plan, plan.studies[0], accounts).state for _ in range(3))
    assert lost is not None
    assert resumed is not None
    assert undisturbed is not None
    assert finish(undisturbed, Runner(cache, gpu=False, threads=1)) is None
    settings = SearchSettings(
        out=tmp_path / "out", cache=cache, concurrent=1, cpus=1, gpus=0, threads=1, device_type=device_type(False), node_timeout=2.0
    )
    gates = Gates(tmp_path / "gates")
    gates.close("round", at=1)  # the first one is done
    with two_nodes(gates, monkeypatch) as nodes, ThreadPoolExecutor(1) as beside:

        def lose_all_nodes() -> None:
            gates.wait("round", 1)
            for node in list(nodes.worker_nodes):
                nodes.remove_node(node, allow_graceful=False)

        ray.init(address=nodes.address, log_to_driver=False)
        try:
            losing = beside.submit(lose_all_nodes)
            with pytest.raises(RunError) as caught:
                run_search([lost], settings, lambda _: None)
            losing.result()
            assert str(caught.value) == (
                "no node could run a trial for 2 s: expected one with 1 CPUs and 0 GPUs, got 0 CPUs and 0 GPUs; "
                "look at `ray status` for nodes that are missing or too small; what is done stays: run again to go on"
            )
            gates.open("round")
            nodes.add_node(num_cpus=1)
            Journal(settings.out).load(resumed, HeadStore(BankStore(cache)).has_round)
            assert resumed.rounds == lost.rounds
            assert len(resumed.rounds) == 1
            assert run_search([resumed], settings, lambda _: None) == {}
        finally:
            ray.shutdown()
    assert resumed.score is not None
    assert undisturbed.score is not None
    assert resumed.score.values == undisturbed.score.values
    assert resumed.score.predictions == undisturbed.score.predictions


def test_an_actor_killed_within_a_lease_changes_nothing(alone: Run, folder: Path) -> None:
    run, gates = gated_run(folder, "killed")
    gates.close("encode")
    process = run.start("--set", "resources.actors=2")
    victim = gates.wait("encode", 1, process)[0]
    os.kill(victim.pid, signal.SIGKILL)
    gates.open("encode")
    assert run.finish(process) == 0, run.log
    lost = [event["shard"] for event in run.events if event["event"] == "lost"]
    assert lost == [victim.about], "the victim held one lease"
    # the part says which attempt published it: had the victim published before it died, its part would have stayed
    dataset, split, shard = lost[0].split("/")
    attempts = {row["attempts"] for row in run.table("ledger") if (row["dataset"], row["split"], row["shard"]) == (dataset, split, shard)}
    assert attempts == {2}
    same_values(alone, run)


def test_the_same_command_again_does_nothing_again(alone: Run) -> None:
    before = (alone.parts, alone.rounds, alone.table("results"), len(alone.events))
    assert alone.run("--set", "resources.actors=1") == 0
    assert before == (alone.parts, alone.rounds, alone.table("results"), len(alone.events))


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["encode", "search", "collect"])
def test_a_driver_stopped_in_any_phase_goes_on_from_there(alone: Run, folder: Path, phase: str, signal_number: signal.Signals) -> None:
    run, gates = gated_run(folder, f"{phase}-{signal_number.name}")
    gate = {"encode": "encode", "search": "round", "collect": "report"}[phase]
    gates.close(gate, at=0 if phase == "collect" else 1)  # something of the phase is done
    process = run.start("--set", "resources.actors=2")
    gates.wait(gate, 1, process)
    process.send_signal(signal_number)
    status = run.finish(process)
    assert status == (130 if signal_number == signal.SIGINT else -signal.SIGKILL), run.log
    gates.open(gate)
    parts, rounds = run.parts, run.rounds
    assert rounds or (parts and phase == "encode")
    assert (run.out / "results.parquet").exists() == (phase == "collect")
    leases = len(run.events)
    assert run.run("--set", "resources.actors=1") == 0, run.log
    assert {name: run.parts[name] for name in parts} == parts, "no finished part is written again"
    assert {name: run.rounds[name] for name in rounds} == rounds, "no finished round is run again"
    whole = {path.split("/")[1] for path in parts}  # every bank of a shard is published by one lease
    again = {event["shard"].rsplit("/", 1)[1].replace(".tar", ".arrow") for event in run.events[leases:] if event["event"] == "lease"}
    if phase != "encode":
        assert not again
    assert all(sum(name.endswith(shard) for name in parts) < sum(name.endswith(shard) for name in run.parts) for shard in again & whole)
    same_values(alone, run)
