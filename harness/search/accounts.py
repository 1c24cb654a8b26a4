"""What became of the samples that the studies of a plan read: of every (bank, shard) one receipt, whoever encoded it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from harness.data.shards import NAMED
from harness.features.bank import BankSpec, BankStore, Receipt
from harness.features.index import ReadParts
from harness.plan.plan import Plan, StudyPlan
from harness.search.state import StudyState


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A shard that could not be seen at all."""

    reason: str
    attempts: int


class Accounts:
    """The receipt of every (bank, shard) of a plan, read once."""

    def __init__(self, plan: Plan, store: BankStore | ReadParts, lost: Mapping[str, Lost]) -> None:
        self._parts = store if isinstance(store, ReadParts) else ReadParts(store)
        self._lost = lost
        self._receipts: dict[str, list[Receipt]] = {}
        self._banks = list(plan.banks())

    def of(self, bank: BankSpec) -> list[Receipt]:
        """Receipts of a bank's shards, in the manifest's order; a sample that several shards have counts in the first alone."""
        if bank.key not in self._receipts:
            repeated = self._parts.repeated(bank)
            self._receipts[bank.key] = [self._receipt(bank, shard, samples, repeated.get(shard, {})) for shard, _, samples in bank.shards]
        return self._receipts[bank.key]

    def _receipt(self, bank: BankSpec, shard: str, samples: int, repeated: Mapping[str, str]) -> Receipt:
        receipt = account(self._parts, bank, shard, samples, self._lost.get(f"{bank.dataset}/{bank.split}/{shard}"))
        return without_repeated(receipt, repeated) if repeated else receipt

    def without(self, bank: BankSpec) -> tuple[str, ...]:
        """The bank's shards that could not be seen at all."""
        return tuple(receipt.shard for receipt in self.of(bank) if "shard lost" in receipt.reasons)

    def banks(self) -> Iterator[BankSpec]:
        yield from self._banks


@dataclass(kw_only=True, eq=False)
class Outcome:
    """One study of the plan and what became of it."""

    plan: StudyPlan
    state: StudyState | None
    """None where the study is undefined."""
    error: str | None = None
    """Why the search could not bring it to its end, if so."""


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
