"""Keys and shard lists that are worked out once, leases of one size, and parts that are read once in a run."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from harness.features import bank as module
from harness.features.bank import BankSpec, BankStore, LeasedBank, ShardList
from harness.features.index import ReadParts
from harness.search.accounts import Accounts
from tests.helpers import banks

SHARDS = (("a/train-0.tar", "00ff", 3), ("b.tar", "11", 0))
SPEC = BankSpec(
    dataset="x",
    split="train",
    shards=SHARDS,
    readout="cls+mean@-3",
    view='whole;"quoted" ünï',
    identity=(("architecture", "vit"), ("notes", ("one", "two")), ("preprocessing", {"size": (224, 224), "mean": (0.485, 0.456)}), ("threads", 1)),
)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_key_of_a_bank_is_what_it_always_was() -> None:
    """The caches of earlier versions are found under these keys."""
    assert SPEC.key == hashlib.sha256(json.dumps(asdict(SPEC), sort_keys=True).encode()).hexdigest()[:32]
    assert SPEC.key == "332e48890eb05da139d6b7a04a288e72"


@pytest.mark.parametrize("change", [{}, {"dataset": "y"}, {"identity": ()}, {"shards": ()}, {"view": ""}, {"readout": '", "shards": []'}])
def test_a_key_hashes_the_json_of_all_fields_whichever_list_they_share(change: dict[str, Any]) -> None:
    plain = replace(SPEC, **change)
    shared = replace(plain, shards=ShardList(plain.shards))
    assert plain.key == shared.key == hashlib.sha256(json.dumps(asdict(plain), sort_keys=True).encode()).hexdigest()[:32]
    assert plain == shared
    assert hash(plain.shards) == hash(shared.shards)
    assert pickle.loads(pickle.dumps(shared)) == plain
    assert isinstance(pickle.loads(pickle.dumps(shared)).shards, ShardList)
    assert shared.describe() == plain.describe()


def test_a_key_is_hashed_once_and_a_shard_list_written_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: Counter[str] = Counter()
    real = json.dumps

    def counted(value: Any, **how: Any) -> str:
        written[type(value).__name__] += 1
        return real(value, **how)

    monkeypatch.setattr(module.json, "dumps", counted)
    shards = ShardList((f"train-{index:05d}.tar", f"{index:064x}", 1000) for index in range(100))
    specs = [replace(SPEC, shards=shards, readout=readout) for readout in ("cls", "mean", "cls+mean")]
    keys = {spec.key for spec in specs for _ in range(10)}
    assert len(keys) == 3
    assert written["ShardList"] == 1
    assert written["dict"] == 2 * len(specs)


# --- plans and leases -------------------------------------------------------------------------------------------------


def test_all_banks_of_a_split_share_one_shard_list(tmp_path: Path) -> None:
    plan = banks.planned(tmp_path, 50)
    lists = {(bank.dataset, bank.split): bank.shards for study in plan.studies for bank in study.specs}
    assert len(lists) == 2
    assert all(bank.shards is lists[bank.dataset, bank.split] for study in plan.studies for bank in study.specs)


def test_a_lease_is_as_large_whatever_number_of_shards_there_are(tmp_path: Path) -> None:
    few, many = (banks.planned(tmp_path / str(count), count).shard_work for count in (2, 3000))
    sizes = {len(pickle.dumps(work)) - 2 * len(work.url) for work in (*few, *many)}
    assert max(sizes) - min(sizes) < 200
    assert max(sizes) < 4000


def test_a_leased_bank_is_the_bank_that_its_studies_read(tmp_path: Path) -> None:
    plan = banks.planned(tmp_path, 3)
    leased = {job.bank for work in plan.shard_work for encoder_pass in work.passes for job in encoder_pass.banks}
    assert {bank.key for bank in leased} == {bank.key for bank in plan.banks()}
    assert all(isinstance(bank, LeasedBank) for bank in leased)
    assert {(bank.key, bank.readout, bank.view) for bank in leased} == {(bank.key, bank.readout, bank.view) for bank in plan.banks()}


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    return banks.opened(monkeypatch)


@pytest.mark.parametrize("root", ["", "memory://parts-read-once"])
def test_a_run_opens_each_complete_part_once(tmp_path: Path, opened: Counter[tuple[str, str]], root: str) -> None:
    plan, store = banks.planned(tmp_path, 6, encoders=ENCODERS), BankStore(root or str(tmp_path / "cache"))
    banks.fill(store, plan)
    opened.clear()
    parts = ReadParts(store)
    assert plan.missing(parts) == []
    accounts = Accounts(plan, parts, {})
    receipts = [receipt for bank in plan.banks() for receipt in accounts.of(bank)]
    assert len(receipts) == len(opened) == 3 * len(ENCODERS) * (6 + 1)
    assert {receipt.status for receipt in receipts} == {"ok"}
    # the keys themselves are read once per split, since the banks of a split have the same ones
    assert sum(opened.values()) == len(opened) + 6 + 1


ENCODERS = [{"name": f"e{seed}", "architecture": "test_vit", "random": True, "seed": seed} for seed in range(3)]


def test_parts_that_are_not_complete_are_read_anew(tmp_path: Path) -> None:
    store, spec = BankStore(str(tmp_path)), replace(SPEC, shards=(("a.tar", "", 2),))
    parts = ReadParts(store)
    assert parts.receipt(spec, "a.tar") is None
    partial = banks.write(store, spec, "a.tar", ["k"], expected=2)
    assert parts.receipt(spec, "a.tar") == partial
    whole = banks.write(store, spec, "a.tar", ["k", "l"])
    assert parts.receipt(spec, "a.tar") == whole
    (path,) = tmp_path.glob("*/*.arrow")
    path.write_bytes(b"")
    assert parts.receipt(spec, "a.tar") == whole
    assert ReadParts(store).receipt(spec, "a.tar") is None


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_a_part_that_cannot_be_read_has_no_account(tmp_path: Path, damage: bytes) -> None:
    store, spec = BankStore(str(tmp_path)), replace(SPEC, shards=(("a.tar", "", 2),))
    banks.write(store, spec, "a.tar", ["k", "l"])
    (path,) = tmp_path.glob("*/*.arrow")
    path.write_bytes(damage)
    assert store.receipt_and_keys(spec, "a.tar") is None
    assert ReadParts(store).repeated(spec) == {}


def test_banks_of_a_split_whose_keys_differ_have_answers_of_their_own(tmp_path: Path) -> None:
    """A sample that two shards have is repeated in the bank that holds it twice, and not in the one that lost it."""
    store = BankStore(str(tmp_path))
    whole, lacking, other = (replace(SPEC, shards=(("a.tar", "", 2), ("b.tar", "", 2)), readout=readout) for readout in ("cls", "mean", "tokens"))
    for spec, keys in ((whole, {"a.tar": ["k", "l"], "b.tar": ["l", "m"]}), (lacking, {"a.tar": ["k"], "b.tar": ["l", "m"]})):
        for shard, items in keys.items():
            banks.write(store, spec, shard, items)
    for shard, items in {"a.tar": ["k#0", "l#0"], "b.tar": ["l#1", "m#0"]}.items():
        banks.write(store, other, shard, items)
    parts = ReadParts(store)
    for _ in range(2):
        assert parts.repeated(whole) == parts.repeated(other) == {"b.tar": {"l": "a.tar"}}
        assert parts.repeated(lacking) == {}
