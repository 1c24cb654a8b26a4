"""An index of receipts is a shortcut and never the truth: whatever it says or lacks, a driver comes to what the parts say."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from harness.errors import BankError
from harness.features.bank import BankSpec, BankStore, Receipt
from harness.features.index import ReadParts, decoded, encoded
from harness.plan.plan import Plan
from harness.search.accounts import Accounts
from tests.helpers import banks

SHARDS = 4


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    return banks.opened(monkeypatch)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return banks.planned(tmp_path, SHARDS)


@pytest.fixture
def cache(tmp_path: Path, plan: Plan) -> Path:
    """A cache all of whose banks are complete, with an index in each."""
    banks.fill(BankStore(str(tmp_path / "cache")), plan)
    drive(plan, str(tmp_path / "cache"))
    return tmp_path / "cache"


def drive(plan: Plan, root: str) -> tuple[list[str], list[Receipt]]:
    """What a driver comes to: the shards that are missing, and all receipts; it keeps its indexes."""
    parts = ReadParts(BankStore(root))
    missing = [work.shard.file for work in plan.missing(parts)]
    accounts = Accounts(plan, parts, {})
    receipts = [receipt for bank in plan.banks() for receipt in accounts.of(bank)]
    parts.keep()
    return missing, receipts


def without_indexes(plan: Plan, cache: Path) -> tuple[list[str], list[Receipt]]:
    bare = cache.with_name("bare")
    shutil.copytree(cache, bare, ignore=shutil.ignore_patterns("index-*"))
    return drive(plan, str(bare))


def indexes(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/index-*.json"))


def train_bank(plan: Plan) -> BankSpec:
    return next(bank for bank in plan.banks() if bank.split == "train")


# --- what it is for ---------------------------------------------------------------------------------------------------


def test_a_driver_opens_no_part_that_an_index_knows(plan: Plan, cache: Path, opened: Counter[tuple[str, str]]) -> None:
    assert len(indexes(cache)) == len(list(plan.banks()))
    truth = without_indexes(plan, cache)
    opened.clear()
    assert drive(plan, str(cache)) == truth
    assert truth[0] == []
    assert not opened


def test_what_is_known_already_is_not_written_again(plan: Plan, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in indexes(cache)}
    drive(plan, str(cache))
    assert {path: path.stat().st_mtime_ns for path in indexes(cache)} == before


class Counted(MemoryFileSystem):
    """Counts the requests that an object store would be sent."""

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests: ClassVar[Counter[str]] = Counter()

    def ls(self, path: str, detail: bool = True, **how: Any) -> Any:
        self.requests["ls"] += 1
        return super().ls(path, detail=detail, **how)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **how: Any) -> bytes:
        self.requests["get"] += 1
        return super().cat_file(path, start, end, **how)

    def _open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        self.requests[mode] += 1
        return super()._open(path, mode, **how)


def test_a_store_behind_a_url_is_asked_twice_a_bank_and_not_for_each_part(plan: Plan) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    banks.fill(BankStore("counted://cache"), plan)
    Counted.requests.clear()
    first = drive(plan, "counted://cache")
    number = len(list(plan.banks()))
    assert Counted.requests["rb"] >= number / 2 * SHARDS
    Counted.requests.clear()
    assert drive(plan, "counted://cache") == first
    assert Counted.requests == {"ls": number, "get": number}


def test_an_empty_store_is_asked_once_a_bank_for_what_is_missing(plan: Plan, opened: Counter[tuple[str, str]]) -> None:
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.requests.clear()
    assert len(plan.missing(ReadParts(BankStore("counted://empty")))) == SHARDS + 1
    assert Counted.requests == {"ls": len(list(plan.banks()))}
    assert not opened


# --- what it may be ---------------------------------------------------------------------------------------------------


def cut_short(index: Path, _: dict[Path, bytes]) -> None:
    index.write_bytes(index.read_bytes()[:-10])


def emptied(index: Path, _: dict[Path, bytes]) -> None:
    index.write_bytes(b"")


def altered(index: Path, _: dict[Path, bytes]) -> None:
    index.write_bytes(index.read_bytes().replace(b'"seen": 1', b'"seen": 7'))


def of_another_bank(index: Path, sound: dict[Path, bytes]) -> None:
    other = next(path for path in sound if path.parent != index.parent)
    index.unlink()
    (index.parent / other.name).write_bytes(sound[other])


def of_another_schema(index: Path, _: dict[Path, bytes]) -> None:
    named_for(index, {**json.loads(index.read_bytes()), "schema": 2})


def of_a_receipt_with_other_fields(index: Path, _: dict[Path, bytes]) -> None:
    plain = json.loads(index.read_bytes())
    for entry in plain["parts"].values():
        entry["receipt"]["weather"] = "fine"
    named_for(index, plain)


def of_an_incomplete_part(index: Path, _: dict[Path, bytes]) -> None:
    plain = json.loads(index.read_bytes())
    for entry in plain["parts"].values():
        entry["receipt"]["seen"] = 0
    named_for(index, plain)


def no_mapping(index: Path, _: dict[Path, bytes]) -> None:
    named_for(index, ["parts"])


def named_for(index: Path, plain: Any) -> None:
    """Write `plain` under the name that its bytes call for."""
    data = json.dumps(plain).encode()
    index.unlink()
    (index.parent / f"index-{blake2b(data, digest_size=16).hexdigest()}.json").write_bytes(data)


DAMAGES = (cut_short, emptied, altered, of_another_bank, of_another_schema, of_a_receipt_with_other_fields, of_an_incomplete_part, no_mapping)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_index_that_cannot_be_used_is_passed_over_and_replaced(
    plan: Plan, cache: Path, opened: Counter[tuple[str, str]], damage: Callable[[Path, dict[Path, bytes]], None]
) -> None:
    truth = without_indexes(plan, cache)
    before = {path: path.read_bytes() for path in indexes(cache)}
    for index in before:
        damage(index, before)
    opened.clear()
    assert drive(plan, str(cache)) == truth
    assert len(opened) == len(truth[1]), "every part is read itself"
    opened.clear()
    assert drive(plan, str(cache)) == truth
    assert not opened
    assert {path: path.read_bytes() for path in indexes(cache)} == before, "the same parts have the same index"


def test_a_part_that_is_gone_is_missing_whatever_the_index_says(plan: Plan, cache: Path) -> None:
    bank = train_bank(plan)
    (cache / bank.key / "train-00002.arrow").unlink()
    missing, receipts = drive(plan, str(cache))
    assert missing == ["train-00002.tar"]
    assert [receipt.status for receipt in receipts].count("incomplete") == 1
    banks.write(BankStore(str(cache)), bank.leased, "train-00002.tar", ["train-00002.tar0"])
    assert drive(plan, str(cache))[0] == []


def test_a_part_that_was_replaced_is_read_itself(plan: Plan, cache: Path, opened: Counter[tuple[str, str]]) -> None:
    bank = train_bank(plan)
    (cache / bank.key / "train-00001.arrow").unlink()
    told = banks.write(BankStore(str(cache)), bank.leased, "train-00001.tar", ["another key"])
    opened.clear()
    parts = ReadParts(BankStore(str(cache)))
    assert parts.receipt(bank, "train-00001.tar") == told
    assert plan.missing(parts) == []
    assert set(opened) == {(bank.key, "train-00001.tar")}


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_a_part_that_was_damaged_is_missing(plan: Plan, cache: Path, damage: bytes) -> None:
    (cache / train_bank(plan).key / "train-00003.arrow").write_bytes(damage)
    assert drive(plan, str(cache)) == without_indexes(plan, cache)
    assert drive(plan, str(cache))[0] == ["train-00003.tar"]


def test_an_incomplete_part_is_in_no_index(plan: Plan, tmp_path: Path) -> None:
    bank, store = train_bank(plan), BankStore(str(tmp_path / "cache"))
    partial = banks.write(store, bank.leased, "train-00000.tar", [], expected=1)
    banks.write(store, bank.leased, "train-00001.tar", ["k"])
    for _ in range(2):
        parts = ReadParts(store)
        assert parts.complete(bank, ["train-00000.tar", "train-00001.tar"]) == {"train-00001.tar"}
        assert parts.receipt(bank, "train-00000.tar") == partial
        parts.keep()
    (index,) = indexes(tmp_path / "cache")
    assert list(json.loads(index.read_text())["parts"]) == ["train-00001.tar"]


def test_a_part_that_cannot_be_loaded_takes_the_indexes_of_its_bank_along(plan: Plan, cache: Path) -> None:
    """Size and time may stay where a disk loses bytes: the next run must find what this one stumbled over."""
    bank = train_bank(plan)
    part = cache / bank.key / "train-00000.arrow"
    about = part.stat()
    part.write_bytes(bytes(about.st_size))
    os.utime(part, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert drive(plan, str(cache))[0] == []
    with pytest.raises(BankError, match="run the sweep again"):
        BankStore(str(cache)).rows(bank)
    assert drive(plan, str(cache))[0] == ["train-00000.tar"]


# --- who writes it ----------------------------------------------------------------------------------------------------


def test_two_drivers_write_an_index_each_and_a_later_one_has_what_both_know(plan: Plan, tmp_path: Path, opened: Counter[tuple[str, str]]) -> None:
    bank, store = train_bank(plan), BankStore(str(tmp_path / "cache"))
    drivers = [ReadParts(store), ReadParts(store)]
    for driver, shard in zip(drivers, ("train-00000.tar", "train-00001.tar"), strict=True):
        banks.write(store, bank.leased, shard, [shard])
        driver.complete(bank, [shard])
    for driver in drivers:
        driver.keep()
    assert len(indexes(tmp_path / "cache")) == 2
    opened.clear()
    later = ReadParts(store)
    assert later.complete(bank, ["train-00000.tar", "train-00001.tar"]) == {"train-00000.tar", "train-00001.tar"}
    assert not opened
    later.keep()
    assert len(indexes(tmp_path / "cache")) == 1


def test_an_index_that_another_driver_removes_meanwhile_is_done_without(plan: Plan, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = without_indexes(plan, cache)
    real = BankStore.marks

    def too_late(self: BankStore, key: str) -> dict[str, str | None]:
        marks = real(self, key)
        for path in indexes(cache):
            path.unlink()
        return marks

    monkeypatch.setattr(BankStore, "marks", too_late)
    assert drive(plan, str(cache)) == truth


def test_a_cache_that_is_read_only_gets_no_index(plan: Plan, tmp_path: Path) -> None:
    store = BankStore(str(tmp_path / "cache"))
    banks.fill(store, plan)
    store.read_only = "not ours"
    parts = ReadParts(store)
    assert plan.missing(parts) == []
    parts.keep()
    assert indexes(tmp_path / "cache") == []


def test_an_index_that_cannot_be_written_is_done_without(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BankStore(str(tmp_path / "cache"))
    banks.fill(store, plan)
    parts = ReadParts(store)
    assert plan.missing(parts) == []
    tried = Counter[str]()

    def full(names: Any, data: bytes, *, replace: bool = False) -> bool:
        tried["publish"] += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "publish", full)
    parts.keep()
    assert tried["publish"] == len(list(plan.banks()))
    assert indexes(tmp_path / "cache") == []


def test_what_is_repeated_across_shards_is_kept_and_holds_for_these_keys_alone(plan: Plan, tmp_path: Path, opened: Counter[tuple[str, str]]) -> None:
    store, bank = BankStore(str(tmp_path / "cache")), replace(train_bank(plan), shards=(("a.tar", "", 2), ("b.tar", "", 2)))
    for shard, keys in {"a.tar": ["k", "l"], "b.tar": ["l", "m"]}.items():
        banks.write(store, bank, shard, keys)
    first = ReadParts(store)
    assert first.repeated(bank) == {"b.tar": {"l": "a.tar"}}
    first.keep()
    opened.clear()
    assert ReadParts(store).repeated(bank) == {"b.tar": {"l": "a.tar"}}
    assert not opened
    (tmp_path / "cache" / bank.key / "b.arrow").unlink()
    banks.write(store, bank, "b.tar", ["n", "m"])
    assert ReadParts(store).repeated(bank) == {}


def test_an_index_says_what_was_written_into_it(plan: Plan, cache: Path) -> None:
    bank = train_bank(plan)
    (index,) = (path for path in indexes(cache) if path.parent.name == bank.key)
    entries, repeated = decoded(bank.key, index.name, index.read_bytes())
    assert encoded(bank.key, entries, repeated) == (index.name, index.read_bytes())
    assert [entry.receipt for entry in entries.values()] == [BankStore(str(cache)).receipt(bank, file) for file, _, _ in bank.shards]
