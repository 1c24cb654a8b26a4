"""What lies ahead comes in order, within its bounds, and a shard that fails or is given up disturbs no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError

import pytest

from harness.errors import SampleError, ShardError
from harness.features.ahead import Ahead, Weight

LIMIT = 60.0
"""Seconds: far more than anything here takes."""


def plain(shard: str, count: int, started: list[str] | None = None) -> Iterator[tuple[str, Callable[[], str]]]:
    for index in range(count):
        if started is not None:
            started.append(f"{shard}{index}")
        yield f"{shard}{index}", lambda index=index: f"{shard}{index}"


def one(_: str) -> Weight:
    return Weight(1, 1)


def taken(ahead: Ahead[str], samples: Iterator[tuple[str, Callable[[], str]]]) -> list[str | ShardError]:
    with ahead.shard(samples, one) as results:
        return [result for _, result in results]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads are about to do."""
    pause = threading.Event()
    for _ in range(int(LIMIT / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("threads", [1, 4])
def test_samples_come_in_order_shard_by_shard(threads: int) -> None:
    ahead: Ahead[str] = Ahead(threads, least=3, most=5)
    for shard in "ab":
        assert taken(ahead, plain(shard, 50)) == [f"{shard}{index}" for index in range(50)]


def test_the_next_shard_is_read_while_one_is_taken_and_given_after_it() -> None:
    ahead: Ahead[str] = Ahead(1, least=10, most=10)
    started, order = list[str](), list[str]()

    def second() -> None:
        order.extend(str(result) for result in taken(ahead, plain("b", 2, started)))

    with ahead.shard(plain("a", 3), one) as results:
        order.append(str(next(results)[1]))
        thread = threading.Thread(target=second)
        thread.start()
        until(lambda: started == ["b0", "b1"])
        assert order == ["a0"]
        order.extend(str(result) for _, result in results)
    thread.join(LIMIT)
    assert order == ["a0", "a1", "a2", "b0", "b1"]


@pytest.mark.parametrize(("least", "most", "expected"), [(6, 0, 6), (0, 60, 6), (6, 90, 9)])
def test_so_much_lies_ahead_and_no_more(least: int, most: int, expected: int) -> None:
    """Samples of 10 bytes; of those that are begun at once none is more than the bound allows, as one thread prepares one after the other."""
    ahead: Ahead[str] = Ahead(1, least=least, most=most)
    done, gate = list[str](), threading.Semaphore(0)

    def samples() -> Iterator[tuple[str, Callable[[], str]]]:
        for index in range(100):
            gate.acquire()
            yield str(index), lambda index=index: done.append(str(index)) or str(index)

    with ahead.shard(samples(), lambda _: Weight(1, 10)) as results:
        for count in range(expected):
            gate.release()
            until(lambda count=count: len(done) == count + 1)
        gate.release()
        threading.Event().wait(0.05)
        assert len(done) == expected
        next(results)
        until(lambda: len(done) == expected + 1)
        for _ in range(100):
            gate.release()
        assert len(list(results)) == 99


def test_an_error_of_a_file_comes_at_its_place_and_leaves_the_next_shard_alone() -> None:
    ahead: Ahead[str] = Ahead(2, least=10, most=10)

    def broken() -> Iterator[tuple[str, Callable[[], str]]]:
        yield from plain("a", 2)
        raise OSError("gone")

    outcome, seen = list[str | ShardError](), list[str]()

    def take() -> None:
        with ahead.shard(broken(), one) as results:
            thread.start()
            for key, _ in results:
                seen.append(key)

    thread = threading.Thread(target=lambda: outcome.extend(taken(ahead, plain("b", 3))))
    with pytest.raises(OSError, match="gone"):
        take()
    thread.join(LIMIT)
    assert (seen, outcome) == (["a0", "a1"], ["b0", "b1", "b2"])


def test_what_costs_its_sample_costs_no_other() -> None:
    def fail() -> str:
        raise SampleError("broken image")

    first, lost, last = taken(Ahead(2, least=4, most=4), iter([("a", lambda: "a"), ("b", fail), ("c", lambda: "c")]))
    assert (first, str(lost), last) == ("a", "broken image", "c")


def test_a_shard_that_is_given_up_leaves_its_room_to_the_next() -> None:
    ahead: Ahead[str] = Ahead(2, least=4, most=4)
    for _ in range(3):
        with ahead.shard(plain("a", 1000), one) as results:
            next(results)
    assert len(taken(ahead, plain("b", 100))) == 100


def test_closing_gives_up_whoever_reads_and_whoever_waits() -> None:
    ahead: Ahead[str] = Ahead(1, least=1, most=1)

    def take() -> None:
        with ahead.shard(plain("a", 1000), one) as results:
            next(results)
            ahead.close()
            list(results)

    with pytest.raises(CancelledError, match="given up"):
        take()
    with pytest.raises(CancelledError, match="given up"):
        taken(ahead, plain("b", 2))
