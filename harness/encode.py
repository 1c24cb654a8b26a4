"""The Ray actor that owns one device, and the crew of them: stream → encoder → bank parts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray

from harness.bank import BankStore
from harness.core import Encoder
from harness.device import Compute, Precision, check_device
from harness.encoders import EncoderSpec, load
from harness.extract import Extractor, ShardWork


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


class EncoderActor:
    """Encodes shards that it is leased, one at a time, and publishes their bank parts."""

    def __init__(self, settings: ActorSettings, encoders: dict[str, EncoderSpec]) -> None:
        compute = Compute(settings.precision, settings.gpus > 0, settings.threads)
        self._compute = compute
        self._settings = settings
        self._specs = encoders
        self._loaded: dict[str, Encoder] = {}
        self._store = BankStore(settings.cache)
        self._extractor = Extractor(compute, self._encoder, batch_size=settings.batch_size, decode_threads=settings.decode_threads)

    def pid(self) -> int:
        return os.getpid()

    def encode(self, work: ShardWork, attempt: int) -> int:
        """Publish every part of `work`; the number of rows.

        Raises ShardError where the shard cannot be read, RunError where a part cannot be written or this is not the device that its bank names.
        """
        node = ray.util.get_node_ip_address()
        check_device(self._settings.device_type, gpu=self._settings.gpus > 0, node=node)
        parts = self._extractor.run(work, node=node, attempts=attempt)
        for bank, rows, receipt in parts:
            self._store.write_part(bank, rows, receipt)
        return sum(receipt.rows for _, _, receipt in parts)

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
        remote = ray.remote(num_cpus=self._settings.cpus, num_gpus=self._settings.gpus, max_restarts=0, max_task_retries=0)(EncoderActor)
        return remote.remote(self._settings, self._encoders)

    def lease(self, actor: Any, work: ShardWork, attempt: int) -> Any:
        return actor.encode.remote(work, attempt)

    def replace(self, actor: Any) -> Any:
        self.actors.remove(actor)
        fresh = self._start()
        self.actors.append(fresh)
        return fresh

    def release(self) -> None:
        """Give every actor's resources back: a search that waits for them would wait for ever."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
