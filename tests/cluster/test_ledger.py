"""Leases, starts and losses, by a crew whose actors do what each test says and a clock that only waiting moves."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import exceptions
from ray.exceptions import RayActorError, RayError, RayTaskError

from harness.cluster import ledger as ledger_module
from harness.cluster.ledger import MAX_ATTEMPTS, MAX_STARTS, EventLog, Ledger
from harness.errors import (
    BankError,
    RequestError,
    RunError,
    ShardError,
    Unexpected,
    portable,
)
from harness.features.bank import BankSpec, BankStore
from harness.results.collect import where_tracebacks_are
from harness.search.accounts import Lost, account

NEVER = object()
"""An outcome that does not come."""
READY = 1


class Reference:
    """What a call will have come to."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, references: Sequence[Reference], *, num_returns: int = 1, timeout: float | None = None) -> tuple[list[Reference], list[Reference]]:
        done = [reference for reference in references if reference.outcome is not NEVER][:num_returns]
        if not done:
            assert timeout is not None, "this would wait for ever"
            self.now += timeout
        assert self.now < 1e5, "this goes on for ever"
        return done, [reference for reference in references if reference not in done]


def get(reference: Reference) -> Any:
    if isinstance(reference.outcome, BaseException):
        raise reference.outcome
    return reference.outcome


class FakeCrew:
    """`start` says what comes of an actor's start, `lease` of a lease; actors are numbers in the order of their creation."""

    def __init__(self, count: int, start: Callable[[int], Any] = lambda _: READY, lease: Callable[[int, str, int], Any] = lambda *_: READY) -> None:
        self.actors: list[Any] = list(range(count))
        self._outcomes = start, lease
        self.created = count
        self.ready: set[int] = set()
        self.leases: list[tuple[int, str, int]] = []

    def start(self, actor: int) -> Any:
        outcome = self._outcomes[0](actor)
        if outcome is READY:
            self.ready.add(actor)
        return Reference(outcome)

    def lease(self, actor: int, work: Work, attempt: int) -> Any:
        assert actor in self.actors, "a lease to an actor that is gone"
        assert actor in self.ready, "a lease to an actor that is not ready"
        self.leases.append((actor, work.name.rsplit("/", 1)[1], attempt))
        outcome = self._outcomes[1](actor, work.name.rsplit("/", 1)[1], attempt)
        if isinstance(outcome, Submission):
            raise outcome.error
        return Reference(outcome)

    def replace(self, actor: int) -> int:
        self.dismiss(actor)
        self.actors.append(self.created)
        self.created += 1
        return self.created - 1

    def dismiss(self, actor: int) -> None:
        self.actors.remove(actor)


class Submission:
    """A call that cannot even be made."""

    def __init__(self, error: RayError) -> None:
        self.error = error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ledger_module.ray, "wait", clock.wait)
    monkeypatch.setattr(ledger_module.ray, "get", get)
    monkeypatch.setattr(ledger_module.time, "sleep", clock.sleep)
    return clock


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    with EventLog(tmp_path / "events.jsonl") as log:
        yield log


@dataclass(frozen=True)
class Work:
    """As much of a piece of work as a ledger looks at."""

    name: str
    items: int = 1


def works(count: int) -> list[Any]:
    return [Work(f"d/test/{index}.tar") for index in range(count)]


def run(crew: FakeCrew, clock: Clock, log: EventLog, tmp_path: Path, *, shards: int = 2) -> Ledger:
    ledger = Ledger(crew=crew, log=log, lease_timeout=100.0, out=tmp_path, clock=clock)
    ledger.run(works(shards))
    return ledger


def told_by_a_task(cause: Exception) -> RayTaskError:
    return RayTaskError("encode", "Traceback of it", cause, proctitle="p", pid=1, ip="0.0.0.0")


def once(outcome: Any) -> Callable[[int, str, int], Any]:
    """The first lease of the first shard ends so; all others go well."""
    return lambda _, shard, attempt: outcome if (shard, attempt) == ("0.tar", 1) else READY


# --- leases -----------------------------------------------------------------------------------------------------------------


def every_ray_error() -> list[RayError]:
    """One of every kind that Ray has, made without its constructor, of which each has another."""
    kinds = [kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, RayError) and kind is not RayTaskError]
    errors: list[RayError] = []
    for kind in kinds:
        plain = type(kind.__name__, (kind,), {"__init__": lambda self: None, "__str__": lambda self: f"a {type(self).__name__}\nof two lines"})
        errors.append(plain())
    return errors


@pytest.mark.parametrize("error", every_ray_error(), ids=lambda error: type(error).__name__)
def test_every_kind_of_ray_error_is_a_lost_lease(error: RayError, clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, lease=once(error))
    assert run(crew, clock, log, tmp_path).lost == {}
    assert crew.leases == [(0, "0.tar", 1), (1, "1.tar", 1), (1, "0.tar", 2)]
    (lost,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines() if '"lost"' in line]
    assert lost["reason"] == f"a {type(error).__name__}"


def test_the_kinds_that_outsiders_met_are_among_them() -> None:
    kinds = {type(error).__name__ for error in every_ray_error()}
    assert {"OutOfMemoryError", "ObjectLostError", "WorkerCrashedError", "NodeDiedError", "ActorUnavailableError", "RaySystemError"} <= kinds
    assert {"ActorDiedError", "TaskUnschedulableError", "ActorUnschedulableError", "LocalRayletDiedError", "OutOfDiskError"} <= kinds


def test_a_lease_that_cannot_even_be_given_is_lost(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, lease=once(Submission(RayActorError())))
    assert run(crew, clock, log, tmp_path).lost == {}
    assert crew.leases[-1] == (1, "0.tar", 2)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), TimeoutError("slow"), BankError("a part is damaged"), ConnectionResetError()]
)
def test_what_could_not_be_read_is_tried_again_by_the_same_actor(error: Exception, clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, lease=once(told_by_a_task(error)))
    assert run(crew, clock, log, tmp_path).lost == {}
    assert crew.leases == [(0, "0.tar", 1), (0, "1.tar", 1), (0, "0.tar", 2)]
    assert clock.now >= ledger_module.PAUSE, "what was out of reach is given a moment"


def test_memory_that_was_short_is_tried_again_by_another_process(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, lease=once(told_by_a_task(MemoryError())))
    assert run(crew, clock, log, tmp_path).lost == {}
    assert crew.leases[-1] == (1, "0.tar", 2)


def test_a_shard_is_given_up_after_so_many_leases_and_costs_no_other(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(2, lease=lambda _, shard, attempt: told_by_a_task(OSError(5, "Input/output error")) if shard == "0.tar" else READY)
    lost = run(crew, clock, log, tmp_path, shards=5).lost
    assert list(lost) == ["d/test/0.tar"]
    assert lost["d/test/0.tar"].attempts == MAX_ATTEMPTS
    assert lost["d/test/0.tar"].reason == f"gave up after {MAX_ATTEMPTS} attempts: OSError: [Errno 5] Input/output error"


def test_a_shard_that_cannot_be_used_is_lost_at_once(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    ledger = run(FakeCrew(1, lease=once(told_by_a_task(ShardError("0.tar: no such file")))), clock, log, tmp_path)
    (lost,) = ledger.lost.values()
    assert (lost.reason, lost.attempts) == ("0.tar: no such file", 1)
    assert not (tmp_path / "errors").exists()


@pytest.mark.parametrize("error", [TypeError("unhashable type\nand more"), portable(TypeError("unhashable type\nand more"))])
def test_what_nobody_raised_on_purpose_is_not_tried_again_and_leaves_its_traceback(
    error: Exception, clock: Clock, log: EventLog, tmp_path: Path
) -> None:
    ledger = run(FakeCrew(1, lease=once(told_by_a_task(error))), clock, log, tmp_path)
    (lost,) = ledger.lost.values()
    assert (lost.reason, lost.attempts) == ("TypeError: unhashable type; the traceback is in errors/d__test__0.tar.txt", 1)
    text = (tmp_path / "errors" / "d__test__0.tar.txt").read_text()
    assert "and more" in text if isinstance(error, Unexpected) else text == "Traceback of it"


def test_a_run_error_ends_the_run(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="disk full"):
        run(FakeCrew(1, lease=once(told_by_a_task(RunError("cannot write: disk full")))), clock, log, tmp_path)


def test_a_lease_ends_with_its_time(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, lease=once(NEVER))
    assert run(crew, clock, log, tmp_path).lost == {}
    assert crew.leases[-1] == (1, "0.tar", 2)
    assert 100 <= clock.now < 110


# --- starts -----------------------------------------------------------------------------------------------------------------


def test_a_start_is_no_lease_and_keeps_nobody_waiting(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(2, start=lambda actor: NEVER if actor == 1 else READY)
    assert run(crew, clock, log, tmp_path, shards=5).lost == {}
    assert {actor for actor, _, _ in crew.leases} == {0}
    assert clock.now == 0, "no second was spent on the one that is not ready"


def test_a_replacement_that_is_never_scheduled_costs_its_shards_time_and_nothing_else(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(
        2,
        start=lambda actor: READY if actor < 2 else NEVER,
        lease=lambda actor, shard, attempt: RayActorError() if actor == 1 else READY,
    )
    assert run(crew, clock, log, tmp_path, shards=9).lost == {}
    assert clock.now == 0
    assert len([actor for actor, _, _ in crew.leases if actor == 0]) == 9


def test_without_an_actor_for_as_long_as_a_start_may_take_the_run_ends(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(2, start=lambda actor: READY if actor < 2 else NEVER, lease=lambda *_: RayActorError())
    with pytest.raises(RunError, match="no actor was ready within 600 s; look at `ray status`"):
        run(crew, clock, log, tmp_path, shards=9)
    assert 600 < clock.now < 610


def test_the_time_of_a_start_begins_anew_with_each_actor_that_was_ready(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    """One node is gone from the beginning; the other is lost near the end of that start's time, and is back within a second."""
    started: dict[int, float] = {}

    def start(actor: int) -> Any:
        started[actor] = clock.now
        return NEVER if actor == 1 or (actor > 2 and clock.now < 700) else READY

    def lease(actor: int, shard: str, attempt: int) -> Any:
        if shard == "0.tar" and attempt == 1:
            clock.now += 599
            return RayActorError()
        return READY

    assert run(FakeCrew(2, start=start, lease=lease), clock, log, tmp_path).lost == {}


def test_a_start_that_hangs_is_begun_anew(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    """While another actor works for long."""
    crew = FakeCrew(2, start=lambda actor: NEVER if actor == 1 else READY, lease=lambda actor, shard, attempt: NEVER if attempt < 4 else READY)
    ledger = Ledger(crew=crew, log=log, lease_timeout=300.0, out=tmp_path, clock=clock)
    ledger.run(works(2))
    assert 1 not in crew.actors
    assert any(actor > 1 for actor, _, _ in crew.leases)


CONSTRUCTOR = (
    "The actor died because of an error raised in its creation task, ray::EncoderActor.__init__() (pid=1)\nTraceback\nValueError: no such device"
)


class Died(RayActorError):  # type: ignore[misc]
    def __str__(self) -> str:
        return CONSTRUCTOR


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Died(), "ValueError: no such device"),
        (told_by_a_task(portable(ValueError("no such device"))), "ValueError: no such device; the traceback is in errors/start of an actor.txt"),
        (told_by_a_task(RequestError("fp16 needs a GPU")), "fp16 needs a GPU"),
        (told_by_a_task(RunError("cannot write")), "cannot write"),
    ],
)
def test_where_no_actor_can_be_started_the_line_says_why_at_once(
    outcome: Exception, reason: str, clock: Clock, log: EventLog, tmp_path: Path
) -> None:
    crew = FakeCrew(3, start=lambda _: outcome)
    with pytest.raises(RunError) as caught:
        run(crew, clock, log, tmp_path)
    assert str(caught.value) == f"no actor could be started: {reason}; what is encoded stays: run again to go on"
    assert "creation task" not in str(caught.value)
    assert (clock.now, crew.created, crew.leases) == (0, 3, [])


@pytest.mark.parametrize("outcome", [RayActorError(), told_by_a_task(OSError(5, "Input/output error"))])
def test_a_start_that_may_go_better_is_tried_again_some_times(outcome: Exception, clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, start=lambda actor: outcome if actor < MAX_STARTS - 1 else READY)
    assert run(crew, clock, log, tmp_path).lost == {}
    with pytest.raises(RunError, match="no actor could be started"):
        run(FakeCrew(1, start=lambda _: outcome), clock, log, tmp_path)


def test_one_that_cannot_be_started_is_done_without(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(2, start=lambda actor: Died() if actor == 1 else READY)
    assert run(crew, clock, log, tmp_path, shards=4).lost == {}
    assert crew.actors == [0]


def test_nothing_to_do_starts_nobody(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, start=lambda _: pytest.fail("started"))
    assert run(crew, clock, log, tmp_path, shards=0).lost == {}


def test_a_record_names_the_tracebacks_of_the_shards_that_it_lacks(tmp_path: Path) -> None:
    spec = BankSpec(dataset="d", split="test", shards=(("0.tar", "", 3), ("1.tar", "", 3)), readout="cls", view="v", identity=())
    store = BankStore(str(tmp_path))
    reasons = {"0.tar": "TypeError: x; the traceback is in errors/d__test__0.tar.txt", "1.tar": "gave up after 4 attempts: OSError: y"}
    receipts = [account(store, spec, shard, 3, Lost(reason=reason, attempts=1)) for shard, reason in reasons.items()]
    assert where_tracebacks_are(receipts) == "; the traceback is in errors/d__test__0.tar.txt"
    assert where_tracebacks_are(receipts[1:]) == ""


# --- two leases an actor ----------------------------------------------------------------------------------------------------


def run_two(crew: FakeCrew, clock: Clock, log: EventLog, tmp_path: Path, *, shards: int) -> Ledger:
    ledger = Ledger(crew=crew, log=log, lease_timeout=100.0, leases_per_actor=2, out=tmp_path, clock=clock)
    ledger.run(works(shards))
    return ledger


def events(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


def most_held(tmp_path: Path) -> dict[str, int]:
    """The most leases that each actor held at a time."""
    held: dict[str, set[str]] = {}
    most: dict[str, int] = {}
    for event in events(tmp_path):
        if event["event"] == "lease":
            held.setdefault(event["actor"], set()).add(event["shard"])
            most[event["actor"]] = max(most.get(event["actor"], 0), len(held[event["actor"]]))
        else:
            for shards in held.values():
                shards.discard(event["shard"])
    return most


def test_an_actor_holds_a_second_shard_while_more_wait_than_there_are_actors(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(2)
    assert run_two(crew, clock, log, tmp_path, shards=9).lost == {}
    assert sorted(shard for _, shard, _ in crew.leases) == sorted(f"{index}.tar" for index in range(9)), "each once"
    assert most_held(tmp_path) == {"0": 2, "1": 2}
    few = FakeCrew(2)
    (tmp_path / "events.jsonl").write_text("")
    assert run_two(few, clock, log, tmp_path, shards=4).lost == {}
    assert most_held(tmp_path) == {"0": 1, "1": 1}


def test_the_loss_of_an_actor_loses_both_and_is_an_attempt_of_the_one_that_was_encoded(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    crew = FakeCrew(1, lease=lambda actor, shard, attempt: (RayActorError() if shard == "0.tar" else NEVER) if actor == 0 else READY)
    assert run_two(crew, clock, log, tmp_path, shards=5).lost == {}
    assert crew.leases[:3] == [(0, "0.tar", 1), (0, "1.tar", 1), (1, "1.tar", 1)]
    assert (1, "0.tar", 2) in crew.leases
    assert len(crew.leases) == 7
    losses = [(event["event"], event["shard"]) for event in events(tmp_path) if event["event"] in ("lost", "returned")]
    assert losses == [("returned", "d/test/1.tar"), ("lost", "d/test/0.tar")]


def test_a_shard_that_ends_actors_costs_no_other(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    """Whichever place it has: read as the second, it takes the actor with it that encodes another."""
    crew = FakeCrew(2)

    def lease(actor: int, shard: str, attempt: int) -> Any:
        beside = [held for holder, held, _ in crew.leases if holder == actor]
        return RayActorError() if "3.tar" in (shard, *beside) else READY

    crew.__init__(2, lease=lease)  # type: ignore[misc]
    lost = run_two(crew, clock, log, tmp_path, shards=12).lost
    assert list(lost) == ["d/test/3.tar"]


def test_the_time_of_a_second_lease_begins_with_the_end_of_the_first(clock: Clock, log: EventLog, tmp_path: Path) -> None:
    outcomes: dict[str, Reference] = {}
    crew = FakeCrew(1, lease=lambda actor, shard, attempt: NEVER)
    plain = crew.lease

    def lease(actor: int, work: Work, attempt: int) -> Any:
        reference = plain(actor, work, attempt)
        outcomes[work.name] = reference
        return reference

    def finish_first(references: Sequence[Reference], **options: Any) -> tuple[list[Reference], list[Reference]]:
        if options.get("timeout") and clock.now > 90 and "d/test/0.tar" in outcomes:
            outcomes.pop("d/test/0.tar").outcome = READY
        if options.get("timeout") and clock.now > 180:
            for reference in outcomes.values():
                reference.outcome = READY
        return clock.wait(references, **options)

    crew.lease = lease  # type: ignore[method-assign]
    ledger_module.ray.wait = finish_first  # put back by the fixture
    assert run_two(crew, clock, log, tmp_path, shards=3).lost == {}
    assert len(crew.leases) == 3, "no lease was taken for late"
