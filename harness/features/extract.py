"""One shard through encoders: each image decoded once, each distinct view prepared once per preprocessing and encoded once per encoder.

Batches never cross a shard and are padded to the batch size, so a row's bytes depend on neither the number of actors nor their order. Two shards may
be in flight at once: the next one is read and prepared while one is encoded.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from harness.core import Encoder, Item, Preprocessing, Sample, View
from harness.data.manifest import Rules, Shard
from harness.data.preprocess import normalise, prepare_mask, prepare_pixels
from harness.data.shards import ShardAudit, read_samples
from harness.errors import ShardError
from harness.features.ahead import Ahead, Weight
from harness.features.bank import BankSpec, LeasedBank, Receipt, ShardRows
from harness.features.device import Compute, Precision
from harness.features.readouts import Readout, blocks_needed, parse_readout, read
from harness.features.transfers import OnItsWay, Transfers

IN_FLIGHT = 2
"""Shards that an extractor works on at a time: one is encoded, the next one read."""
Part = tuple[BankSpec | LeasedBank, ShardRows, Receipt]


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
    """An item as the encoder takes it, and what stays of it beside its features."""

    key: str
    group: str
    target: int | None
    image: torch.Tensor
    """uint8 [H, W, 3], to be normalised on the device; of a view with an alteration float32 [3, H, W], normalised."""
    masks: dict[str, np.ndarray]
    keep: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        return self.image.nbytes + sum(mask.nbytes for mask in self.masks.values())


@dataclass(kw_only=True, eq=False)
class _Running:
    """One pass while its shard streams by."""

    recipe: _Recipe
    encoder: Encoder
    precision: Precision
    readouts: list[Readout]
    rows: list[ShardRows]
    waiting: list[_Prepared] = field(default_factory=list)
    on_its_way: tuple[list[_Prepared], OnItsWay] | None = None
    """The batch that was encoded last, and its features."""
    seconds: float = 0.0


class Extractor:
    """Encodes shards on one device; `encoder` gives the encoder of a name, placed there. May be used by several threads at once."""

    def __init__(self, compute: Compute, encoder: Callable[[str], Encoder], *, batch_size: int, decode_threads: int) -> None:
        self._compute = compute
        self._encoder = encoder
        self._loading = threading.Lock()
        self._batch_size = batch_size
        self._ahead: Ahead[dict[_Recipe, list[_Prepared]]] = Ahead(decode_threads, least=2 * batch_size)
        self._transfers = Transfers(compute.device)
        self._runs = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="encode")

    def start(self, work: ShardWork, *, node: str, attempts: int) -> Future[list[Part]]:
        """What `run` will give. Shards are encoded in the order of these calls, and read ahead while the one before them is encoded."""
        return self._runs.submit(self.run, work, node=node, attempts=attempts)

    def each(self, works: Iterable[ShardWork], *, node: str) -> Iterator[tuple[ShardWork, Future[list[Part]]]]:
        """Every work in its order, and what `run` gives for it, with `IN_FLIGHT` of them begun. Closing the iterator gives up the others."""
        begun = deque[tuple[ShardWork, Future[list[Part]]]]()
        try:
            for work in works:
                begun.append((work, self.start(work, node=node, attempts=1)))
                if len(begun) == IN_FLIGHT:
                    yield begun.popleft()
            while begun:
                yield begun.popleft()
        except BaseException:
            self._ahead.close()
            raise

    def run(self, work: ShardWork, *, node: str, attempts: int) -> list[Part]:
        """One part for every bank of `work`. Raises ShardError where the shard cannot be read at all."""
        self._compute.use_threads()
        with self._loading:
            running = [self._start(current) for current in work.passes]
        views = {current.recipe: one_pass.view for current, one_pass in zip(running, work.passes, strict=True)}
        audit, decoded = (ShardAudit(shard=work.shard.file, expected=work.shard.samples) for _ in range(2))
        jobs = ((key, partial(_prepare, decode, views)) for key, decode in read_samples(work.url, work.shard, work.rules, audit))
        with self._ahead.shard(jobs, _weigh) as samples:
            for key, prepared in samples:
                if isinstance(prepared, ShardError):
                    decoded.fail(key, prepared)
                    continue
                decoded.seen += 1
                for current in running:
                    current.waiting += prepared[current.recipe]
                    while len(current.waiting) >= self._batch_size:
                        self._encode(current)
            for current in running:
                if current.waiting:
                    self._encode(current)
            for current in running:
                self._fetch(current)
        audit.take(decoded)
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
            rows=[ShardRows() for _ in work.banks],
        )

    def _encode(self, current: _Running) -> None:
        """Encode the first waiting items, at most a batch of them, padded to a batch with copies of the first; then fetch the batch before it."""
        batch, current.waiting = current.waiting[: self._batch_size], current.waiting[self._batch_size :]
        images = self._transfers.batch([prepared.image for prepared in batch], self._batch_size)
        keep, positions = self._choices([prepared.keep for prepared in batch]), self._choices([prepared.positions for prepared in batch])
        under_way = batch, self._transfers.compute(lambda: self._features(current, images, keep, positions, len(batch)))
        self._fetch(current)
        current.on_its_way = under_way

    def _features(
        self, current: _Running, images: torch.Tensor, keep: torch.Tensor | None, positions: torch.Tensor | None, count: int
    ) -> list[torch.Tensor]:
        """Of each readout the features of the first `count` images, in the type that its bank keeps them in."""
        info = current.encoder.info
        with torch.inference_mode(), self._autocast(current.precision):
            tokens = current.encoder.encode(
                normalise(images, info.preprocessing) if images.dtype == torch.uint8 else images,
                keep=keep,
                positions=positions,
                blocks=blocks_needed(current.readouts, info),
                projection=any(readout.pooling == "projection" for readout in current.readouts),
            )
            features = [read(tokens, readout, info)[:count] for readout in current.readouts]
            halves = [readout.is_dense and current.precision != "float32" for readout in current.readouts]
            return [values.to(torch.float16 if half else torch.float32) for values, half in zip(features, halves, strict=True)]

    def _fetch(self, current: _Running) -> None:
        """Add the features of the batch that was encoded last to the rows."""
        if current.on_its_way is None:
            return
        batch, features = current.on_its_way
        current.on_its_way = None
        arrays, seconds = features.wait()
        current.seconds += seconds
        for readout, rows, array in zip(current.readouts, current.rows, arrays, strict=True):
            _append(rows, batch, array, with_masks=readout.has_masks)

    def _autocast(self, precision: Precision) -> AbstractContextManager[Any]:
        """A pass's own precision: this process's, or float32. Raises ValueError for another one, which this process cannot compute in."""
        if precision == self._compute.precision:
            return self._compute.autocast()
        if precision != "float32":
            able = " or ".join(sorted({"float32", self._compute.precision}, reverse=True))
            raise ValueError(f"expected a pass in {able}, got {precision}")
        return torch.autocast(self._compute.device.type, enabled=False)

    def _choices(self, values: list[torch.Tensor | None]) -> torch.Tensor | None:
        """A batch of tokens or positions: all the images of a view have a choice, or none has."""
        chosen = [value for value in values if value is not None]
        return self._transfers.batch(chosen, self._batch_size) if chosen else None


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
    image = prepare_pixels(item.image, recipe.preprocessing, view.fit)
    masks = {name: prepare_mask(mask, recipe.preprocessing, view.fit) for name, mask in item.masks.items()}
    prepared = _Prepared(key=item.key, group=item.group, target=item.target, image=image, masks=masks)
    if view.alteration is None or recipe.grid is None:
        return prepared
    altered = view.alteration(normalise(image[None], recipe.preprocessing)[0], recipe.grid, item.key)
    return replace(prepared, image=altered.image, masks={**masks, **altered.marks}, keep=altered.keep, positions=altered.positions)


def _weigh(prepared: dict[_Recipe, list[_Prepared]]) -> Weight:
    return Weight(
        items=max(map(len, prepared.values()), default=0),
        bytes=sum(item.bytes for items in prepared.values() for item in items),
    )


def _append(rows: ShardRows, batch: list[_Prepared], features: np.ndarray, *, with_masks: bool) -> None:
    for prepared, feature in zip(batch, features, strict=True):
        rows.keys.append(prepared.key)
        rows.groups.append(prepared.group)
        rows.targets.append(-1 if prepared.target is None else prepared.target)
        rows.features.append(feature)
        if with_masks:
            for name, mask in prepared.masks.items():
                rows.masks.setdefault(name, []).append(mask)
