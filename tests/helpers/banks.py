"""Plans and banks without an encoder: manifests alone, and parts written as extraction would write them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from harness.data.shards import ShardAudit
from harness.features.bank import BankSpec, BankStore, LeasedBank, Receipt, ShardRows
from harness.plan.plan import Plan
from tests.helpers import here, tiny


def planned(folder: Path, shards: int, **more: Any) -> Plan:
    """A plan over a manifest alone: planning opens no shard."""
    entries = [{"file": f"train-{index:05d}.tar", "samples": 1, "bytes": 1, "sha256": f"{index:064x}"} for index in range(shards)]
    about = {"schema": 1, "dataset": "tiny", "version": "1", "license": "x", "source": "x", "classes": ["a", "b"], "annotations": ["label"]}
    splits = {"train": {"samples": shards, "official": None, "shards": entries}}
    splits["test"] = {"samples": 1, "official": None, "shards": [{**entries[0], "file": "test-00000.tar"}]}
    (folder / "shards" / "tiny").mkdir(parents=True)
    (folder / "shards" / "tiny" / "manifest.json").write_text(json.dumps({**about, "splits": splits}))
    return here.planned(folder, tiny.sweep_text(folder / "shards", tasks=["tiny/object-knn", "tiny/object-linear"], **more))


def write(store: BankStore, spec: BankSpec | LeasedBank, shard: str, keys: Sequence[str], *, expected: int | None = None) -> Receipt:
    audit = ShardAudit(shard=shard, expected=len(keys) if expected is None else expected, seen=len(keys))
    audit.close()
    receipt = Receipt.of(audit, bank_key=spec.key, attempts=1, node="here", rows=len(keys), seconds=0.0, images=len(keys))
    features = [np.zeros(2, np.float32)] * len(keys)
    store.write_part(spec, ShardRows(keys=list(keys), groups=list(keys), targets=[0] * len(keys), features=features), receipt)
    return receipt


def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """(bank, shard) to how often the part was opened."""
    openings: Counter[tuple[str, str]] = Counter()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def open_part(*arguments: Any, **options: Any) -> Any:
            path = next(Path(argument) for argument in arguments if isinstance(argument, str))
            if path.suffix == ".arrow" and "wb" not in arguments:
                openings[path.parent.name, f"{path.stem}.tar"] += 1
            return real(*arguments, **options)

        return open_part

    monkeypatch.setattr(pa, "memory_map", counting(pa.memory_map))
    monkeypatch.setattr(MemoryFileSystem, "open", counting(MemoryFileSystem.open))
    return openings


def fill(store: BankStore, plan: Plan) -> None:
    for bank in plan.banks():
        for file, _, samples in bank.shards:
            write(store, bank.leased, file, [f"{file}{index}" for index in range(samples)])
