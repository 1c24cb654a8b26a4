"""The shards of a split as training reads them: shuffled anew every epoch, every sample once, an account of each, and to be gone on with anywhere.

The order is a function of (seed, epoch): shards in a random order, a few of them open at a time and read from by turns that are drawn, and a buffer
of undecoded samples from which the next one is drawn. What was passed over already is read again on a resume, but neither decoded nor encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from harness.core import Sample
from harness.data.shards import ShardAudit, Source, attempt, in_order, read_samples, reason_of
from harness.errors import ShardError, is_of_the_place

OPEN_SHARDS = 8
BUFFER = 2048
"""Samples, undecoded: some 200 MiB of JPEGs of half a megapixel."""

T = TypeVar("T")
Unread = tuple[ShardAudit, str, Callable[[], Sample]]
"""The account of a sample's shard, the sample's key, and its decoder."""


@dataclass(frozen=True, kw_only=True)
class Fed(Generic[T]):
    """One sample as it comes by."""

    key: str
    value: T
    position: int
    """Samples of the epoch that were taken so far, this one and the broken ones among them."""


@dataclass(kw_only=True)
class Epoch:
    """One pass over a source. After the last sample its account is closed."""

    source: Source
    threads: int
    order: np.random.Generator | None = None
    """Of the shuffle; None reads in the manifest's order."""
    belongs: Callable[[str], bool] = lambda _: True
    """Which keys belong to this pass; the others are read past, and count as seen."""
    skip: int = 0
    """Samples that were taken before an interruption."""
    lost: dict[str, str] = field(default_factory=dict)
    """Key to reason, of samples that do not decode."""
    lost_of: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same by shard; complete after the last sample."""
    audits: list[ShardAudit] = field(default_factory=list)
    """One a shard, in the manifest's order; complete after the last sample."""
    _repeated: list[tuple[str, int, int]] = field(default_factory=list, init=False)
    """Key, place of the shard whose sample was taken, place of one that has it as well, in the order read."""

    @contextmanager
    def reading(self, prepare: Callable[[Sample], T]) -> Iterator[Iterator[Fed[T]]]:
        """`read`, for those who may stop before its end."""
        samples = self.read(prepare)
        try:
            yield samples
        finally:
            samples.close()

    def read(self, prepare: Callable[[Sample], T]) -> Generator[Fed[T], None, None]:
        """Every wanted sample that `prepare`, called in threads, makes something of. It raises ShardError where a sample cannot be used."""
        self.audits = [ShardAudit(shard=shard.file, expected=shard.samples) for _, shard in self.source.shards]
        self._repeated, self.lost_of = [], {}
        for position, (audit, key, result) in enumerate(_prepared(self._taken(), prepare, self.threads), start=1):
            if result is None:  # taken before the interruption
                self._count(audit, key, self.lost.get(key))
            elif isinstance(result, ShardError):
                self.lost[key] = reason_of(result)
                self._count(audit, key, result)
            else:
                self._count(audit, key, None)
                yield Fed(key=key, value=result, position=position)
        self._charge_repeated()
        for audit in self.audits:
            audit.close()

    def _count(self, audit: ShardAudit, key: str, reason: str | ShardError | None) -> None:
        if reason is None:
            audit.seen += 1
        else:
            audit.fail(key, reason)
            self.lost_of.setdefault(audit.shard, {})[key] = reason_of(reason)

    def _taken(self) -> Iterator[tuple[Unread, bool]]:
        """The wanted samples in their order, and whether each was taken before."""
        unread = self._unread() if self.order is None else _shuffled(self._unread(), self.order)
        for position, sample in enumerate(unread):
            yield sample, position < self.skip

    def _unread(self) -> Iterator[Unread]:
        places = range(len(self.audits)) if self.order is None else self.order.permutation(len(self.audits))
        shards = [self._shard(int(place)) for place in places]
        place_of = {audit.shard: place for place, audit in enumerate(self.audits)}
        taken: dict[str, int] = {}
        for audit, key, decode in _in_turns(shards, 1 if self.order is None else OPEN_SHARDS, self.order):
            place = place_of[audit.shard]
            if taken.setdefault(key, place) != place:
                self._repeated.append((key, taken[key], place))
            elif self.belongs(key):
                yield audit, key, decode
            else:
                audit.seen += 1

    def _charge_repeated(self) -> None:
        """Count a sample that several shards have in the first by the manifest, whichever the order came upon first: every epoch's account is one."""
        for key, taken, left in self._repeated:
            charged, holder = self.audits[left], self.audits[taken]
            if left < taken and key not in self.lost:
                charged, holder = holder, charged
                charged.seen -= 1
                holder.seen += 1
            charged.duplicates += 1
            charged.fail(f"{key}, which {holder.shard} has", "duplicate key")

    def _shard(self, place: int) -> Iterator[Unread]:
        (url, shard), audit = self.source.shards[place], self.audits[place]
        try:
            for key, decode in read_samples(url, shard, self.source.rules, audit):
                yield audit, key, decode
        except ShardError as error:
            if is_of_the_place(error):
                raise  # a network that is down, say: what was trained without the rest of the shard would be another outcome
            audit.note("shard lost" if not audit.seen and not audit.failed else "truncated", str(error))


def _in_turns(shards: Sequence[Iterator[Unread]], count: int, order: np.random.Generator | None) -> Iterator[Unread]:
    """Samples of all shards, `count` of them open at a time, whose turn it is being drawn."""
    waiting, reading = list(shards), list[Iterator[Unread]]()
    while waiting or reading:
        while waiting and len(reading) < count:
            reading.append(waiting.pop(0))
        place = 0 if order is None else int(order.integers(len(reading)))
        with suppress(StopIteration):
            yield next(reading[place])
            continue
        reading.pop(place)


def _shuffled(samples: Iterator[Unread], order: np.random.Generator) -> Iterator[Unread]:
    held: list[Unread] = []
    for sample in samples:
        if len(held) < BUFFER:
            held.append(sample)
            continue
        place = int(order.integers(BUFFER))
        yield held[place]
        held[place] = sample
    for place in order.permutation(len(held)):
        yield held[place]


def _prepared(
    taken: Iterator[tuple[Unread, bool]], prepare: Callable[[Sample], T], threads: int
) -> Iterator[tuple[ShardAudit, str, T | ShardError | None]]:
    """What `prepare` makes of each sample, in order; None where it was taken before."""

    def job(audit: ShardAudit, key: str, decode: Callable[[], Sample], before: bool) -> tuple[ShardAudit, str, T | ShardError | None]:
        if before:
            return audit, key, None
        return audit, key, attempt(lambda: prepare(decode()))

    for _, prepared in in_order(((sample[1], partial(job, *sample, before)) for sample, before in taken), threads):
        if isinstance(prepared, ShardError):
            raise prepared
        yield prepared


def merged(audits: Sequence[ShardAudit], lost: Mapping[str, Mapping[str, str]]) -> None:
    """Take the samples in `more` (shard to key to reason) out of those seen: they were read past here, and found broken in another pass."""
    for audit in audits:
        for key, reason in lost.get(audit.shard, {}).items():
            audit.seen -= 1
            audit.fail(key, reason)
