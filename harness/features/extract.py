"""One shard through encoders: each image decoded once, each distinct view prepared once per preprocessing and encoded once per encoder.

Batches never cross a shard and are padded to the batch size, so a row's bytes depend on neither the number of actors nor their order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from harness.core import Encoder, Item, Preprocessing, Sample, View
from harness.data.manifest import Rules, Shard
from harness.data.preprocess import prepare, prepare_mask
from harness.data.shards import ShardAudit, in_order, read_samples
from harness.errors import ShardError
from harness.features.bank import BankSpec, LeasedBank, PartRows, Receipt
from harness.features.device import Compute, Precision
from harness.features.readouts import Readout, blocks_needed, parse_readout, read


@dataclass(frozen=True, kw_only=True)
class BankJob:
    """One readout of a pass and the bank it goes to."""

    readout: str
    bank: BankSpec | LeasedBank


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One encoder over one view, for all the readouts that are wanted of it."""

    encoder: str
    """The encoder's name in the sweep."""
    view: View
    banks: tuple[BankJob, ...]
    precision: Precision = "float32"
    """What the encoder computes in, as the banks' keys say: the run's precision, or float32, in which nothing is cast."""


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """What is to be done with one shard, in one reading of it."""

    dataset: str
    split: str
    url: str
    shard: Shard
    rules: Rules
    passes: tuple[Pass, ...]

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.split}/{self.shard.file}"

    @property
    def items(self) -> int:
        """Items that pass encoders, counting one per sample for views of which only the image tells how many."""
        return self.shard.samples * sum(encoder_pass.view.items for encoder_pass in self.passes)


class _Recipe(NamedTuple):
    """What two passes must share for one preparation of an item to serve both."""

    view: str
    preprocessing: Preprocessing
    grid: tuple[int, int] | None
    """The encoder's patch grid, where the view's alteration is in terms of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    item: Item
    image: torch.Tensor
    """float32 [3, H, W], normalised."""
    masks: dict[str, np.ndarray]
    keep: torch.Tensor | None = None
    positions: torch.Tensor | None = None


@dataclass(kw_only=True, eq=False)
class _Running:
    """One pass while its shard streams by."""

    recipe: _Recipe
    encoder: Encoder
    precision: Precision
    readouts: list[Readout]
    rows: list[PartRows]
    waiting: list[_Prepared] = field(default_factory=list)
    seconds: float = 0.0


class Extractor:
    """Encodes shards on one device; `encoder` gives the encoder of a name, placed there."""

    def __init__(self, compute: Compute, encoder: Callable[[str], Encoder], *, batch_size: int, decode_threads: int) -> None:
        self._compute = compute
        self._encoder = encoder
        self._batch_size = batch_size
        self._decode_threads = decode_threads

    def run(self, work: ShardWork, *, node: str, attempts: int) -> list[tuple[BankSpec | LeasedBank, PartRows, Receipt]]:
        """One part for every bank of `work`. Raises ShardError where the shard cannot be read at all."""
        audit = ShardAudit(shard=work.shard.file, expected=work.shard.samples)
        running = [self._start(one_pass) for one_pass in work.passes]
        views = {current.recipe: one_pass.view for current, one_pass in zip(running, work.passes, strict=True)}
        jobs = ((key, partial(_prepare, decode, views)) for key, decode in read_samples(work.url, work.shard, work.rules, audit))
        for key, prepared in in_order(jobs, self._decode_threads):
            if isinstance(prepared, ShardError):
                audit.fail(key, prepared)
                continue
            audit.seen += 1
            for current in running:
                current.waiting += prepared[current.recipe]
                while len(current.waiting) >= self._batch_size:
                    self._encode(current)
        for current in running:
            if current.waiting:
                self._encode(current)
        audit.close()
        return [
            (
                job.bank,
                rows,
                Receipt.of(
                    audit,
                    bank_key=job.bank.key,
                    attempts=attempts,
                    node=node,
                    rows=len(rows.keys),
                    seconds=current.seconds,
                    images=len(rows.keys),
                ),
            )
            for one_pass, current in zip(work.passes, running, strict=True)
            for job, rows in zip(one_pass.banks, current.rows, strict=True)
        ]

    def _start(self, work: Pass) -> _Running:
        encoder = self._encoder(work.encoder)
        return _Running(
            recipe=_Recipe(work.view.identity, encoder.info.preprocessing, encoder.info.grid if work.view.alteration is not None else None),
            encoder=encoder,
            precision=work.precision,
            readouts=[parse_readout(job.readout) for job in work.banks],
            rows=[PartRows() for _ in work.banks],
        )

    def _encode(self, current: _Running) -> None:
        """Encode the first waiting items, at most a batch of them, padded to a batch with copies of the first."""
        start = time.perf_counter()
        batch, current.waiting = current.waiting[: self._batch_size], current.waiting[self._batch_size :]
        images = self._batch([prepared.image for prepared in batch])
        info = current.encoder.info
        with torch.inference_mode(), self._autocast(current.precision):
            tokens = current.encoder.encode(
                images,
                keep=self._batch_of_choices([prepared.keep for prepared in batch]),
                positions=self._batch_of_choices([prepared.positions for prepared in batch]),
                blocks=blocks_needed(current.readouts, info),
                projection=any(readout.pooling == "projection" for readout in current.readouts),
            )
            features = [read(tokens, readout, info) for readout in current.readouts]
        for readout, rows, values in zip(current.readouts, current.rows, features, strict=True):
            half = readout.is_dense and current.precision != "float32"
            array = values[: len(batch)].to("cpu", torch.float16 if half else torch.float32).numpy()
            _append(rows, batch, array, with_masks=readout.has_masks)
        current.seconds += time.perf_counter() - start

    def _autocast(self, precision: Precision) -> AbstractContextManager[Any]:
        """A pass's own precision: this process's, or float32. Raises ValueError for another one, which this process cannot compute in."""
        if precision == self._compute.precision:
            return self._compute.autocast()
        if precision != "float32":
            able = " or ".join(sorted({"float32", self._compute.precision}, reverse=True))
            raise ValueError(f"expected a pass in {able}, got {precision}")
        return torch.autocast(self._compute.device.type, enabled=False)

    def _batch(self, values: list[torch.Tensor]) -> torch.Tensor:
        """[batch size, ...] on the device, padded with copies of the first."""
        stacked = torch.stack(values + values[:1] * (self._batch_size - len(values)))
        return stacked.to(self._compute.device, non_blocking=True)

    def _batch_of_choices(self, values: list[torch.Tensor | None]) -> torch.Tensor | None:
        """Of tokens or positions: all the images of a view have a choice, or none has."""
        chosen = [value for value in values if value is not None]
        return self._batch(chosen) if chosen else None


def _prepare(decode: Callable[[], Sample], views: dict[_Recipe, View]) -> dict[_Recipe, list[_Prepared]]:
    """Everything that the passes need of one sample: decoded once, each view taken once, each item prepared once per preprocessing."""
    sample = decode()
    items: dict[str, list[Item]] = {}
    prepared = {}
    for recipe, view in views.items():
        if recipe.view not in items:
            items[recipe.view] = view(sample)
        prepared[recipe] = [_prepare_item(item, view, recipe) for item in items[recipe.view]]
    return prepared


def _prepare_item(item: Item, view: View, recipe: _Recipe) -> _Prepared:
    image = prepare(item.image, recipe.preprocessing, view.fit)
    masks = {name: prepare_mask(mask, recipe.preprocessing, view.fit) for name, mask in item.masks.items()}
    if view.alteration is None or recipe.grid is None:
        return _Prepared(item=item, image=image, masks=masks)
    altered = view.alteration(image, recipe.grid, item.key)
    return _Prepared(item=item, image=altered.image, masks={**masks, **altered.marks}, keep=altered.keep, positions=altered.positions)


def _append(rows: PartRows, batch: list[_Prepared], features: np.ndarray, *, with_masks: bool) -> None:
    for prepared, feature in zip(batch, features, strict=True):
        rows.keys.append(prepared.item.key)
        rows.groups.append(prepared.item.group)
        rows.targets.append(-1 if prepared.item.target is None else prepared.item.target)
        rows.features.append(feature)
        if with_masks:
            for name, mask in prepared.masks.items():
                rows.masks.setdefault(name, []).append(mask)
