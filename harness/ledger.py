"""Which shard was seen, once: leases to actors, retries, and the account that comes of it.

An actor holds one shard at a time. A lease ends with its receipts, with the actor's death, or with its time; a shard whose lease was lost goes to
another actor, up to MAX_ATTEMPTS leases in all. Parts are published whole, so that work done twice is counted once: the first part stays.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError

from harness.bank import BankSpec, BankStore, ReadParts, Receipt
from harness.errors import RunError, ShardError
from harness.extract import ShardWork
from harness.stream import NAMED

MAX_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A shard that could not be seen at all."""

    reason: str
    attempts: int


class Crew(Protocol):
    """The actors that encode."""

    def lease(self, actor: Any, work: ShardWork, attempt: int) -> ray.ObjectRef[Any]: ...

    def replace(self, actor: Any) -> Any:
        """Another actor in place of one that is gone for good or has to go."""

    actors: list[Any]


class EventLog:
    """What happened when, one JSON object a line: leases, receipts, losses. For people and for tests; nothing reads it back."""

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
    """By items, so that no actor is left alone with the longest at the end; in the order of `todo` where they are as many."""
    return sorted(todo, key=lambda work: work.items, reverse=True)


@dataclass(kw_only=True, eq=False)
class _Lease:
    work: ShardWork
    attempt: int
    actor: Any
    deadline: float


@dataclass(kw_only=True, eq=False)
class Ledger:
    """Leases `todo` to a crew, the longest work first, until every shard is seen or lost."""

    crew: Crew
    log: EventLog
    lease_timeout: float
    on_done: Callable[[ShardWork], None] = lambda _: None
    lost: dict[str, Lost] = field(default_factory=dict)
    """Shard (as ShardWork.name) to what befell it."""

    def run(self, todo: Sequence[ShardWork]) -> None:
        """Raises RunError where the run cannot go on, such as on a full disk."""
        waiting = deque((work, 1) for work in longest_first(todo))
        idle = list(self.crew.actors)
        leases: dict[Any, _Lease] = {}
        while waiting or leases:
            while waiting and idle:
                work, attempt = waiting.popleft()
                actor = idle.pop()
                reference = self.crew.lease(actor, work, attempt)
                leases[reference] = _Lease(work=work, attempt=attempt, actor=actor, deadline=time.monotonic() + self.lease_timeout)
                self.log.write("lease", shard=work.name, attempt=attempt, actor=str(actor))
            done, _ = ray.wait(list(leases), timeout=0.2)
            late = [reference for reference, lease in leases.items() if reference not in done and time.monotonic() > lease.deadline]
            for reference in [*done, *late]:
                lease = leases.pop(reference)
                idle.append(self._settle(reference, lease, waiting, late=reference in late))

    def _settle(self, reference: Any, lease: _Lease, waiting: deque[tuple[ShardWork, int]], *, late: bool) -> Any:
        """Take a lease's outcome; the actor to use from now on."""
        work, attempt = lease.work, lease.attempt
        try:
            if late:
                ray.kill(lease.actor, no_restart=True)
                raise TimeoutError(f"not returned within {self.lease_timeout:g} s")
            ray.get(reference)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RunError):
                raise RunError(str(cause)) from None
            if isinstance(cause, ShardError):
                self._lose(work, str(cause), attempt)
            else:
                self._retry(work, attempt, f"{type(cause).__name__}: {cause}", waiting)
            return lease.actor
        except (RayActorError, TimeoutError) as error:
            self._retry(work, attempt, str(error).strip().split("\n")[0], waiting)
            return self.crew.replace(lease.actor)
        self.log.write("done", shard=work.name, attempt=attempt)
        self.on_done(work)
        return lease.actor

    def _retry(self, work: ShardWork, attempt: int, reason: str, waiting: deque[tuple[ShardWork, int]]) -> None:
        self.log.write("lost", shard=work.name, attempt=attempt, reason=reason)
        if attempt < MAX_ATTEMPTS:
            waiting.append((work, attempt + 1))
        else:
            self._lose(work, f"gave up after {attempt} attempts: {reason}", attempt)

    def _lose(self, work: ShardWork, reason: str, attempt: int) -> None:
        self.log.write("failed", shard=work.name, attempt=attempt, reason=reason)
        self.lost[work.name] = Lost(reason=reason, attempts=attempt)
        self.on_done(work)


def account(store: BankStore | ReadParts, bank: BankSpec, shard: str, samples: int, lost: Lost | None) -> Receipt:
    """The receipt of one (bank, shard); of a shard that was lost, one that says so."""
    receipt = store.receipt(bank, shard)
    if receipt is not None:
        return receipt
    return Receipt(
        bank_key=bank.key,
        shard=shard,
        expected=samples,
        seen=0,
        failed=samples,
        duplicates=0,
        reasons={"shard lost": [lost.reason if lost else "no part in the cache"]},
        sha256="",
        attempts=lost.attempts if lost else 0,
        node="",
        rows=0,
        seconds=0.0,
        images=0,
    )


def without_repeated(receipt: Receipt, repeated: Mapping[str, str]) -> Receipt:
    """The receipt of a shard whose samples `repeated`, key to an earlier shard that has it, do not count: they are duplicates, and failed."""
    named = [*receipt.reasons.get("duplicate key", ()), *(f"{key}, which {shard} has" for key, shard in repeated.items())]
    return replace(
        receipt,
        seen=receipt.seen - len(repeated),
        failed=receipt.failed + len(repeated),
        duplicates=receipt.duplicates + len(repeated),
        reasons={**receipt.reasons, "duplicate key": named if len(named) <= NAMED else [*named[:NAMED], "and more"]},
    )
