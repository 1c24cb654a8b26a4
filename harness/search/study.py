"""The nouns of a search: the study that its steps carry out, a round and its candidates, what they read, what comes out.

A `Study` names no test split: what chooses among heads never sees what is reported.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from harness.core import Fields, Metric, Predictions, State
from harness.data.shards import Source
from harness.encoders import EncoderSpec
from harness.features.bank import BankSpec
from harness.features.device import Precision
from harness.metrics import sense
from harness.probes import metric
from harness.search.propose import HeadScore
from harness.versions import SCORING_VERSION


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
    protocol: Fields
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

    def merit(self, sums: np.ndarray | None) -> tuple[float | None, str | None]:
        """Of counts [M] of `searched` on the selection split: its value, negated where lower is better, or why it has none.

        The counts are None where the split has no items.
        """
        if sums is None:
            return None, "the selection split has no such items"
        value = sense(self.searched) * float(self.searched.value(sums))
        return (value, None) if np.isfinite(value) else (None, f"{self.searched.name} is undefined on the selection split")

    @functools.cached_property
    def id(self) -> str:
        plain = asdict(self)
        plain["protocol"] = self.protocol.model_dump()
        plain.pop("stream")  # what could change a value is in the identity of its banks; the rest is names and places
        for ref in (*plain["train"].values(), *plain["val"].values()):
            ref.pop("source")
        text = json.dumps({**plain, "scoring_version": SCORING_VERSION}, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A fitted head of a round, and how it does on the selection split."""

    value: float | None
    """Negated where lower is better; None where the head failed."""
    error: str | None = None
    """Why there is no value."""
    state: State = field(default_factory=dict)
    """What the head is scored from later; empty where it has no value."""
    epochs: int | None = None
    """The epoch that it is taken from, counted from 1, where that may not be the last one."""


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
class Predicted:
    """What the chosen head says of the test split."""

    predictions: Predictions | None
    """None where the split has no items."""
    trained: frozenset[int] | None
    """Labels that the head was trained on; None where the probe trains on none, or they were not noted."""
    neighbours: Sequence[dict[str, Any]] = ()
    """Rows of the report's gallery, of a probe that ranks neighbours."""


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
