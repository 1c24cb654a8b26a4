"""The Ray that a run uses: a local single node that it starts and stops, or a cluster that it joins. Started only when there is something to run."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from harness.cluster import local_ray
from harness.cluster.actors import ActorSettings, EncoderCrew
from harness.config import Resources
from harness.encoders import EncoderSpec
from harness.errors import RequestError, RunError
from harness.features import cores
from harness.features.device import Precision, device_type, has_gpu, resolve_precision
from harness.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware that a run computes on."""

    device_type: str
    precision: Precision
    actors: int
    gpus: float
    """A fraction or a number of GPUs for every actor and trial; 0 on CPUs."""
    cpus: float
    threads: int
    decode_threads: int
    batch_size: int

    @property
    def trial_slots(self) -> int:
        return self.actors


@dataclass(frozen=True, kw_only=True)
class Node:
    """One computer's resources for actors."""

    cores: int
    gpus: int

    def places(self, cpus: int, share: float) -> int:
        """Actors of `cpus` cores and `share` GPUs (0, a fraction of one, or whole ones) that fit: no fraction spans two GPUs."""
        by_cores = self.cores // cpus
        if not share:
            return by_cores
        return min(by_cores, self.gpus * int(1 / share + 1e-6) if share <= 1 else self.gpus // int(share))


class Cluster:
    """A context manager; leaves no process of a local Ray behind. Raises RequestError where a requested dashboard is impossible."""

    def __init__(self, address: str | None, resources: Resources, *, dashboard: bool, progress: Progress) -> None:
        if dashboard:
            _check_dashboard(address)
        self._address = address
        self._resources = resources
        self._dashboard = dashboard
        self._progress = progress
        self._started = False
        self._resting = contextlib.ExitStack()
        """Cleans up what a local Ray leaves on the machine, once it has ended."""

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._resting, local_ray.interrupt_later():
            if self._started or ray.is_initialized():
                ray.shutdown(wait_for_processes=self._address is None)
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"Ray was lost: {lines[0]}; the same command resumes from here") from error

    def start(self) -> None:
        """Start the local Ray, or join the cluster; once. Raises RequestError where no cluster answers, RunError where no Ray starts."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # an actor without GPUs must not see them all
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is not None:
            _refuse_silence(self._address)
            with self._progress.phase(f"joining the Ray cluster at {self._address}", may_refuse=True), local_ray.interrupt_later():
                self._started = True
                self._join(self._address, quiet)
            return
        self._progress.say("starting Ray")
        with local_ray.interrupt_later():
            self._started = True
            self._start_local(quiet)

    def _start_local(self, options: dict[str, Any]) -> None:
        """Start a separate Ray, regardless of RAY_ADDRESS and of another Ray's files in the temporary folder."""
        resources = self._resources
        count = local_cores()
        cpus = count if resources.actors == "auto" else max(count, resources.actors * resources.threads)
        folder = local_ray.make_folder()
        self._resting.callback(local_ray.remove, folder)
        self._resting.enter_context(local_ray.writable_token(folder))
        store = local_ray.store_options(folder)
        try:
            context = ray.init(address="local", num_cpus=cpus, include_dashboard=self._dashboard, _temp_dir=str(folder), **store, **options)
        except Exception as error:  # Ray raises RuntimeError, OSError, ValueError, TimeoutError and others
            complaint = " ".join(str(error).split())[:300] or type(error).__name__
            raise RunError(f"Ray: expected to start one here, got: {complaint}; look at the disk and memory that are free, then run again") from error
        if self._dashboard:
            self._progress.say(f"dashboard: http://{context.dashboard_url}")

    @staticmethod
    def _join(address: str, options: dict[str, Any]) -> None:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            complaint = str(error).strip().splitlines()[0]
            raise RequestError(f"--address {address}: expected a running Ray cluster, got: {complaint}; start one with ray up cluster.yaml") from None

    def machine(self) -> Machine:
        """The machine of the run and how its resources are divided. Raises RequestError for a request that can never be met."""
        if self._address is not None:
            self.start()
            return self._remote_machine()
        gpu = self._wants_gpu(has_gpu())
        nodes = [Node(cores=local_cores(), gpus=local_gpus() if gpu else 0)]
        return self._machine(self._places(nodes, gpu), device_type(gpu), resolve_precision(self._resources.precision, gpu), self._gpu_share(gpu))

    def crew(self, machine: Machine, cache: str, encoders: dict[str, EncoderSpec], *, limit: int) -> EncoderCrew:
        """Encoder actors, no more than `limit`."""
        self.start()
        count = max(1, min(machine.actors, limit))
        self._progress.say(f"starting {count} encoder actor{'s' if count > 1 else ''} on {machine.device_type}, {machine.precision}")
        settings = ActorSettings(
            cache=cache,
            precision=machine.precision,
            batch_size=machine.batch_size,
            threads=machine.threads,
            decode_threads=machine.decode_threads,
            gpus=machine.gpus,
            cpus=machine.cpus,
            device_type=machine.device_type,
        )
        return EncoderCrew(count, settings, encoders)

    def _wants_gpu(self, available: bool) -> bool:
        requested = self._resources.gpus_per_actor
        if requested == "auto":
            return available
        if requested > 0 and not available:
            raise RequestError(f"resources.gpus_per_actor: expected 0 or auto where there is no GPU, got {requested:g}")
        return requested > 0

    def _remote_machine(self) -> Machine:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpu = self._wants_gpu(any(resources.get("GPU", 0) > 0 for resources in alive))
        nodes = [Node(cores=int(resources.get("CPU", 0)), gpus=int(resources.get("GPU", 0)) if gpu else 0) for resources in alive]
        places, share = self._places(nodes, gpu), self._gpu_share(gpu)
        try:
            device, precision = ray.get(ray.remote(num_cpus=1, num_gpus=share)(_device_of_worker).remote(gpu, self._resources.precision))
        except RayTaskError as error:
            raise error.cause from None  # the worker's error, without Ray's own frames
        return self._machine(places, device, precision, share)

    def _gpu_share(self, gpu: bool) -> float:
        requested = self._resources.gpus_per_actor
        return 0.0 if not gpu else 1.0 if requested == "auto" else requested

    def _cpus(self, gpu: bool) -> int:
        return 1 if gpu else self._resources.threads

    def _places(self, nodes: Sequence[Node], gpu: bool) -> int:
        """The number of actors that fit. Raises RequestError where none fits, or fewer than requested."""
        resources, share, cpus = self._resources, self._gpu_share(gpu), self._cpus(gpu)
        most, widest = sum(node.places(cpus, share) for node in nodes), max(node.cores for node in nodes)
        if resources.threads > widest:
            raise RequestError(f"resources.threads: expected at most the {widest} cores available, got {resources.threads}")
        if not most:
            raise RequestError(f"resources.gpus_per_actor: expected no more GPUs than a node has, and a core beside them, got {share:g}")
        if resources.actors != "auto" and resources.actors > most:
            capacity = f"{sum(node.cores for node in nodes)} cores at {cpus} per actor"
            capacity += f" and {sum(node.gpus for node in nodes)} GPUs at {share:g}" if gpu else ""
            raise RequestError(f"resources.actors: expected at most {most} with {capacity}, got {resources.actors}")
        return most

    def _machine(self, places: int, device: str, precision: Precision, share: float) -> Machine:
        resources = self._resources
        return Machine(
            device_type=device,
            precision=precision,
            actors=places if resources.actors == "auto" else resources.actors,
            gpus=share,
            cpus=self._cpus(share > 0),
            threads=resources.threads,
            decode_threads=resources.decode_threads,
            batch_size=resources.batch_size,
        )


def _check_dashboard(address: str | None) -> None:
    """Raise RequestError where `--dashboard` has no effect."""
    if address is not None:
        raise RequestError(f"--dashboard: expected no --address beside it, got {address}; a cluster has its own dashboard, or none")
    try:
        importlib.import_module("ray.dashboard.optional_deps")
    except ImportError as error:
        raise RequestError(f"--dashboard: expected the packages of Ray's dashboard, got: {error}; pip install 'ray[default]'") from None


def _device_of_worker(gpu: bool, precision: str) -> tuple[str, Precision]:
    """Device type and precision on a worker."""
    return device_type(gpu), resolve_precision(precision, gpu)


def local_cores() -> int:
    return cores.available()


def local_gpus() -> int:
    return torch.cuda.device_count()


def _refuse_silence(address: str) -> None:
    """Raise RequestError where nothing listens at `host:port`; Ray itself would keep trying for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RequestError(f"--address {address}: expected a running Ray cluster, got: {error}; start one with ray up cluster.yaml") from None
