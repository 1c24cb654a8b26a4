"""The Ray actor that owns one device, and the crew of such actors: stream → encoder → bank parts."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from harness.core import Encoder
from harness.encoders import EncoderSpec, load
from harness.errors import portable
from harness.features.bank import BankStore
from harness.features.device import Compute, Precision, check_device
from harness.features.extract import Extractor, Part, ShardWork


@dataclass(frozen=True, kw_only=True)
class ActorSettings:
    """What every actor of a run shares."""

    cache: str
    precision: Precision
    batch_size: int
    threads: int
    decode_threads: int
    gpus: float
    cpus: float
    device_type: str


_READING = "reading"
"""The group of calls that are answered while another shard is encoded."""


class EncoderActor:
    """Encodes shards that it is leased, one at a time, and publishes their bank parts. The next one is read, and encoded, while one is published.

    Its constructor does nothing that can fail: setup happens in `start`, a separate call whose failure says why.
    """

    def __init__(self, settings: ActorSettings, encoders: dict[str, EncoderSpec]) -> None:
        self._settings = settings
        self._specs = encoders
        self._loaded: dict[str, Encoder] = {}
        self._begun: dict[tuple[str, int], Future[list[Part]] | None] = {}
        """By shard and attempt: what was expected and is not asked for yet, or None where it has been asked for."""
        self._beginning = threading.Lock()

    def pid(self) -> int:
        return os.getpid()

    def start(self) -> str:
        """Take the device and open the cache; the node's address. Raises the `portable` form of any error."""
        settings = self._settings
        try:
            compute = Compute(settings.precision, settings.gpus > 0, settings.threads)
            self._compute = compute
            self._store = BankStore(settings.cache)
            self._extractor = Extractor(compute, self._encoder, batch_size=settings.batch_size, decode_threads=settings.decode_threads)
        except Exception as error:
            raise portable(error) from error
        address: str = ray.util.get_node_ip_address()
        return address

    @ray.method(concurrency_group=_READING)  # type: ignore[untyped-decorator]
    def expect(self, work: ShardWork, attempt: int) -> None:
        """Begin to read `work`, whose `encode` will be called after those of the works before it. Nothing is published, nothing raised."""
        with self._beginning:
            if (work.name, attempt) not in self._begun:  # this call may come late
                self._begun[work.name, attempt] = self._begin(work, attempt)

    def encode(self, work: ShardWork, attempt: int) -> int:
        """Publish every part of `work`; the number of rows.

        Raises ShardError where the shard cannot be used, RunError where a part cannot be written or this is not the device that its bank names,
        OSError where a retry may succeed, and Unexpected for unexpected exceptions.
        """
        try:
            return self._encode(work, attempt)
        except Exception as error:
            raise portable(error) from error

    def _encode(self, work: ShardWork, attempt: int) -> int:
        check_device(self._settings.device_type, gpu=self._settings.gpus > 0, node=ray.util.get_node_ip_address())
        with self._beginning:
            begun = self._begun.get((work.name, attempt)) or self._begin(work, attempt)
            self._begun[work.name, attempt] = None
        parts = begun.result()
        for bank, rows, receipt in parts:
            self._store.write_part(bank, rows, receipt)
        return sum(receipt.rows for _, _, receipt in parts)

    def _begin(self, work: ShardWork, attempt: int) -> Future[list[Part]]:
        return self._extractor.start(work, node=ray.util.get_node_ip_address(), attempts=attempt)

    def _encoder(self, name: str) -> Encoder:
        if name not in self._loaded:
            encoder = load(self._specs[name])
            encoder.module.to(self._compute.device)
            self._loaded[name] = encoder
        return self._loaded[name]


class EncoderCrew:
    """`count` actors, each pinned to its share of GPUs or CPUs."""

    def __init__(self, count: int, settings: ActorSettings, encoders: dict[str, EncoderSpec]) -> None:
        self._settings = settings
        self._encoders = ray.put(encoders)
        self.actors: list[Any] = [self._start() for _ in range(count)]

    def _start(self) -> Any:
        # a lost lease is this harness's to give again, to whichever actor is free: Ray neither retries the call nor revives the actor
        options = {"num_cpus": self._settings.cpus, "num_gpus": self._settings.gpus, "concurrency_groups": {_READING: 1}}
        remote = ray.remote(max_restarts=0, max_task_retries=0, **options)(EncoderActor)
        return remote.remote(self._settings, self._encoders)

    def start(self, actor: Any) -> Any:
        return actor.start.remote()

    def lease(self, actor: Any, work: ShardWork, attempt: int) -> Any:
        actor.expect.remote(work, attempt)
        return actor.encode.remote(work, attempt)

    def replace(self, actor: Any) -> Any:
        self.dismiss(actor)
        fresh = self._start()
        self.actors.append(fresh)
        return fresh

    def dismiss(self, actor: Any) -> None:
        self.actors.remove(actor)
        _kill(actor)

    def release(self) -> None:
        """Free every actor's resources: a search that waits for them would wait for ever."""
        for actor in self.actors:
            _kill(actor)
        self.actors = []


def _kill(actor: Any) -> None:
    """Kill an actor for good: one that seems lost may only be out of reach, and would hold its cores or GPU for ever."""
    with contextlib.suppress(RayError, ValueError):  # gone already
        ray.kill(actor, no_restart=True)
