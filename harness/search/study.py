"""What a trial does, in plain torch: fit a stack on train, score it on the selection split; and, once a head is chosen, score that one on test.

`run_round` has no test rows and `score` fits nothing: what selects never sees what is reported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from harness.core import FittedStack, Metric, Predictions, Rows
from harness.data.shards import Source
from harness.encoders import EncoderSpec
from harness.errors import BankError, HarnessError, is_of_the_place
from harness.features.bank import BankSpec, BankStore
from harness.features.device import Precision
from harness.features.rows import hold_out, joined
from harness.metrics import sense
from harness.metrics.bootstrap import interval
from harness.probes import metric, probe, row_probe
from harness.probes.retrieval import neighbours
from harness.search.propose import HeadScore
from harness.versions import SCORING_VERSION

GALLERY_QUERIES = 64
GALLERY_DEPTH = 10


@dataclass(frozen=True, kw_only=True)
class BankRef:
    """A bank, and those of its shards that could not be seen at all."""

    bank: BankSpec
    without: tuple[str, ...] = ()
    source: Source | None = None
    """The shards themselves, where the study streams them; the bank then names the stream and holds its accounts alone."""
    reference: BankRef | None = None
    """The bank of another view of the same split, which a probe compares with."""
    more: tuple[BankRef, ...] = ()
    """The banks of further splits, whose rows are scored together with these."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What a study that streams its images needs beside their shards."""

    encoder: EncoderSpec
    weights_sha256: str
    precision: Precision
    batch_size: int
    """Of the encoder, whatever the protocol's batch."""
    decode_threads: int
    checkpoint_seconds: float


@dataclass(frozen=True, kw_only=True)
class Study:
    """The search over one (encoder, task), as its trials need it: plain values, cheap to send, and no test split among them."""

    name: str
    """`<encoder> <task>@<protocol>`."""
    probe: str
    metrics: tuple[str, ...]
    """The first is the one that is searched for, unless `chosen_by` names another."""
    classes: int
    protocol: Mapping[str, Any]
    readouts: tuple[str, ...]
    train: Mapping[str, BankRef]
    """Readout to bank; empty for probes that train on nothing."""
    val: Mapping[str, BankRef]
    """Readout to bank; empty where heads are chosen on a part of train as it is trained on."""
    holds_out: bool
    """Heads are chosen on a stratified tenth of train: of its images as `val` has them, where that is another view of all of train."""
    trials: int
    stack: int
    lr: tuple[float, ...]
    seed: int
    contents: str
    """Digest of what the banks really hold: a repaired shard makes another study of it."""
    stream: Stream | None = None
    """None where the study reads banks."""
    levels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Coarser levels of the classes, which metrics may name."""
    counterparts: tuple[tuple[int, ...], ...] = ()
    """Test label → labels of the data set that was trained on; empty where that is the same one."""
    decided: bool = False
    """There is nothing to choose, and nothing to train: the one head there is is scored at once."""
    chosen_by: str | None = None
    """The metric that is searched for, where that is not the first."""

    def metric(self, name: str) -> Metric:
        """One of `metrics`."""
        return metric(name, self.levels)

    @property
    def searched(self) -> Metric:
        """What heads are chosen by."""
        return self.metric(self.chosen_by or self.metrics[0])

    def merit(self, sums: np.ndarray) -> tuple[float | None, str | None]:
        """Of counts [M] of `searched`: its value, negated where lower is better, or why it has none."""
        value = sense(self.searched) * float(self.searched.value(sums))
        return (value, None) if np.isfinite(value) else (None, f"{self.searched.name} is undefined on the selection split")

    @functools.cached_property
    def id(self) -> str:
        plain = asdict(self)
        plain.pop("stream")  # what could change a value is in the identity of its banks; the rest is names and places
        for ref in (*plain["train"].values(), *plain["val"].values()):
            ref.pop("source")
        text = json.dumps({**plain, "scoring_version": SCORING_VERSION}, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One trial: a stack of heads, fitted and scored on the selection split."""

    index: int
    heads: tuple[HeadScore, ...]
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Round:
        plain = json.loads(text)
        return Round(index=plain["index"], seconds=plain["seconds"], heads=tuple(HeadScore(**head) for head in plain["heads"]))


@dataclass(frozen=True, kw_only=True)
class Value:
    """One metric of the chosen head on test."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    reason: str | None
    n: int = 0
    """Items that the value is of."""
    notes: tuple[str, ...] = ()
    """What a reader has to know beside the value: why it has no interval, how many items it leaves out and why."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The chosen head on test."""

    head: HeadScore | None
    values: tuple[Value, ...]
    n: int
    """Items that its values are of: the most that one of them is."""
    seconds: float
    created_at: str = ""
    """ISO 8601, UTC."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the driver ran with when this was scored: a later run that finds it done tells that, and not its own."""
    error: str | None = None
    untrained: tuple[int, ...] = ()
    """Labels of scored items that no training row had."""
    predictions: dict[str, list[Any]] = field(default_factory=dict)
    neighbours: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Score:
        plain = json.loads(text)
        head = HeadScore(**plain["head"]) if plain["head"] else None
        values = tuple(Value(**{**value, "notes": tuple(value.get("notes", ()))}) for value in plain["values"])
        return Score(**{**plain, "head": head, "values": values, "untrained": tuple(plain.get("untrained", ()))})


class StudyRunner:
    """Runs rounds and scores in one process; keeps the rows that it read last, since the trials of one study read the same ones."""

    def __init__(self, cache: str, device: torch.device) -> None:
        self._store = BankStore(cache)
        self._device = device
        self._rows: dict[tuple[str, str | None, tuple[str, ...]], Rows] = {}

    def run_round(self, study: Study, index: int, proposals: list[tuple[str, float | None]]) -> Round:
        """Fit `proposals` (readout, learning rate) as one stack a readout on train, and score every head on the selection split."""
        start = time.perf_counter()
        heads: list[HeadScore] = []
        states: dict[str, torch.Tensor] = {}
        for readout in dict.fromkeys(readout for readout, _ in proposals):
            rates = [rate for its, rate in proposals if its == readout]
            numbers = range(len(heads), len(heads) + len(rates))
            try:
                train, selection = self.training_rows(study, readout), self.selection_rows(study, readout)
                if study.protocol.get("epoch") == "best":
                    looks = _Looks(study, selection, len(rates))
                    row_probe(study.probe).fit(train, rates, **self._how(study) | {"after_epoch": looks})
                    found = looks.best
                else:
                    stack = row_probe(study.probe).fit(train, rates, **self._how(study))
                    found = [_look(study, stack, position, selection) for position in range(len(rates))]
            except HarnessError as error:
                if is_of_the_place(error):
                    raise  # no answer: to be tried again
                heads += [
                    HeadScore(round=index, head=n, lr=rate, readout=readout, value=None, error=str(error))
                    for n, rate in zip(numbers, rates, strict=True)
                ]
                continue
            for number, rate, look in zip(numbers, rates, found, strict=True):
                heads.append(HeadScore(round=index, head=number, lr=rate, readout=readout, value=look.value, error=look.error, epochs=look.epochs))
                states |= {f"{number}/{name}": tensor.contiguous() for name, tensor in look.state.items()}
        self._store.publish(("studies", study.id, f"round-{index}.safetensors"), save_tensors(states), replace=True)
        return Round(index=index, heads=tuple(heads), seconds=time.perf_counter() - start)

    def has_state(self, study: Study, index: int) -> bool:
        return self._store.read_bytes("studies", study.id, f"round-{index}.safetensors") is not None

    def score(self, study: Study, chosen: HeadScore, held_back: BankRef) -> Score:
        """The chosen head on the test split's bank of its readout, as it is: no refit."""
        start = time.perf_counter()
        test = joined([self._read(study, ref) for ref in (held_back, *held_back.more)])
        if held_back.reference is not None:
            test = replace(test, reference=self._read(study, held_back.reference))
        train = self.training_rows(study, chosen.readout)
        stack = row_probe(study.probe).restore(self.state(study, chosen), train, **self._how(study))
        score = scored(study, chosen, stack.predict(test, 0) if len(test) else None, trained_labels(study, train))
        return replace(
            score,
            seconds=time.perf_counter() - start,
            neighbours=_gallery(study, test) if len(test) and probe(study.probe).neighbours else [],
        )

    def state(self, study: Study, chosen: HeadScore) -> dict[str, torch.Tensor]:
        """The chosen head's weights, empty for probes without. Raises BankError where its round is not in the cache."""
        if study.decided:
            return {}
        data = self._store.read_bytes("studies", study.id, f"round-{chosen.round}.safetensors")
        if data is None:
            raise BankError(f"study {study.id}: the heads of round {chosen.round} are not in the cache; run with --fresh to search anew")
        prefix = f"{chosen.head}/"
        return {name.removeprefix(prefix): tensor for name, tensor in load_tensors(data).items() if name.startswith(prefix)}

    def trained(self, study: Study, chosen: HeadScore) -> frozenset[int] | None:
        """The labels that a streamed head was trained on, None where its round did not note them."""
        data = self._store.read_bytes(*labels_place(study, chosen.round))
        return None if data is None else frozenset(json.loads(data))

    def _how(self, study: Study) -> dict[str, Any]:
        return {"classes": study.classes, "protocol": study.protocol, "seed": study.seed, "device": self._device}

    def training_rows(self, study: Study, readout: str) -> Rows | None:
        if not probe(study.probe).needs_train:
            return None
        rows = self._read(study, study.train[readout])
        return hold_out(rows, seed=study.seed)[0] if study.holds_out else rows

    def selection_rows(self, study: Study, readout: str) -> Rows:
        if study.holds_out:
            return hold_out(self._read(study, (study.val or study.train)[readout]), seed=study.seed)[1]
        return self._read(study, study.val[readout])

    def _read(self, study: Study, ref: BankRef) -> Rows:
        key = (ref.bank.key, study.protocol.get("mask"), ref.without)
        if key not in self._rows:
            if len(self._rows) >= 2 * len(study.readouts) + 1:
                self._rows.clear()
            self._rows[key] = self._store.rows(ref.bank, mask=key[1], without=key[2])
        return self._rows[key]


def labels_place(study: Study, index: int) -> tuple[str, str, str]:
    """Where a round of a streamed study notes the labels that it was trained on, beside its heads' weights."""
    return "studies", study.id, f"round-{index}-labels.json"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class _Look:
    """A head on the selection split."""

    value: float | None
    error: str | None
    state: Mapping[str, torch.Tensor]
    """Empty where the head has no value."""
    epochs: int | None = None
    """After which it was looked at, where not after the last one."""


def _look(study: Study, stack: FittedStack, position: int, selection: Rows) -> _Look:
    value, error = _value(study, stack, position, selection)
    return _Look(value=value, error=error, state={} if value is None else stack.state(position))


class _Looks:
    """Looks at every head after every epoch, and keeps the best of each: the first of equals."""

    def __init__(self, study: Study, selection: Rows, heads: int) -> None:
        self._study, self._selection, self._epochs = study, selection, 0
        self.best = [_Look(value=None, error=None, state={})] * heads

    def __call__(self, stack: FittedStack) -> None:
        self._epochs += 1
        for position, before in enumerate(self.best):
            value, error = _value(self._study, stack, position, self._selection)
            if value is not None and (before.value is None or value > before.value):
                state = {name: tensor.clone() for name, tensor in stack.state(position).items()}
                self.best[position] = _Look(value=value, error=None, state=state, epochs=self._epochs)
            elif before.value is None:
                self.best[position] = _Look(value=None, error=error, state={})


def _value(study: Study, stack: FittedStack, position: int, selection: Rows) -> tuple[float | None, str | None]:
    """A head's merit on the selection split, or why it has none."""
    try:
        if not len(selection):
            return None, "the selection split has no such items"
        return study.merit(study.searched.counts(stack.predict(selection, position), study.classes).sum(axis=0))
    except HarnessError as error:
        if is_of_the_place(error):
            raise
        return None, str(error)


def scored(study: Study, chosen: HeadScore, predictions: Predictions | None, trained: frozenset[int] | None) -> Score:
    """What the chosen head's predictions of test come to, whichever way its probe is fed; None where the test split has no items.

    `trained` are the labels of the training rows, None where the probe trains on none. The seconds are left to the caller.
    """
    if predictions is None:
        values = tuple(Value(metric=name, value=None, low=None, high=None, reason="the test split has no such items") for name in study.metrics)
        return Score(head=chosen, values=values, n=0, seconds=0.0, created_at=now())
    if study.counterparts:
        predictions = translated(predictions, study.counterparts)
    values = tuple(estimate(study.metric(name), predictions, study) for name in study.metrics)
    return Score(
        head=chosen,
        values=values,
        n=max(value.n for value in values),
        seconds=0.0,
        created_at=now(),
        untrained=() if trained is None else untrained_labels(predictions.targets, trained, study.counterparts),
        predictions=columns_of(predictions),
    )


def estimate(one: Metric, predictions: Predictions, study: Study) -> Value:
    """The metric's value and interval, the number of items that it is of, and what is to be said of either."""
    found = interval(one, predictions, study.classes, seed=study.seed)
    rows = np.flatnonzero(one.counted(predictions)).tolist()
    n, items = len({predictions.keys[row] for row in rows}), len(set(predictions.keys))
    notes = []
    if found.value is not None and found.low is None:
        notes.append(f"no interval: {found.reason}")
    if 0 < n < items:
        notes.append(f"{items - n:,} of {items:,} items are not scored: {one.uncounted}")
    return Value(metric=one.name, value=found.value, low=found.low, high=found.high, reason=found.reason, n=n, notes=tuple(notes))


def trained_labels(study: Study, train: Rows | None) -> frozenset[int] | None:
    """The labels that training rows have, or their label maps where the study is about these; None without training rows."""
    if train is None:
        return None
    if study.protocol.get("mask") is None:
        return frozenset(np.unique(train.targets).tolist())
    counts = np.zeros(0, np.int64)
    for mask in train.masks if train.masks is not None else ():
        more = np.bincount(mask.ravel(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return frozenset(np.flatnonzero(counts).tolist())


def untrained_labels(targets: np.ndarray, trained: frozenset[int], counterparts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Those of the targets [N] that are not among the labels `trained`, nor have a counterpart there."""
    tested = np.unique(targets[targets >= 0]).tolist()
    return tuple(label for label in tested if not trained & ({*counterparts[label]} if counterparts else {label}))


def columns_of(predictions: Predictions) -> dict[str, list[Any]]:
    scores = [None if np.isnan(score) else float(score) for score in predictions.scores]
    return {
        "key": list(predictions.keys),
        "group": list(predictions.groups),
        "target": predictions.targets.tolist(),
        "prediction": predictions.predictions.tolist(),
        "score": scores,
    }


def translated(predictions: Predictions, counterparts: Sequence[Sequence[int]]) -> Predictions:
    """Predictions of another data set's labels as labels of the targets' data set.

    The target where the predicted label is one of its counterparts; else the first label that it is a counterpart of, or -1 where there is none.
    Items whose own label has no counterparts are left out, as ObjectNet's images of kinds that ImageNet does not have (Barbu et al., NeurIPS 2019).
    """
    means: dict[int, int] = {}
    for here, labels in enumerate(counterparts):
        for there in labels:
            means.setdefault(there, here)
    kept = np.array([target >= 0 and bool(counterparts[target]) for target in predictions.targets], bool)
    index = np.flatnonzero(kept).tolist()
    pairs = zip(predictions.targets[index].tolist(), predictions.predictions[index].tolist(), strict=True)
    return Predictions(
        keys=[predictions.keys[i] for i in index],
        groups=[predictions.groups[i] for i in index],
        targets=predictions.targets[index],
        predictions=np.array([target if found in counterparts[target] else means.get(found, -1) for target, found in pairs], np.int64),
        scores=predictions.scores[index],
    )


def _gallery(study: Study, test: Rows) -> list[dict[str, Any]]:
    """The nearest neighbours of evenly spread queries: what the report draws."""
    queries = np.unique(np.linspace(0, len(test) - 1, min(GALLERY_QUERIES, len(test))).round().astype(np.int64))
    index, similarity = neighbours(test, top=GALLERY_DEPTH, queries=queries, exclude=study.protocol["exclude"])
    return [
        {
            "query": test.keys[query],
            "rank": rank + 1,
            "neighbour": test.keys[found],
            "similarity": float(similarity[row, rank]),
            "relevant": bool(test.targets[found] == test.targets[query]),
        }
        for row, query in enumerate(queries)
        for rank, found in enumerate(index[row])
        if found >= 0
    ]
