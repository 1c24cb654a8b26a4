"""What became of a stream's samples: published as bank parts without rows, so that the ledger and the records treat a stream as they treat a bank."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec

from harness.core import StreamEncoder
from harness.data.epochs import merged
from harness.data.shards import ShardAudit
from harness.features.bank import BankStore, Receipt, ShardRows
from harness.search.halving import RungResult
from harness.search.study import BankRef
from harness.search.training import Position, source_of, worst_of


@dataclass(kw_only=True)
class StreamAccount:
    """What became of a stream's samples, and what that cost."""

    audits: list[ShardAudit]
    images: int
    """That the encoder saw."""
    seconds: float
    starts: int

    @staticmethod
    def of_training(progress: Position, encoder: StreamEncoder) -> StreamAccount:
        """Of a training, whose stream ran through `encoder` since it was last begun."""
        return StreamAccount(
            audits=[ShardAudit(**audit) for audit in progress.audits],
            images=progress.images + encoder.images,
            seconds=progress.seconds + encoder.seconds,
            starts=progress.starts,
        )

    @staticmethod
    def of_rungs(results: Mapping[tuple[int, int], RungResult]) -> StreamAccount:
        """Of all heads of a round, from (rung, head) to result: of every shard the worst of their epochs."""
        last = [result.account for result in {head: result for (_, head), result in sorted(results.items())}.values()]  # each holds those before it
        worst: list[dict[str, Any]] = []
        for account in last:
            if account.get("audits"):
                worst = worst_of(worst, [ShardAudit(**audit) for audit in account["audits"]])
        audits = [ShardAudit(**audit) for audit in worst]
        merged(audits, next((account["lost"] for account in last if account.get("lost")), {}))
        images, seconds, starts = ([account.get(name, 0) for account in last] for name in ("images", "seconds", "starts"))
        return StreamAccount(audits=audits, images=sum(images), seconds=sum(seconds), starts=max(starts))

    def publish(self, store: BankStore, ref: BankRef) -> None:
        """As bank parts without rows; images and seconds are shared out by the shards' samples."""
        total = sum(audit.expected for audit in self.audits) or 1
        for audit in self.audits:
            share = audit.expected / total
            receipt = Receipt.of(
                audit,
                bank_key=ref.bank.key,
                attempts=self.starts,
                node=socket.gethostname(),
                rows=0,
                seconds=self.seconds * share,
                images=round(self.images * share),
            )
            store.write_part(ref.bank, ShardRows(), receipt)


def outdated(store: BankStore, refs: Iterable[BankRef]) -> bool:
    """Whether the account of a stream is gone, or a shard of it that was not what its manifest says has been repaired since."""
    for ref in refs:
        for url, shard in source_of(ref).shards:
            receipt = store.receipt(ref.bank, shard.file)
            if receipt is None:
                return True
            if receipt.status != "ok" and receipt.sha256 != shard.sha256 and _sha256(url) == shard.sha256:
                return True
    return False


def _sha256(url: str) -> str | None:
    """Digest of a file, or None where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with fsspec.open(url, "rb") as stream:
            while data := stream.read(1 << 20):
                digest.update(data)
    except Exception:  # each store has errors of its own
        return None
    return digest.hexdigest()
