"""Measured values beside published ones: `published.csv` holds the papers' figures, and this decides which record may stand beside which figure.

No record is matched to a figure by guess. The sweep must call the encoder as the table does, and its family, architecture and checkpoint's file
name must be the table's; task, data set's version, readout, protocol and every protocol field that the table names must be equal. Where one differs,
the two are kept apart and the reason is given.

A figure without protocols is one that no protocol here is known to repeat: it is listed for reading and set beside nothing.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast, get_args

from harness.errors import RequestError
from harness.report.board import Row, parsed, reason, status
from harness.report.units import is_defined

Status = Literal["published", "gain only", "not published", "not recovered"]
"""A value; a difference between two values; a gap in the paper's table; a value in the paper that could not be read."""
TABLE = "published.csv"
_WORDS = ("paper", "arxiv", "place", "encoder", "family", "architecture", "dataset_version", "metric", "source", "note")
_LISTS = ("checkpoints", "protocols", "readouts")
_OVERRIDDEN = "preprocessing overridden: "
"""How a note began, in runs of earlier versions, that names the fields of an encoder's preprocessing that a sweep replaced."""
_MISPLACED = (
    "the authors' released code gives every patch of MAE a random position, anew in every pass, which moves its cls by 4 %: "
    "the paper's figures of parts may be of misplaced tokens"
)
_MAE_OF_ZHU = ("2301.11915", "mae")
"""Paper and family whose features the released code makes so."""
_SAME_RATE = 1e-6
"""Relative difference below which two learning rates are one: those of a search come out of exponentials."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of the table."""

    paper: str
    arxiv: str
    place: str
    """Where in the paper, as far as that is known."""
    encoder: str
    """As the paper calls it, and as a sweep must call it to be set beside the figure."""
    family: str
    architecture: str
    """As harness.encoders names them; empty where unknown."""
    checkpoints: tuple[str, ...]
    """Names of the files that the authors published, any of which holds these weights."""
    tasks: tuple[str, ...]
    """`<data set>/<task>` for figures that a task here repeats, words otherwise."""
    dataset_version: str
    protocols: tuple[str, ...]
    """Protocols here that repeat it, as far as the paper describes it; empty where none is known."""
    readouts: tuple[str, ...]
    fields: Mapping[str, Any]
    """Protocol fields that a record must have, with their values."""
    lr: float | None
    preprocessing: Mapping[str, Any]
    """What the encoder's preprocessing must be, as encoders.json has it; fields not named here are the encoder's own."""
    metric: str
    value: float | None
    """A fraction; None unless the status is `published` or `gain only`."""
    status: Status
    source: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A record and the figure that it repeats."""

    record: Row
    figure: Published
    remarks: tuple[str, ...]
    """Known differences, and things not known to be equal."""

    @property
    def difference(self) -> float:
        """Measured less published, a fraction."""
        return cast(float, self.record["value"]) - self._published

    @property
    def interval(self) -> tuple[float, float] | None:
        """The record's interval, shifted by the published value, which is taken as exact; None where the record has none."""
        low, high = self.record["ci_low"], self.record["ci_high"]
        return (low - self._published, high - self._published) if is_defined(low) and is_defined(high) else None

    @property
    def _published(self) -> float:
        return cast(float, self.figure.value)


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A record of the same name, task, metric and protocol as a figure, which may not be set beside it."""

    record: Row
    figure: Published
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the table says about a run."""

    beside: tuple[Beside, ...] = ()
    apart: tuple[Apart, ...] = ()
    unknown: tuple[Published, ...] = ()
    """Figures of the run's tasks and encoders that a paper lacks, or that could not be read from it."""


@functools.cache
def table() -> tuple[Published, ...]:
    """Every published figure, in the file's order. Raises ValueError where the file does not have the form that this module reads: a bug."""
    with (files(__package__) / TABLE).open(encoding="utf-8") as stream:
        return tuple(_read(row) for row in csv.DictReader(stream))


def compare_published(results: Sequence[Row], encoders: Mapping[str, Mapping[str, Any]]) -> Comparison:
    """Every record with the figure that it repeats; `encoders` is what is known of the run's encoders, as in encoders.json."""
    beside, apart = [], []
    for record, figure in _candidates(results):
        reasons = tuple(_differences(record, figure, encoders.get(record["encoder"])))
        if reasons:
            apart.append(Apart(record=record, figure=figure, reasons=reasons))
        else:
            beside.append(Beside(record=record, figure=figure, remarks=tuple(_remarks(record, figure))))
    return Comparison(beside=tuple(beside), apart=tuple(apart), unknown=tuple(_unknown(results)))


def read_encoders(out: Path) -> dict[str, dict[str, Any]]:
    """The content of a run's encoders.json by encoder; empty where there is none. Raises RequestError where no sweep wrote it."""
    path = out / "encoders.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path}: expected JSON, got an error: {error}; run the sweep again") from None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise RequestError(f"{path}: expected an object of encoders, got something else; run the sweep again")
    return content


def _read(row: Mapping[str, str]) -> Published:
    state = row["status"]
    if state not in get_args(Status):
        raise ValueError(f"{TABLE}: expected a status of {', '.join(get_args(Status))}, got {state!r}")
    has_value = state in ("published", "gain only")
    if bool(row["value"]) != has_value:
        raise ValueError(
            f"{TABLE}: {row['paper']}, {row['encoder']}, {row['task']}: status {state!r} and value {row['value']!r} contradict each other"
        )
    words: dict[str, Any] = {name: row[name] for name in _WORDS}
    listed: dict[str, Any] = {name: tuple(row[name].split()) for name in _LISTS}
    return Published(
        **words,
        **listed,
        tasks=tuple(row["task"].split()) if "/" in row["task"] else (row["task"],),  # a task's name, not a description
        fields=json.loads(row["fields"]) if row["fields"] else {},
        preprocessing=json.loads(row["preprocessing"]) if row["preprocessing"] else {},
        lr=float(row["lr"]) if row["lr"] else None,
        value=float(row["value"]) if has_value else None,
        status=cast(Status, state),
    )


def _candidates(results: Sequence[Row]) -> Iterator[tuple[Row, Published]]:
    """Pairs that are about the same thing by their names."""
    for record in results:
        for figure in table():
            if (
                figure.status == "published"
                and record["encoder"] == figure.encoder
                and record["task"] in figure.tasks
                and record["metric"] == figure.metric
                and record["protocol"] in figure.protocols
            ):
                yield record, figure


def _unknown(results: Sequence[Row]) -> Iterator[Published]:
    scored = {(record["task"], record["metric"]): None for record in results}
    encoders = {record["encoder"] for record in results}
    named = {figure.encoder for figure in table() if figure.protocols}
    for figure in table():
        # a figure without an encoder is about all of its paper's
        is_of_run = figure.encoder in encoders or (not figure.encoder and bool(encoders & named))
        if is_of_run and figure.status in ("not recovered", "not published") and any((task, figure.metric) in scored for task in figure.tasks):
            yield figure


def _differences(record: Row, figure: Published, encoder: Mapping[str, Any] | None) -> Iterator[str]:
    """Reasons why record and figure do not describe the same thing."""
    if status(record) != "ok":
        yield f"the record is {status(record)}: {reason(record)}"
    yield from _encoder_differences(figure, encoder)
    if record["dataset_version"] != figure.dataset_version:
        yield f"the data set is {record['dataset_version']!r}, the paper's {figure.dataset_version!r}"
    if record["readout"] is not None and record["readout"] not in figure.readouts:
        yield f"the readout is {record['readout']}, the paper's {' or '.join(figure.readouts)}"
    protocol_fields = parsed(record["protocol_fields"])
    for name, value in figure.fields.items():
        if name not in protocol_fields:
            yield f"{name} is {json.dumps(value)} in the paper, and no choice of this protocol"
        elif protocol_fields[name] != value:
            yield f"{name} is {json.dumps(protocol_fields[name])}, the paper's {json.dumps(value)}"


def _encoder_differences(figure: Published, encoder: Mapping[str, Any] | None) -> Iterator[str]:
    if encoder is None:
        yield "encoders.json does not tell what the encoder is"
        return
    if encoder.get("random"):
        yield "the encoder's weights are random"
        return
    for name in ("family", "architecture"):
        if encoder.get(name) != getattr(figure, name):
            yield f"the encoder's {name} is {encoder.get(name)}, the paper's {getattr(figure, name)}"
    file = Path(str((encoder.get("load_report") or {}).get("file") or "")).name
    if file not in figure.checkpoints:
        yield f"the encoder was read from {file or 'no file'}, the paper's from {' or '.join(figure.checkpoints)}"
    yield from _preprocessing_differences(figure, encoder)


def _preprocessing_differences(figure: Published, encoder: Mapping[str, Any]) -> Iterator[str]:
    preprocessing = encoder.get("preprocessing") or {}
    for name, value in figure.preprocessing.items():
        if preprocessing.get(name) != value:
            yield f"the encoder's images have {name} {json.dumps(preprocessing.get(name))}, the paper's {json.dumps(value)}"
    for note in map(str, encoder.get("notes") or ()):
        if note.startswith(_OVERRIDDEN) and not set(note.removeprefix(_OVERRIDDEN).split(", ")) <= set(figure.preprocessing):
            yield note
    replaced = [name for name in encoder.get("preprocessing_replaced") or () if name not in figure.preprocessing]
    if replaced:
        yield f"the encoder's own {', '.join(replaced)} of images replaced ({encoder.get('preprocessing_source')})"


def _remarks(record: Row, figure: Published) -> Iterator[str]:
    if record["selected_on"] == "train/10":
        yield "trained without the tenth of train that heads are chosen on, where the paper trains on all of it"
    rate = parsed(record["hyperparameters"]).get("lr")
    if figure.lr is not None and rate is not None and abs(rate - figure.lr) > _SAME_RATE * figure.lr:
        yield f"the learning rate was chosen; the paper's is {figure.lr:g}"
    if (figure.arxiv, figure.family) == _MAE_OF_ZHU:
        yield _MISPLACED
    if figure.note:
        yield figure.note
