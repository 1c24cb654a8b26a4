"""How the cores and GPUs of a machine or a cluster are shared out: no more actors than Ray finds a place for."""

from __future__ import annotations

import io
from typing import Any

import pytest
import ray
from rich.console import Console

from harness.cluster import cluster
from harness.cluster.cluster import Cluster, Node
from harness.config import Resources
from harness.errors import RequestError
from harness.progress import Progress
from tests.helpers.clusters import new


@pytest.fixture
def two_cores_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "local_cores", lambda: 2)
    monkeypatch.setattr(cluster, "has_gpu", lambda: True)
    monkeypatch.setattr(cluster, "local_gpus", lambda: 1)
    monkeypatch.setattr(cluster, "device_type", lambda gpu: "a GPU" if gpu else "a CPU")
    monkeypatch.setattr(cluster, "resolve_precision", lambda name, gpu: "float32")


@pytest.mark.usefixtures("two_cores_and_a_gpu")
@pytest.mark.parametrize(
    ("resources", "actors", "cpus"),
    [
        ({}, 1, 1),
        ({"gpus_per_actor": 0.5}, 2, 1),
        ({"gpus_per_actor": 0.1}, 2, 1),
        ({"gpus_per_actor": 0}, 2, 1),
        ({"gpus_per_actor": 0, "threads": 2}, 1, 2),
    ],
)
def test_a_machine_has_no_more_actors_than_places(resources: dict[str, Any], actors: int, cpus: int) -> None:
    machine = new(**resources).machine()
    assert (machine.actors, machine.cpus) == (actors, cpus)


@pytest.mark.usefixtures("two_cores_and_a_gpu")
@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"gpus_per_actor": 0.1, "actors": 3}, "resources.actors: expected at most 2 with 2 cores at 1 per actor and 1 GPUs at 0.1, got 3"),
        ({"gpus_per_actor": 2}, "resources.gpus_per_actor: expected no more GPUs than a node has"),
        ({"threads": 3}, "resources.threads: expected at most the 2 cores"),
    ],
)
def test_more_than_there_are_places_for_is_refused(resources: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        new(**resources).machine()


@pytest.mark.parametrize(
    ("node", "cpus", "share", "places"),
    [
        (Node(cores=4, gpus=8), 1, 1.0, 4),
        (Node(cores=64, gpus=2), 1, 0.6, 2),
        (Node(cores=64, gpus=2), 1, 0.1, 20),
        (Node(cores=64, gpus=5), 1, 2.0, 2),
        (Node(cores=64, gpus=0), 1, 1.0, 0),
        (Node(cores=7, gpus=0), 2, 0.0, 3),
    ],
)
def test_an_actor_fits_on_one_node(node: Node, cpus: int, share: float, places: int) -> None:
    assert node.places(cpus, share) == places


def test_a_clusters_places_are_those_of_its_living_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 32.0}},
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 8.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda look: _Remote())
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    monkeypatch.setattr(Cluster, "start", lambda self: None)
    joined = Cluster("auto", Resources(), dashboard=False, progress=Progress(Console(file=io.StringIO())))
    assert joined.machine().actors == 4


class _Remote:
    def remote(self, gpu: bool, precision: str) -> tuple[str, str]:
        return "a GPU" if gpu else "a CPU", "float32"
