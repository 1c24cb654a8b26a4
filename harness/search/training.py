"""The training of a stream's heads: epochs over the train stream, each in an order of its own, and where a checkpoint leaves them. Plain torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from harness.core import Proposal, Sample, StreamEncoder, Trainer
from harness.data.augment import draw
from harness.data.epochs import Epoch
from harness.data.shards import ShardAudit, Source
from harness.errors import ProbeError
from harness.features.bank import BankStore
from harness.search.head_store import numbered, of_head
from harness.search.study import BankRef, Stream, Study


@dataclass(kw_only=True)
class Position:
    """Where a training is, as its checkpoint says."""

    proposals: list[list[Any]]
    epoch: int = 0
    position: int = 0
    """Samples of the epoch that were taken."""
    step: int = 0
    lost: dict[str, str] = field(default_factory=dict)
    """Key to reason, of the epoch's samples that did not decode."""
    audits: list[dict[str, Any]] = field(default_factory=list)
    """Of every shard that of the epoch in which it lost most; empty before the first epoch has ended."""
    starts: int = 0
    images: int = 0
    seconds: float = 0.0
    labels: list[int] = field(default_factory=list)
    """Those that were trained on, ascending."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file that holds a training on its way: everything that its next step depends on."""

    store: BankStore
    place: tuple[str, str]

    @staticmethod
    def of(store: BankStore, study: Study, index: int, head: int | None = None) -> Checkpoint:
        """Of a round, or of one head of it, where each is trained alone.

        In the folder of the train stream, so that what discards its accounts discards this.
        """
        suffix = "" if head is None else f"-{head}"
        return Checkpoint(store=store, place=(train_ref(study).bank.key, f"checkpoint-{study.id}-{index}{suffix}.safetensors"))

    def exists(self) -> bool:
        return self.store.read_bytes(*self.place) is not None

    def resume(self, proposals: Sequence[Proposal], trainer: Trainer[Any]) -> Position:
        """Where this very training is, with its heads loaded; the beginning, where nothing was saved of it."""
        fresh = Position(proposals=[list(proposal) for proposal in proposals], starts=1)
        data = self.store.read_bytes(*self.place)
        if data is None:
            return fresh
        tensors = load_tensors(data)
        progress = Position(**json.loads(bytes(tensors.pop("progress").tolist())))
        if progress.proposals != fresh.proposals:
            return fresh
        trainer.load([of_head(tensors, number) for number in range(len(proposals))])
        return replace(progress, starts=progress.starts + 1)

    def save(self, progress: Position, trainer: Trainer[Any], encoder: StreamEncoder) -> None:
        """Replace what was saved before; what the encoder has done since then counts as done."""
        position = replace(progress, images=progress.images + encoder.images, seconds=progress.seconds + encoder.seconds)
        tensors = numbered(dict(enumerate(trainer.state())))
        tensors["progress"] = torch.tensor(list(json.dumps(asdict(position)).encode()), dtype=torch.uint8)
        self.store.publish(self.place, save_tensors(tensors), replace=True)

    def discard(self) -> None:
        self.store.discard(*self.place)


@dataclass(kw_only=True, eq=False)
class Training:
    """Epochs over the train stream until the protocol's end."""

    study: Study
    source: Source
    held: frozenset[str]
    trainer: Trainer[Any]
    progress: Position
    save: Callable[[Position], None]
    clock: Callable[[], float]
    until: int | None = None
    """Epochs after which to pause; None for the protocol's end."""

    def run(self) -> None:
        """Raises ProbeError where an epoch has no sample that can be trained on, or none of what was trained on has a label."""
        self._samples = self.source.samples - len(self.held)
        self._steps = self.trainer.steps(-(-self._samples // self.trainer.batch_size))
        self._saved = self.clock()
        while not self._ended:
            before = self.progress.step, self.progress.position
            self._epoch()
            if before == (self.progress.step, 0):
                break
        if not self.progress.step:
            raise ProbeError("expected train samples, got none that can be used; look at the data set's shards")
        if not self.progress.labels:
            raise ProbeError("expected labels to train on, got none in all that was seen of train; look at the data set's labels and at ignore_label")

    @property
    def _ended(self) -> bool:
        last = self.trainer.epochs if self.until is None else self.until
        return self.progress.step >= self._steps or (last is not None and self.progress.epoch >= last)

    def _epoch(self) -> None:
        progress, seed = self.progress, self.study.seed
        epoch = Epoch(
            source=self.source,
            threads=stream_of(self.study).decode_threads,
            order=draw(seed, progress.epoch, "order of the samples"),
            belongs=lambda key: key not in self.held,
            skip=progress.position,
            lost=progress.lost,
        )
        batch: list[Any] = []
        position = progress.position
        with epoch.reading(partial(_drawn, self.trainer, seed, progress.epoch)) as samples:
            for sample in samples:
                batch.append(sample.value)
                position = sample.position
                if len(batch) < self.trainer.batch_size:
                    continue
                self._step(batch, position)
                batch = []
                if progress.step >= self._steps and position < self._samples:
                    self._save()
                    return  # the protocol ends within an epoch
        if batch:
            self._step(batch, position)
        progress.audits = worst_of(progress.audits, epoch.audits)
        progress.epoch, progress.position, progress.lost = progress.epoch + 1, 0, {}
        self._save()

    def _step(self, batch: Sequence[Any], position: int) -> None:
        progress = self.progress
        self.trainer.step(batch, progress.step, self._steps)
        progress.step += 1
        progress.position = position
        progress.labels = sorted({*progress.labels, *(label for example in batch for label in example.shown)})
        last = progress.step >= self._steps  # after which the epoch ends and saves
        if not last and self.clock() - self._saved >= stream_of(self.study).checkpoint_seconds:
            self._save()

    def _save(self) -> None:
        self.save(self.progress)
        self._saved = self.clock()


def _drawn(trainer: Trainer[Any], seed: int, epoch: int, sample: Sample) -> Any:
    return trainer.draw(sample, draw(seed, epoch, sample.key))


def worst_of(before: Sequence[Mapping[str, Any]], audits: Sequence[ShardAudit]) -> list[dict[str, Any]]:
    """Of every shard the account of the epoch that lost most of it."""
    fresh = [asdict(audit) for audit in audits]
    return [new if new["failed"] > old["failed"] else dict(old) for old, new in zip(before, fresh, strict=True)] if before else fresh


def stream_of(study: Study) -> Stream:
    if study.stream is None:
        raise ProbeError(f"{study.name}: expected a streamed study, got one that reads banks")
    return study.stream


def train_ref(study: Study) -> BankRef:
    """The train stream, which is the same for all readouts."""
    return next(iter(study.train.values()))


def source_of(ref: BankRef) -> Source:
    if ref.source is None:
        raise ProbeError(f"stream {ref.bank.key}: expected its shards, got none; this study reads banks")
    return ref.source
