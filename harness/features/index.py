"""What a driver knows of a store's parts: the receipt of every complete one, read once in a run, and kept for later runs in an index of its bank.

`<cache>/<key>/index-<digest>.json` is a shortcut and never the truth. It says of each complete part of its bank what the part itself says, and the
mark (size and time, or the store's own tag) that the part had before it was read. The digest in its name is that of its bytes. An index that is
damaged, or another bank's, or of another schema, is passed over, and so is an entry whose part is gone or has another mark: a part without a valid
entry is read itself. The driver alone writes an index, with all that it knows, and then removes those whose entries are in it. Of two drivers each
writes an index, and a later driver reads both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from harness.features.bank import DIGEST_BYTES, INDEX_PREFIX, BankSpec, BankStore, LeasedBank, Receipt, part_name

SCHEMA = 1
Repeated = Mapping[str, Mapping[str, str]]
"""Shard to the keys of its samples that a shard before it has as well, and that shard."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What an index says of a complete part."""

    mark: str | None
    """None where the store gives none, or the part was read without one: no index then says it."""
    receipt: Receipt
    keys: bytes
    """Digest of the keys of its items."""


@dataclass(kw_only=True, eq=False)
class _Bank:
    """What is known of one bank."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """By shard."""
    repeated: dict[str, Repeated] = field(default_factory=dict)
    """By a digest of the keys of all parts, in hexadecimal."""
    indexes: set[str] = field(default_factory=set)
    """Names of the files whose entries these are, and of damaged ones."""
    has_news: bool = False
    """Whether anything is known that no index says."""


class ReadParts:
    """What a driver has read of a store's parts, so that each complete one is opened once; any other is read anew whenever it is asked for.

    A store is read through one of these while nobody discards its banks.
    """

    def __init__(self, store: BankStore) -> None:
        self.store = store
        self._banks: dict[str, _Bank] = {}
        self._repeated: dict[tuple[str, str, str], Repeated] = {}

    def receipt(self, spec: BankSpec | LeasedBank, shard: str) -> Receipt | None:
        """As `BankStore.receipt`."""
        entry = self._bank(spec.key).entries.get(shard)
        part = (entry.receipt, entry.keys) if entry is not None else self._read_part(spec, shard, None)
        return part[0] if part is not None else None

    def complete(self, spec: BankSpec | LeasedBank, shards: Iterable[str]) -> set[str]:
        """As `BankStore.complete`, in one look at the bank's folder, and one at each part that is there and that no index knows."""
        bank = self._bank(spec.key)
        unknown = [shard for shard in shards if shard not in bank.entries]
        if unknown:
            marks = self.store.marks(spec.key)
            self._read_indexes(spec.key, bank, marks)
            for shard in unknown:
                if shard not in bank.entries and part_name(shard) in marks:
                    self._read_part(spec, shard, marks[part_name(shard)])
        return {shard for shard in shards if shard in bank.entries}

    def repeated(self, spec: BankSpec) -> Repeated:
        """As `BankStore.repeated`. Banks of one split whose parts have the same keys, which is the rule, have one answer."""
        self.complete(spec, [file for file, _, _ in spec.shards])
        bank, digest = self._bank(spec.key), hashlib.blake2b(digest_size=DIGEST_BYTES)
        for file, _, _ in spec.shards:
            part = bank.entries.get(file)
            digest.update(part.keys if part is not None else (self._read_part(spec, file, None) or (None, bytes(DIGEST_BYTES)))[1])
        signature = digest.hexdigest()
        place = (spec.dataset, spec.split, signature)
        if place not in self._repeated:
            self._repeated[place] = bank.repeated[signature] if signature in bank.repeated else self.store.repeated(spec)
        if signature not in bank.repeated:
            bank.repeated, bank.has_news = {signature: self._repeated[place]}, True
        return self._repeated[place]

    def keep(self) -> None:
        """Write what no index says yet. Where that cannot be, the next run reads the parts themselves."""
        for key, bank in self._banks.items() if self.store.read_only is None else ():
            entries = {shard: entry for shard, entry in bank.entries.items() if entry.mark is not None}
            if entries and (bank.has_news or len(bank.indexes) > 1):
                with contextlib.suppress(Exception):  # each of fsspec's file systems raises errors of its own
                    name, data = encoded(key, entries, bank.repeated)
                    self.store.publish((key, name), data, replace=True)  # what has this name already may be damaged
                    for other in bank.indexes - {name}:
                        self.store.discard(key, other)
                    bank.indexes, bank.has_news = {name}, False

    def _bank(self, key: str) -> _Bank:
        return self._banks.setdefault(key, _Bank())

    def _read_part(self, spec: BankSpec | LeasedBank, shard: str, mark: str | None) -> tuple[Receipt, bytes] | None:
        """`mark` was taken before: of a part that is replaced meanwhile the entry is then stale, and not the other way round."""
        part, bank = self.store.receipt_and_keys(spec, shard), self._bank(spec.key)
        if part is not None and part[0].status == "ok":
            bank.entries[shard] = Entry(mark=mark, receipt=part[0], keys=part[1])
            bank.has_news |= mark is not None
        return part

    def _read_indexes(self, key: str, bank: _Bank, marks: Mapping[str, str | None]) -> None:
        for name in sorted(marks):
            if not name.startswith(INDEX_PREFIX) or name in bank.indexes:
                continue
            data = self.store.read_bytes(key, name)
            if data is None:  # another driver has written a better one
                continue
            bank.indexes.add(name)
            entries, repeated = decoded(key, name, data)
            valid = {shard: entry for shard, entry in entries.items() if marks.get(part_name(shard)) == entry.mark}
            bank.has_news |= len(valid) < len(entries) or not entries
            bank.entries = {**valid, **bank.entries}
            bank.repeated = {**repeated, **bank.repeated}


def encoded(key: str, entries: Mapping[str, Entry], repeated: Mapping[str, Repeated]) -> tuple[str, bytes]:
    """The name of an index and its bytes."""
    parts = {shard: {"mark": entry.mark, "keys": entry.keys.hex(), "receipt": vars(entry.receipt)} for shard, entry in sorted(entries.items())}
    data = json.dumps({"schema": SCHEMA, "bank": key, "parts": parts, "repeated": repeated}).encode()
    return _name(data), data


def decoded(key: str, name: str, data: bytes) -> tuple[dict[str, Entry], dict[str, Repeated]]:
    """What an index of the bank `key` says, by shard; nothing where it is damaged, another bank's or of another schema."""
    if name != _name(data):
        return {}, {}
    try:
        plain = json.loads(data)
        if (plain["schema"], plain["bank"]) != (SCHEMA, key):
            return {}, {}
        entries = {
            shard: Entry(mark=entry["mark"], receipt=Receipt(**entry["receipt"]), keys=bytes.fromhex(entry["keys"]))
            for shard, entry in plain["parts"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, {}
    if any((entry.receipt.bank_key, entry.receipt.shard, entry.receipt.status) != (key, shard, "ok") for shard, entry in entries.items()):
        return {}, {}
    return entries, plain["repeated"]


def _name(data: bytes) -> str:
    return f"{INDEX_PREFIX}{hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()}.json"
