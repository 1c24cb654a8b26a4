"""How fast a plan's encoders are: from the accounts of earlier runs in the cache, else from a few batches timed here, else unknown."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.encoders import EncoderSpec, load
from harness.features.bank import BankSpec, BankStore
from harness.features.device import Compute, device_type
from harness.plan.plan import Plan

_BANKS, _PARTS = 400, 8
"""How many banks of the cache are looked at, the newest first, and how many parts of each."""
_TIMED_BATCH = {True: 64, False: 2}
"""Images in a timed batch, on a GPU and on a CPU: the same order of speed as the run's own batches, in seconds."""
_TIMED_SECONDS, _TIMED_BATCHES = 1.0, 8


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast an encoder is at its own input size."""

    images_per_second: float | None
    """Of one actor; None where it is unknown."""
    basis: str


class Speeds:
    """Speeds of a plan's encoders; those of one architecture, input size and precision are one, whatever their weights."""

    def __init__(self, plan: Plan, store: BankStore) -> None:
        self._plan, self._store = plan, store
        self._timed: dict[tuple[Any, ...], Speed] = {}

    def of_all(self, encoders: Sequence[str] | Mapping[str, Any]) -> dict[str, Speed]:
        """Of each of these encoders: from accounts where there are any, timed where that is possible here, else unknown."""
        if not encoders:
            return {}
        banks = list(banks_with_accounts(self._store, self._plan))
        return {name: self._from_accounts(name, banks) or self._timed_once(name) for name in encoders}

    def _from_accounts(self, name: str, banks: Sequence[BankSpec]) -> Speed | None:
        info, resources = self._plan.infos[name], self._plan.sweep.resources
        same = {
            "architecture": info.architecture,
            "device_type": self._plan.device_type,
            "precision": self._plan.precision_of(info),
            "threads": resources.threads,
        }
        images = seconds = 0.0
        for bank in banks:
            identity = dict(bank.identity)
            size = list((identity.get("preprocessing") or {}).get("size") or ())
            # streams have images of other sizes, and altered views may drop tokens: neither gives the speed of a plain image
            if bank.readout == "stream" or bank.view.startswith("whole;") or size != list(info.preprocessing.size):
                continue
            if any(identity.get(key) != value for key, value in same.items()):
                continue
            for file, _, _ in bank.shards[:_PARTS]:
                receipt = self._store.receipt(bank, file)
                if receipt is not None and receipt.images and receipt.seconds > 0:
                    images, seconds = images + receipt.images, seconds + receipt.seconds
        if not images:
            return None
        return Speed(images_per_second=images / seconds, basis=f"from the accounts of {images:,.0f} images in the cache")

    def _timed_once(self, name: str) -> Speed:
        info, plan = self._plan.infos[name], self._plan
        gpu = not plan.device_type.startswith("cpu:")
        if (gpu and not torch.cuda.is_available()) or device_type(gpu) != plan.device_type:
            return Speed(
                images_per_second=None, basis=f"no earlier run on {plan.device_type} in the cache, and none of these devices here to time it on"
            )
        key = (info.family, info.architecture, info.preprocessing.size, plan.precision_of(info))
        if key not in self._timed:
            compute = Compute(plan.precision_of(info), gpu, plan.sweep.resources.threads)
            self._timed[key] = timed(plan.encoders[name], compute, min(_TIMED_BATCH[gpu], plan.sweep.resources.batch_size))
        return self._timed[key]


def timed(spec: EncoderSpec, compute: Compute, batch_size: int) -> Speed:
    """An encoder's speed on batches of noise, after one that does not count; takes a second or the time of two batches."""
    encoder = load(spec)
    encoder.module.to(compute.device)
    images = torch.randn(batch_size, 3, *encoder.info.preprocessing.size, generator=torch.Generator().manual_seed(0)).to(compute.device)
    spent: list[float] = []
    with torch.inference_mode(), compute.autocast():
        _encoded_seconds(encoder, images)
        while len(spent) < _TIMED_BATCHES and sum(spent) < _TIMED_SECONDS:
            spent.append(_encoded_seconds(encoder, images))
    count = len(spent) * batch_size
    return Speed(images_per_second=count / sum(spent), basis=f"timed just now on {count} images in batches of {batch_size}")


def _encoded_seconds(encoder: Any, images: torch.Tensor) -> float:
    start = time.perf_counter()
    encoder.encode(images).patches.float().mean().item()  # a number on the CPU: all that was queued on a GPU is done
    return time.perf_counter() - start


def banks_with_accounts(store: BankStore, plan: Plan) -> Iterator[BankSpec]:
    """Banks that may tell how fast an encoder is: the plan's own, and the newest others of a cache on this machine."""
    planned = {bank.key: bank for study in plan.studies for bank in study.specs if study.task.feed == "banked"}
    yield from planned.values()
    if "://" in store.root:  # to list and read hundreds of small files of an object store would take longer than the timing saves
        return
    files = sorted(Path(store.root).glob("*/bank.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[:_BANKS]:
        if path.parent.name in planned:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            plain = json.loads(path.read_text(encoding="utf-8"))
            identity = tuple(sorted(plain["identity"].items()))
            shards = tuple((file, digest, samples) for file, digest, samples in plain["shards"])
            bank = BankSpec(**{name: plain[name] for name in ("dataset", "split", "readout", "view")}, shards=shards, identity=identity)
            if bank.key == path.parent.name:
                yield bank
