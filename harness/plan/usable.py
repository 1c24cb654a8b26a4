"""A check of the shards before anything is started: whether a split has a sample that the run can use.

The first usable sample ends the check of its split. The run's own reader and decoder decide what is usable.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from harness.data.manifest import Shard
from harness.data.shards import ShardAudit, Source, in_order, read_samples, with_count
from harness.errors import RequestError, ShardError
from harness.plan.plan import Plan

PER_SHARD, PER_SPLIT = 32, 96
"""Number of unusable samples after which the check turns to the next shard, and after which it is done with the split."""
SECONDS = 10.0
"""Seconds after which an undecided check ends; its split then counts as usable."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A split of which no sample is usable."""

    dataset: str
    split: str
    reason: str
    """The first reason, in the ledger's words, and the number of samples."""

    def __str__(self) -> str:
        return f"{self.dataset}/{self.split} has no usable sample: {self.reason}"


def lost_splits(plan: Plan, unread: Iterable[tuple[str, str]]) -> list[Loss]:
    """The splits among `unread`, (data set, split), of which no sample is usable.

    Raises RequestError where that holds for every split of a data set that the plan reads: its studies could only fail.
    """
    losses = []
    for dataset, split in dict.fromkeys(unread):
        loss = find_loss(plan.source(dataset, split), dataset, split)
        losses += [loss] if loss else []
    for dataset in dict.fromkeys(loss.dataset for loss in losses):
        mine = [loss for loss in losses if loss.dataset == dataset]
        if {loss.split for loss in mine} >= plan.splits_read(dataset):
            reasons = "; ".join(f"{loss.split}: {loss.reason}" for loss in mine)
            raise RequestError(f"{dataset}: expected a usable sample, got none ({reasons}); mend the shards or what the manifest says of them")
    return losses


def find_loss(source: Source, dataset: str, split: str, clock: Callable[[], float] = time.monotonic) -> Loss | None:
    """None where the split has a usable sample, where it is empty, or where the time ran out before the check was decided."""
    deadline, unusable, unreadable, reasons = clock() + SECONDS, 0, 0, list[tuple[str, str]]()
    for url, shard in _spread([(url, shard) for url, shard in source.shards if shard.samples]):
        audit = _Bounded(shard=shard.file, expected=shard.samples)
        try:
            if _has_usable(url, shard, source, audit):
                return None
            audit.close()
        except _Enough:
            pass
        except ShardError as error:
            audit.note("shard lost", str(error))
            unreadable += shard.samples - audit.failed
        unusable += audit.failed
        reasons += [(reason, names[0]) for reason, names in audit.reasons.items()]
        if unusable >= PER_SPLIT:
            break
        if clock() > deadline:
            return None
    if not reasons:
        return None
    looked = unusable + unreadable
    count = f"{looked:,} of {source.samples:,} samples" if looked >= source.samples else f"all of the {looked:,} samples that were looked at"
    return Loss(dataset=dataset, split=split, reason=with_count(*reasons[0], count))


class _Enough(Exception):
    """No more samples of this shard need to be looked at."""


@dataclass(kw_only=True)
class _Bounded(ShardAudit):
    """An account that ends the reading of its shard: a reader skips incomplete records without returning them."""

    def fail(self, key: str, reason: str | ShardError) -> None:
        super().fail(key, reason)
        if self.failed >= PER_SHARD:
            raise _Enough


def _has_usable(url: str, shard: Shard, source: Source, audit: ShardAudit) -> bool:
    with contextlib.closing(in_order(read_samples(url, shard, source.rules, audit), threads=1, ahead=1)) as samples:  # type: ignore[type-var]
        for key, sample in samples:
            if not isinstance(sample, ShardError):
                return True
            audit.fail(key, sample)
    return False


def _spread(shards: list[tuple[str, Shard]]) -> Iterator[tuple[str, Shard]]:
    """The first, the middle and the last, then the others: one bad stretch does not stand for the whole."""
    places = dict.fromkeys((0, len(shards) // 2, len(shards) - 1, *range(len(shards))) if shards else ())
    for place in places:
        yield shards[place]
