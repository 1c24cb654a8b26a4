"""Every shard is seen once: leases to actors, retries, and the resulting account.

An actor is started, and holds no lease until it says that it is ready; then it holds one shard, or two where more shards wait than there are actors:
it reads the second while it encodes the first. A lease ends with its receipts, with the actor's loss, or with its time, which begins once the
shard is the actor's first. A shard whose lease was lost, or that could not be read or written, is leased again, up to MAX_ATTEMPTS times in all.
The loss of an actor is an attempt of its first shard alone; both are then leased without a second one beside them, so that a shard that ends
actors costs no other.
Parts are published whole, so that work done twice is counted once: the first part stays.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from harness import tracebacks
from harness.errors import HarnessError, RunError, Unexpected, in_one_line, is_of_the_place
from harness.features.extract import ShardWork
from harness.search.accounts import Lost

MAX_ATTEMPTS = 4
"""Maximum number of leases of one shard."""
MAX_STARTS = 4
"""Number of consecutive failed starts after which an actor, or its replacement, is given up."""
START_TIMEOUT = 600.0
"""Seconds after which an actor that is not ready is started again, and after which a run without any ready actor ends."""
PAUSE = 1.0
"""Seconds before a shard that could not be read or written is leased again, tripled after each attempt."""
_POLL = 0.2
_OF_A_CONSTRUCTOR = "error raised in its creation task"


class Crew(Protocol):
    """The actors that encode."""

    def start(self, actor: Any) -> ray.ObjectRef[Any]:
        """A reference that resolves once the actor is ready, which may be never, such as where no node has room."""

    def lease(self, actor: Any, work: ShardWork, attempt: int) -> ray.ObjectRef[Any]: ...

    def replace(self, actor: Any) -> Any:
        """A new actor, not yet ready, in place of one that is lost or must be removed."""

    def dismiss(self, actor: Any) -> None:
        """Remove this actor without a replacement."""

    actors: list[Any]


class EventLog:
    """Events with their times, one JSON object per line: leases, receipts, losses. For people and for tests; the harness never reads it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def write(self, event: str, **about: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), "event": event, **about}) + "\n")


def longest_first(todo: Sequence[ShardWork]) -> list[ShardWork]:
    """Sorted by items, so that no actor is left alone with the longest at the end; ties in the order of `todo`."""
    return sorted(todo, key=lambda work: work.items, reverse=True)


@dataclass(kw_only=True, eq=False)
class _Turn:
    """A shard that waits for a lease."""

    work: ShardWork
    attempt: int = 1
    not_before: float = 0.0
    alone: bool = False
    """Whether it is given to an actor that then holds nothing else."""


@dataclass(kw_only=True, eq=False)
class _Lease:
    turn: _Turn
    actor: Any
    reference: Any
    deadline: float
    """Infinite while the actor has another shard to encode before."""


@dataclass(kw_only=True, eq=False)
class _Start:
    """An actor that is not ready yet."""

    actor: Any
    deadline: float
    failures: int
    """Consecutive failures of this actor and of those that it replaces."""


@dataclass(kw_only=True, eq=False)
class Ledger:
    """Leases `todo` to a crew, the longest work first, until every shard is seen or lost."""

    crew: Crew
    log: EventLog
    lease_timeout: float
    start_timeout: float = START_TIMEOUT
    pause: float = PAUSE
    leases_per_actor: int = 1
    out: Path | None = None
    """Where tracebacks are kept."""
    on_done: Callable[[ShardWork], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    lost: dict[str, Lost] = field(default_factory=dict)
    """Shard (ShardWork.name) → how it was lost."""
    _waiting: deque[_Turn] = field(default_factory=deque, init=False)
    _idle: list[Any] = field(default_factory=list, init=False)
    _starts: dict[Any, _Start] = field(default_factory=dict, init=False)
    _leases: dict[Any, list[_Lease]] = field(default_factory=dict, init=False)
    """Of each actor that holds any, in the order in which it encodes them."""
    _trouble: str = ""
    """Why the latest start failed."""
    _ready_at: float = 0.0
    """When an actor was last ready or at work."""

    def run(self, todo: Sequence[ShardWork]) -> None:
        """Lease until every shard is seen or lost. Raises RunError where the run cannot continue, such as on a full disk or without an actor."""
        self._waiting.extend(_Turn(work=work) for work in longest_first(todo))
        self._ready_at = self.clock()
        if self._waiting:
            for actor in list(self.crew.actors):
                self._start(actor, failures=0)
        while self._waiting or self._leases:
            self._lease_all()
            self._settle_starts()
            self._settle_leases()

    # --- leases -------------------------------------------------------------------------------------------------------

    def _lease_all(self) -> None:
        """Give shards whose time has come to every actor that has room for one, and wait until something has come of any lease or start."""
        now = self.clock()
        ready = (turn for turn in self._waiting if turn.not_before <= now)
        for turn in list(islice(ready, len(self._idle))):  # no more are looked at than can be leased: there may be tens of thousands
            self._lease(turn, self._idle.pop())
        if self.leases_per_actor > 1 and not self._idle:
            self._lease_second_ones()
        references = [lease.reference for leases in self._leases.values() for lease in leases]
        if references or self._starts:
            ray.wait([*references, *self._starts], timeout=_POLL)
        elif self._idle:
            time.sleep(min(_POLL, self.pause))  # all remaining shards wait for their pause to end

    def _lease_second_ones(self) -> None:
        """To actors that hold fewer shards than they may, while so many wait that none is missed by an actor that ends sooner."""
        for actor, leases in list(self._leases.items()):
            if len(self._waiting) <= len(self.crew.actors):
                return
            turn = self._waiting[0]
            if turn.alone or turn.not_before > self.clock():
                return
            if len(leases) < self.leases_per_actor and not any(lease.turn.alone for lease in leases):
                self._lease(turn, actor)

    def _lease(self, turn: _Turn, actor: Any) -> None:
        self._waiting.remove(turn)
        self.log.write("lease", shard=turn.work.name, attempt=turn.attempt, actor=str(actor))
        leases = self._leases.setdefault(actor, [])
        lease = _Lease(turn=turn, actor=actor, reference=None, deadline=math.inf)
        leases.append(lease)
        try:
            lease.reference = self.crew.lease(actor, turn.work, turn.attempt)
        except RayError as error:
            self._lose_actor(actor, _reason(error))
            return
        leases[0].deadline = min(leases[0].deadline, self.clock() + self.lease_timeout)

    def _settle_leases(self) -> None:
        held = {lease.reference: lease for leases in self._leases.values() for lease in leases}
        for reference in _finished(held):
            if held[reference] in self._leases.get(held[reference].actor, ()):  # not lost since, with its actor
                self._settle(held[reference])
        now = self.clock()
        for actor in [actor for actor, leases in self._leases.items() if now > leases[0].deadline]:
            self._lose_actor(actor, f"not returned within {self.lease_timeout:g} s")

    def _settle(self, lease: _Lease) -> None:
        """Take a lease's outcome. An actor that is out of order is replaced; one that only could not read or write is used again."""
        turn = lease.turn
        try:
            ray.get(lease.reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RunError):
                raise RunError(str(cause)) from None
            if not is_of_the_place(cause):
                self._lose(turn, self._explained(turn.work.name, cause, error))
            elif isinstance(cause, OSError | HarnessError):
                self._lose_lease(turn, in_one_line(cause), pause=self.pause * 3 ** (turn.attempt - 1))
            else:
                self._lose_actor(lease.actor, in_one_line(cause), blamed=lease)
                return
        except RayError as error:  # out of memory, a lost worker, a lost node, a lost result: whatever it is, there is no receipt
            self._lose_actor(lease.actor, _reason(error))
            return
        else:
            self.log.write("done", shard=turn.work.name, attempt=turn.attempt)
            self.on_done(turn.work)
        self._end(lease)

    def _end(self, lease: _Lease) -> None:
        """An actor has one lease less; the time of the next one begins."""
        leases = self._leases[lease.actor]
        leases.remove(lease)
        if leases:
            leases[0].deadline = min(leases[0].deadline, self.clock() + self.lease_timeout)
        else:
            del self._leases[lease.actor]
            self._idle.append(lease.actor)

    def _lose_actor(self, actor: Any, reason: str, *, blamed: _Lease | None = None) -> None:
        """Replace an actor. What it held is leased again; an attempt is lost of the lease to blame alone: the first, which was being encoded."""
        leases = self._leases.pop(actor)
        blamed = blamed or leases[0]
        for lease in reversed(leases):
            if lease is not blamed:
                self.log.write("returned", shard=lease.turn.work.name, attempt=lease.turn.attempt)
                self._waiting.appendleft(replace(lease.turn, alone=True))
        self._lose_lease(replace(blamed.turn, alone=len(leases) > 1 or blamed.turn.alone), reason)
        self._start(self.crew.replace(actor), failures=0)

    def _lose_lease(self, turn: _Turn, reason: str, *, pause: float = 0.0) -> None:
        self.log.write("lost", shard=turn.work.name, attempt=turn.attempt, reason=reason)
        if turn.attempt < MAX_ATTEMPTS:
            self._waiting.append(replace(turn, attempt=turn.attempt + 1, not_before=self.clock() + pause))
        else:
            self._lose(turn, f"gave up after {turn.attempt} attempts: {reason}")

    def _lose(self, turn: _Turn, reason: str) -> None:
        self.log.write("failed", shard=turn.work.name, attempt=turn.attempt, reason=reason)
        self.lost[turn.work.name] = Lost(reason=reason, attempts=turn.attempt)
        self.on_done(turn.work)

    def _explained(self, name: str, cause: BaseException, error: RayTaskError) -> str:
        """The reason from an answer; for an unexpected exception, also where its traceback is."""
        if isinstance(cause, HarnessError) and not isinstance(cause, Unexpected):
            return in_one_line(cause)
        text = cause.traceback if isinstance(cause, Unexpected) else error.traceback_str
        return f"{in_one_line(cause)}{tracebacks.SEE_FILE}{tracebacks.keep(self.out, name, text)}"

    # --- actors -------------------------------------------------------------------------------------------------------

    def _start(self, actor: Any, *, failures: int) -> None:
        """Start an actor and wait for it in the background."""
        try:
            reference = self.crew.start(actor)
        except RayError as error:
            self._fail_start(_Start(actor=actor, deadline=0.0, failures=failures), _reason(error), again=True)
            return
        self._starts[reference] = _Start(actor=actor, deadline=self.clock() + self.start_timeout, failures=failures)

    def _settle_starts(self) -> None:
        for reference in _finished(self._starts):
            start = self._starts.pop(reference)
            try:
                ray.get(reference)
            except RayTaskError as error:
                self._fail_start(start, self._explained("start of an actor", error.cause, error), again=_may_pass(error.cause))
            except RayError as error:
                self._fail_start(start, _reason(error), again=_OF_A_CONSTRUCTOR not in str(error))
            else:
                self._idle.append(start.actor)
        self._end_without_actors()
        now = self.clock()
        for reference in [reference for reference, start in self._starts.items() if now > start.deadline]:
            self._start(self.crew.replace(self._starts.pop(reference).actor), failures=0)  # a node may return; until then this costs nothing

    def _end_without_actors(self) -> None:
        """Raise RunError where no actor is ready and none will be, or none has been for as long as a start may take."""
        now = self.clock()
        if self._idle or self._leases or not self._waiting:
            self._ready_at = now
        elif not self._starts:
            raise RunError(f"no actor could be started: {self._trouble}; what is encoded stays: run again to go on")
        elif now - self._ready_at > self.start_timeout:
            hint = f": {self._trouble}" if self._trouble else "; look at `ray status` for nodes that are missing or full"
            raise RunError(f"no actor was ready within {self.start_timeout:g} s{hint}; what is encoded stays: run again to go on")

    def _fail_start(self, start: _Start, reason: str, *, again: bool) -> None:
        self._trouble = reason
        self.log.write("start failed", actor=str(start.actor), reason=reason)
        if again and start.failures + 1 < MAX_STARTS:
            self._start(self.crew.replace(start.actor), failures=start.failures + 1)
        else:
            self.crew.dismiss(start.actor)


def _finished(references: Mapping[Any, Any]) -> list[Any]:
    """The references that have resolved."""
    return list(ray.wait(list(references), num_returns=len(references), timeout=0)[0]) if references else []


def _may_pass(error: BaseException) -> bool:
    return is_of_the_place(error) and not isinstance(error, RunError)


def _reason(error: RayError) -> str:
    """One line of Ray's message; for a failed constructor its own error, which comes last."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if _OF_A_CONSTRUCTOR in lines[0] else lines[0]
