"""Samples read and prepared ahead of whoever takes them, one shard behind the other without a gap, within a bound of memory.

A thread per shard reads its file; the threads of one pool, which all shards share, decode. A shard is read once the shard before it is read to its
end, so that what lies ahead is always what is taken next. Samples come in their shard's order; a shard that fails or is given up disturbs no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

from harness.data.shards import Keyed, attempt
from harness.errors import ShardError

MOST_BYTES = 64 * 2**20
"""Of prepared samples that nobody has taken yet; two batches may be more."""
_UNDECODED = 4
"""Samples per thread that wait to be decoded: enough for no thread to wait, and few, since a picture may have many megabytes."""

T = TypeVar("T")


class Weight(NamedTuple):
    """What one prepared sample takes up."""

    items: int
    """Inputs of an encoder."""
    bytes: int


class Room:
    """How much may lie ahead: `most` bytes, or `least` items where these are more; and `undecoded` samples that nobody knows the weight of yet."""

    def __init__(self, *, least: int, most: int, undecoded: int) -> None:
        self._least, self._most, self._undecoded = least, most, undecoded
        self._changed = threading.Condition()
        self._items = self._bytes = self._unknown = 0
        self._closed = False

    def close(self) -> None:
        """Let nothing in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def enter(self, given_up: threading.Event) -> bool:
        """Wait for room for one sample, and take it; False, with no room taken, where its shard, or everything, is given up."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or given_up.is_set() or self._has_room())
            if self._closed or given_up.is_set():
                return False
            self._unknown += 1
            return True

    def settle(self, weight: Weight) -> None:
        """A sample that had entered is prepared, and has a weight."""
        self._change(-1, weight.items, weight.bytes)

    def leave(self, weight: Weight | None) -> None:
        """A sample is taken or thrown away; None where it was never prepared."""
        self._change(-1, 0, 0) if weight is None else self._change(0, -weight.items, -weight.bytes)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._unknown < self._undecoded and (self._bytes < self._most or self._items < self._least)

    def _change(self, unknown: int, items: int, weight: int) -> None:
        with self._changed:
            self._unknown, self._items, self._bytes = self._unknown + unknown, self._items + items, self._bytes + weight
            self._changed.notify_all()


@dataclass(eq=False)
class _Place:
    """A shard's place in the order in which shards are read, and taken."""

    read: threading.Event = field(default_factory=threading.Event)
    taken: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Job(Generic[T]):
    key: str
    future: Future[tuple[T | ShardError, Weight]]


_End = BaseException | None
"""Why a shard's file is read no further: None at its end."""


class Ahead(Generic[T]):
    """What shards that follow each other share: the threads that decode, and the room for what lies ahead."""

    def __init__(self, threads: int, *, least: int, most: int = MOST_BYTES) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._room = Room(least=least, most=most, undecoded=_UNDECODED * threads)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._last = _Place()
        self._last.read.set()
        self._last.taken.set()

    def close(self) -> None:
        """Give up every shard, at its next sample."""
        self._closed.set()
        self._room.close()

    @contextmanager
    def shard(self, samples: Iterable[Keyed[T]], weigh: Callable[[T], Weight]) -> Iterator[Iterator[tuple[str, T | ShardError]]]:
        """(key, result) of a shard's samples, in their order. What costs its sample (see `attempt`) is given, not raised.

        Reading begins at once, or when the shard before this one is read; the first sample is given once the block of that one has ended. `samples`
        is advanced in a thread of its own; what it raises is raised at its place in the order. Leaving the block gives up what was not taken.
        """
        place, given_up, queue = _Place(), threading.Event(), SimpleQueue[_Job[T] | _End]()
        with self._lock:
            before, self._last = self._last, place
        reader = threading.Thread(target=self._read, args=(samples, weigh, before, place, given_up, queue), name="read", daemon=True)
        reader.start()
        try:
            before.taken.wait()
            yield self._results(queue)
        finally:
            given_up.set()
            self._room.wake()
            place.taken.set()
            reader.join()
            self._throw_away(queue)

    def _read(
        self,
        samples: Iterable[Keyed[T]],
        weigh: Callable[[T], Weight],
        before: _Place,
        place: _Place,
        given_up: threading.Event,
        queue: SimpleQueue[_Job[T] | _End],
    ) -> None:
        end: _End = None
        try:
            before.read.wait()
            for key, job in samples:
                if not self._room.enter(given_up):
                    raise CancelledError("the shard was given up")
                queue.put(_Job(key, self._pool.submit(partial(self._prepare, job, weigh))))
        except BaseException as error:  # raised where the samples are taken
            end = error
        place.read.set()
        queue.put(end)

    def _prepare(self, job: Callable[[], T], weigh: Callable[[T], Weight]) -> tuple[T | ShardError, Weight]:
        weight = Weight(1, 0)
        try:
            result = attempt(job)
            weight = weight if isinstance(result, ShardError) else weigh(result)
            return result, weight
        finally:
            self._room.settle(weight)

    def _results(self, queue: SimpleQueue[_Job[T] | _End]) -> Iterator[tuple[str, T | ShardError]]:
        while isinstance(job := queue.get(), _Job):
            try:
                result, weight = job.future.result()
            except BaseException:
                self._room.leave(Weight(1, 0))
                raise
            self._room.leave(weight)
            if self._closed.is_set():
                raise CancelledError("the shard was given up")
            yield job.key, result
        if job is not None:
            raise job

    def _throw_away(self, queue: SimpleQueue[_Job[T] | _End]) -> None:
        while not queue.empty():
            if isinstance(job := queue.get(), _Job):
                if job.future.cancel():
                    self._room.leave(None)
                else:
                    job.future.add_done_callback(self._leave)

    def _leave(self, future: Future[tuple[T | ShardError, Weight]]) -> None:
        self._room.leave(Weight(1, 0) if future.exception() else future.result()[1])
