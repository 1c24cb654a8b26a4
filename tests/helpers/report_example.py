"""A run's folder for the tests of the report: the real tables with the real schemas, of made-up encoders on the tiny data set.

Items come from the tasks' own views of the shards, values and intervals from the real metrics on the predictions; only the predictions are drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harness.core import Item, Predictions, Task
from harness.data.manifest import Manifest, load_manifest, shard_url
from harness.data.shards import ShardAudit, read_samples
from harness.files import file_name
from harness.metrics.bootstrap import interval
from harness.probes import locality
from harness.probes.lib.measured import measured
from harness.results.tables import LEDGER, NEIGHBOURS, PREDICTIONS, RESULTS, TRIALS, write_table
from harness.tasks import select
from harness.versions import counters
from tests.helpers import tiny
from tests.helpers.report_rows import Row

TASKS = ("object-linear", "object-knn", "object-retrieval", "object-segmentation", "part-retrieval", "part-linear", "part-knn")
ENCODERS: tuple[str | dict[str, Any], ...] = (
    "alpha",
    "timm:beta_small_patch16_224.dino",
    {"name": "alpha random", "encoder": "alpha", "random": True, "seed": 0},
    {"encoder": "timm:beta_small_patch16_224.dino", "random": True, "seed": 0},
)
DEPTH, QUERIES = 10, 20


def name_of(entry: str | Mapping[str, Any]) -> str:
    if isinstance(entry, str):
        return entry
    return str(entry.get("name") or (f"{entry['encoder']} random" if entry.get("random") else entry["encoder"]))


def bag_rows(rows: Sequence[Row], task: str, protocol: str, sizes: Sequence[int] = (0, 1, 4, 16)) -> list[Row]:
    """A curve in bag size for each encoder of `rows`, made of its first row: values grow with the bag, those of the whole image are its own."""
    first = {row["encoder"]: row for row in reversed(rows)}
    points = []
    for encoder in dict.fromkeys(row["encoder"] for row in rows):
        row = first[encoder]
        for place, size in enumerate(sizes):
            share = 1 - 0.5 ** (place + 1) if size else 1.0
            values = {name: share * row[name] for name in ("value", "ci_low", "ci_high")}
            fields = {**json.loads(row["protocol_fields"]), "bag_size": size}
            point = {"protocol": f"{protocol}[bag_size={size}]", "protocol_fields": json.dumps(fields, sort_keys=True)}
            points.append({**row, **values, **point, "task": task})
    return points


@dataclass(kw_only=True, eq=False)
class Example:
    """What to build. `edit` may change the results' rows before they are written."""

    shards: Path
    encoders: Sequence[str | dict[str, Any]] = ENCODERS
    tasks: Sequence[str] = TASKS
    dataset: str = "tiny"
    seed: int = 0
    edit: Callable[[list[Row]], None] = lambda rows: None
    ledger_edit: Callable[[list[Row]], None] = lambda rows: None
    _items: dict[str, list[Item]] = field(default_factory=dict)
    _tables: dict[Path, list[Row]] = field(default_factory=dict)

    def write(self, out: Path) -> Path:
        """Write the tables and the sweep under `out`; `out`."""
        if not (self.shards / self.dataset).exists():
            tiny.build(self.shards, name=self.dataset)
        manifest = load_manifest(str(self.shards), self.dataset)
        results: list[Row] = []
        trials: list[Row] = []
        self._tables.clear()
        for place, entry in enumerate(self.encoders):
            encoder = name_of(entry)
            skill = (0.25 if "random" in encoder else 0.8) - 0.03 * place
            for name in self.tasks:
                (task,), _ = select([f"{self.dataset}/{name}"], str(self.shards), {})
                rng = np.random.default_rng([self.seed, place, self.tasks.index(name)])
                predictions = self._predictions(task, rng, skill)
                heads = self._trials(rng, encoder, task, skill)
                trials += heads
                chosen = max((head for head in heads if head["val_value"] is not None), key=lambda head: head["val_value"])
                results += [self._result(encoder, task, metric, predictions, chosen, len(heads), manifest) for metric in task.metrics]
                self._write_items(out, encoder, task, predictions, rng, skill)
        self.edit(results)
        ledger = self._ledger(manifest)
        self.ledger_edit(ledger)
        write_table(out / "results.parquet", results, RESULTS)
        write_table(out / "trials.parquet", trials, TRIALS)
        write_table(out / "ledger.parquet", ledger, LEDGER)
        sweep = {"name": "example", "shards": str(self.shards), "encoders": list(self.encoders), "tasks": [f"{self.dataset}/*"]}
        (out / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
        return out

    def items(self, task: Task) -> list[Item]:
        """The items of the test split, as the task's view makes them."""
        if task.view.identity not in self._items:
            manifest = load_manifest(str(self.shards), self.dataset)
            items = self._items.setdefault(task.view.identity, [])
            for shard in manifest.split("test").shards:
                audit = ShardAudit(shard=shard.file, expected=shard.samples)
                url = shard_url(str(self.shards), self.dataset, shard)
                for _, decode in read_samples(url, shard, manifest.rules, audit):
                    items += task.view(decode())
        return self._items[task.view.identity]

    def _predictions(self, task: Task, rng: np.random.Generator, skill: float) -> Predictions:
        items, classes = self.items(task), len(task.classes)
        if task.probe.name in ("dense", "segmentation"):
            cells = [(item, true, guess) for item in items for true in range(classes) for guess in range(classes)]
            return Predictions(
                keys=[item.key for item, _, _ in cells],
                groups=[item.group for item, _, _ in cells],
                targets=np.array([true for _, true, _ in cells]),
                predictions=np.array([guess for _, _, guess in cells]),
                scores=np.array(
                    [float(rng.integers(900, 1100) if true == guess else rng.integers(0, int(1200 * (1 - skill)))) for _, true, guess in cells]
                ),
            )
        if task.probe.name == "locality":
            shares = {name: rng.random(len(items)) < skill if not name.endswith("_chance") else np.full(len(items), 0.2) for name in locality.NAMES}
            return measured(locality.QUANTITIES, [item.key for item in items], [item.group for item in items], shares)
        targets = np.array([item.target for item in items])
        right = rng.random(len(items)) < skill
        guesses = np.where(right, targets, (targets + rng.integers(1, classes, len(items))) % classes)
        scores = np.clip(rng.normal(skill * 0.7, 0.12, len(items)), 0.02, 1)
        return Predictions(keys=[i.key for i in items], groups=[i.group for i in items], targets=targets, predictions=guesses, scores=scores)

    def _trials(self, rng: np.random.Generator, encoder: str, task: Task, skill: float) -> list[Row]:
        rates: list[float | None] = [float(f"{rate:.6g}") for rate in np.geomspace(1e-3, 10, 10)] if task.probe.has_learning_rate else [None]
        rows: list[Row] = []
        for place, readout in enumerate(task.readouts):
            for rate in rates:
                value: float | None = skill - 0.06 * place + 0.02 * rng.random()
                if rate is not None and value is not None:
                    value = None if rate > 5 and place == 0 else float(np.clip(value - 0.09 * abs(np.log10(rate / (0.1 * 4**place))), 0.05, 1))
                rows.append(
                    {
                        "run_id": "example-0",
                        "encoder": encoder,
                        "task": task.name,
                        "protocol": task.protocol.name,
                        "round": len(rows) // 8,
                        "head": len(rows) % 8,
                        "lr": rate,
                        "readout": readout,
                        "metric": task.metrics[0].name,
                        "val_value": value,
                        "epochs": 90 if rate is not None else None,
                        "seconds": 0.5,
                        "status": "ok" if value is not None else "failed",
                        "error": None if value is not None else "expected finite outputs, got NaN or infinity; search below it",
                        "study_id": _study_id(encoder, task),
                    }
                )
        return rows

    def _result(self, encoder: str, task: Task, metric: Any, predictions: Predictions, chosen: Row, tried: int, manifest: Manifest) -> Row:
        estimate = interval(metric, predictions, len(task.classes))
        return {
            "run_id": "example-0",
            "encoder": encoder,
            "weights_sha256": hashlib.sha256(encoder.encode()).hexdigest(),
            "params_m": 21.7,
            "task": task.name,
            "level": task.level,
            "dataset": manifest.dataset,
            "dataset_version": manifest.version,
            "split": "test",
            "view": task.view.identity,
            "readout": chosen["readout"],
            "probe": task.probe.name,
            "protocol": task.protocol.name,
            "protocol_fields": task.protocol.fields.to_json(),
            "metric": metric.name,
            "value": estimate.value,
            "ci_low": estimate.low,
            "ci_high": estimate.high,
            "n": len(set(predictions.keys)),
            "n_failed": 0,
            "hyperparameters": json.dumps({name: chosen[name] for name in ("lr", "readout", "round", "head")}),
            "selected_on": "val",
            "num_trials": tried,
            "seed": 0,
            "status": "ok",
            "error": None,
            "bank_keys": [f"{place:032x}" for place in range(3)],
            "seconds": 1.25,
            "images_per_second": 123.4,
            "device": "cpu:avx512_bf16",
            "precision": "bf16",
            "versions": json.dumps({"python": "3.11.7", "torch": "2.15.0"}),
            "git_commit": "0" * 40,
            "created_at": "2026-01-02T03:04:05+00:00",
            "code_versions": json.dumps(counters()),
            "study_id": _study_id(encoder, task),
            "num_classes": len(task.classes),
            "class_levels": None,
        }

    def _write_items(self, out: Path, encoder: str, task: Task, predictions: Predictions, rng: np.random.Generator, skill: float) -> None:
        folder, names = file_name(encoder), {"encoder": encoder, "task": task.name, "protocol": task.protocol.name}
        columns = zip(predictions.keys, predictions.groups, predictions.targets, predictions.predictions, predictions.scores, strict=True)
        rows = [
            {**names, "key": key, "group": group, "target": int(target), "prediction": int(guess), "score": float(score)}
            for key, group, target, guess, score in columns
        ]
        self._add(out / "predictions" / folder / f"{task.name}.parquet", rows, PREDICTIONS)
        if task.probe.name not in ("retrieval", "locality"):
            return
        items, neighbours = self.items(task), []
        for query in (items[place] for place in np.unique(np.linspace(0, len(items) - 1, QUERIES).astype(int))):
            same = [item for item in items if item.target == query.target and item.group != query.group]
            other = [item for item in items if item.target != query.target and item.group != query.group]
            for rank in range(DEPTH):
                pool = same if rng.random() < skill else other
                item = pool[rng.integers(len(pool))]
                relevant = item.target == query.target
                row = {**names, "query": query.key, "rank": rank + 1, "neighbour": item.key}
                neighbours.append({**row, "similarity": 0.9 - 0.02 * rank, "relevant": relevant})
        self._add(out / "neighbours" / folder / f"{task.name}.parquet", neighbours, NEIGHBOURS)

    def _add(self, path: Path, rows: list[Row], schema: Any) -> None:
        """A table holds the rows of all protocols of its task."""
        self._tables[path] = [*self._tables.get(path, []), *rows]
        write_table(path, self._tables[path], schema)

    def _ledger(self, manifest: Manifest) -> list[Row]:
        return [
            {
                "bank_key": f"{bank:032x}",
                "dataset": manifest.dataset,
                "split": split,
                "shard": shard.file,
                "expected": shard.samples,
                "seen": shard.samples,
                "failed": 0,
                "duplicates": 0,
                "reasons": "{}",
                "attempts": 1,
                "node": "node-0",
                "sha256": shard.sha256,
                "status": "ok",
            }
            for bank in range(3)
            for split, held in manifest.splits.items()
            for shard in held.shards
        ]


def _study_id(encoder: str, task: Task) -> str:
    return hashlib.sha256(f"{encoder} {task.name}@{task.protocol.name}".encode()).hexdigest()[:32]
