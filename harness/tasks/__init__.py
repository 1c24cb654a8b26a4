"""Tasks by name. The folder is the registry: each module defines `templates(manifest)`, the tasks that a data set can have.

A sweep requests a task as `<data set>/<task>[@<protocol>]`; the part before the `@` may be a pattern.
"""

from __future__ import annotations

import fnmatch
import importlib
import itertools
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Generic, TypeVar

import pydantic

from harness.core import Feed, Fields, Level, Metric, Task, TaskProtocol, View
from harness.data.manifest import Manifest, load_manifest
from harness.errors import RequestError, nearest
from harness.features.readouts import parse_readout
from harness.metrics.levels import AtLevel
from harness.probes import metric, probe, row_probe, stream_probe
from harness.probes.fields import Several

Overrides = Mapping[str, object]
"""Protocol fields in a sweep: name → plain value."""
T = TypeVar("T")
Points = Annotated[tuple[T, ...], pydantic.Field(min_length=1, exclude=True)]
"""The points of a curve. A record has only its own point, under another field."""


class BaseProtocol(Fields):
    """The fields of every task's protocol. Those of its family and of its probe are inherited."""

    readouts: Several[str]
    """Candidates, in order of preference."""


P = TypeVar("P", bound=BaseProtocol)


@dataclass(frozen=True, kw_only=True, eq=False)
class Template(Generic[P]):
    """A task of a data set before a protocol is chosen."""

    name: str
    """Without the data set."""
    level: Level
    probe: str
    metrics: tuple[Metric, ...] = ()
    """Empty for those of the probe. Heads are chosen by the first one, unless `chosen_by` names another."""
    protocols: Mapping[str, P]
    """By name, the default first. All of them have the fields of the task's probe."""
    view: Callable[[P], View]
    classes: Callable[[P], tuple[str, ...]]
    feed: Feed = "banked"
    """Whether the probe reads banks or trains on a stream. Streamed tasks take a hundred times as long: a pattern such as `*` leaves them out; a
    pattern must contain the last word of their name, such as `streamed`, to match them."""
    listed: bool = True
    """Whether a pattern such as `*` or `part-*` matches the task. If not, a pattern must contain the last word of its name, as in `*-attentive`, and
    for a streamed task the word before it as well, as in `*-mlp-streamed`."""
    curves: Mapping[str, str] = field(default_factory=dict)
    """Field with the points of a curve → field with the point of a task: a curve is one task per point, on one protocol."""
    train_view: Callable[[P], View | None] | None = None
    """The view that the probe is trained and chosen on, where it differs from the test split's."""
    val_view: Callable[[P], View | None] | None = None
    """The view that heads are chosen on, where it differs from the one that the probe is trained on."""
    reference_view: Callable[[P], View] | None = None
    """The view of the test split that the probe compares with."""
    readouts: Callable[[P], tuple[str, ...]] | None = None
    """The readouts, where other fields determine them; readouts cannot be overridden then."""
    chooses_readout: bool = True
    """Whether the search chooses among the readouts, or takes the first one that the encoder has."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Protocol → its substitute for encoders that cannot see its view."""
    train_dataset: str | None = None
    """Another data set to train and choose on, one of the manifest's `counterparts`."""
    chosen_by: Metric | None = None
    """The metric that heads are chosen by, where it is not the first one."""

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that can be overridden: all except those that other fields determine."""
        derived = {*self.curves.values(), *(["readouts"] if self.readouts is not None else [])}
        return frozenset(name for protocol in self.protocols.values() for name in type(protocol).model_fields if name not in derived)

    def matches(self, pattern: str) -> bool:
        if not fnmatch.fnmatchcase(self.name, pattern):
            return False
        return all(word in pattern for word in self._words)

    @property
    def _words(self) -> tuple[str, ...]:
        """Words of the name that a pattern must contain: none, the last one, or the last two for a streamed task that is not listed."""
        if self.feed == "banked" and self.listed:
            return ()
        *_, before, last = "", *self.name.partition("-from-")[0].split("-")
        return (last,) if self.listed or self.feed == "banked" or not before else (before, last)

    def tasks(self, manifest: Manifest, protocol: str | None, overrides: Overrides) -> list[Task]:
        """The task under one of its protocols, with the `overrides` that are fields of it; one task per point of its curves. Raises RequestError."""
        name = protocol or next(iter(self.protocols))
        if name not in self.protocols:
            raise RequestError(
                f"tasks: {manifest.dataset}/{self.name}: expected one of the protocols {', '.join(self.protocols)}, got {name!r}"
                f"{nearest(name, self.protocols)}"
            )
        fields, other = self._overridden(name, overrides), self.instead.get(name)
        return [
            self._task(
                manifest,
                name,
                fields,
                point,
                instead=self._task(manifest, other, self._overridden(other, overrides), point) if other else None,
            )
            for point in self._points(fields)
        ]

    def _overridden(self, protocol: str, overrides: Overrides) -> P:
        return self.protocols[protocol].replaced(**{name: value for name, value in overrides.items() if name in self.fields})

    def _points(self, fields: P) -> list[dict[str, object]]:
        """Every combination of the curves' points."""
        values = dict(fields)
        return [dict(zip(self.curves.values(), point, strict=True)) for point in itertools.product(*(values[plural] for plural in self.curves))]

    def _task(self, manifest: Manifest, protocol: str, curve: P, point: Mapping[str, object], instead: Task | None = None) -> Task:
        fields = curve.replaced(**point)
        if self.readouts is not None:
            fields = fields.replaced(readouts=self.readouts(fields))
        for readout in fields.readouts:
            parse_readout(readout)
        self._refuse_other_fields(fields)
        set_fields = {key: value for key, value in point.items() if value is not None}  # None is the point that sets nothing
        point_name = ",".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in set_fields.items())
        classes = self.classes(fields)
        metrics = self.metrics or tuple(metric(name) for name in probe(self.probe).metrics)
        # equal names are no proof: parts may be called as classes are
        predicts_labels = self.level == "object" and classes == manifest.classes and any(named_metric.name == "accuracy" for named_metric in metrics)
        levels = manifest.levels if predicts_labels else {}
        return Task(
            name=f"{manifest.dataset}/{self.name}",
            level=self.level,
            dataset=manifest.dataset,
            classes=classes,
            view=self.view(fields),
            readouts=fields.readouts,
            probe=stream_probe(self.probe) if self.feed == "streamed" else row_probe(self.probe),
            metrics=(*metrics, *(AtLevel(metric("accuracy"), level, of) for level, of in levels.items())),
            protocol=TaskProtocol(name=f"{protocol}[{point_name}]" if point_name else protocol, fields=fields),
            feed=self.feed,
            train_view=self.train_view(fields) if self.train_view else None,
            val_view=self.val_view(fields) if self.val_view else None,
            reference_view=self.reference_view(fields) if self.reference_view else None,
            chooses_readout=self.chooses_readout,
            instead=instead,
            levels=levels,
            train_dataset=self.train_dataset,
            counterparts=manifest.counterparts[self.train_dataset] if self.train_dataset else (),
            chosen_by=self.chosen_by,
        )

    def _refuse_other_fields(self, fields: P) -> None:
        """Raises RequestError where the protocol lacks the probe's fields."""
        kind = probe(self.probe).fields
        if not isinstance(fields, kind):
            raise RequestError(
                f"tasks: {self.name}: expected a protocol with the fields of the {self.probe} probe, got {type(fields).__name__}; "
                f"let it inherit from {kind.__name__}"
            )


def families() -> Iterator[Callable[[Manifest], Sequence[Template[Any]]]]:
    """`templates` of every module of this folder, in the order of their names."""
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        yield importlib.import_module(f"{__name__}.{module}").templates


def templates(manifest: Manifest) -> dict[str, Template[Any]]:
    """Every task that the data set can have, by name."""
    return {template.name: template for family in families() for template in family(manifest)}


def select(patterns: Sequence[str], shards: str, overrides: Overrides) -> tuple[list[Task], dict[str, Manifest]]:
    """The tasks that match `patterns`, in order and without repetition, and the manifests of their data sets.

    Overrides under the name of a task, `{misplaced-tokens: {kept_shares: [0.25]}}`, apply to that task alone and take precedence over shared ones.
    Raises RequestError for a pattern without a match, and for an override that is a field of no task of these data sets.
    """
    manifests: dict[str, Manifest] = {}
    chosen: dict[tuple[str, str], Task] = {}
    fields_of: dict[str, frozenset[str]] = {}
    by_task = {key: value for key, value in overrides.items() if isinstance(value, Mapping)}
    shared = {key: value for key, value in overrides.items() if key not in by_task}
    for pattern in patterns:
        dataset, slash, rest = pattern.partition("/")
        task_pattern, _, protocol = rest.partition("@")
        if not slash or not dataset or not task_pattern:
            raise RequestError(f"tasks: expected <data set>/<task>, got {pattern!r}")
        if dataset not in manifests:
            manifests[dataset] = load_manifest(shards, dataset)
        manifest = manifests[dataset]
        available = templates(manifest)
        names = [name for name, template in available.items() if template.matches(task_pattern)]
        if not names:
            listed = ", ".join(available) or "none: its manifest names no labels and no parts"
            raise RequestError(f"tasks: {dataset} has no task {task_pattern!r}{nearest(task_pattern, available)}; it has {listed}")
        fields_of |= {name: fields_of.get(name, frozenset()) | template.fields for name, template in available.items()}
        for name in names:
            for task in available[name].tasks(manifest, protocol or None, {**shared, **by_task.get(name, {})}):
                if task.train_dataset is not None:
                    task = _trained_elsewhere(task, manifests.setdefault(task.train_dataset, load_manifest(shards, task.train_dataset)))
                chosen.setdefault((task.name, task.protocol.name), task)
    _check_overrides(shared, by_task, fields_of)
    return list(chosen.values()), manifests


def with_metrics(tasks: Sequence[Task], names: Sequence[str], asked_by_name: Collection[str]) -> list[Task]:
    """The tasks, with the named metrics added behind their own where they can give them; heads are never chosen by the added ones.

    Raises RequestError where a metric does not exist, where no task can give it, or where a task in `asked_by_name` cannot.
    """
    refusals = {name: [_refuses_metric(task, name) for task in tasks] for name in names}
    for reasons in refusals.values():
        for task, reason in zip(tasks, reasons, strict=True):
            if reason is not None and (task.name in asked_by_name or all(reasons)):
                raise RequestError(f"metrics: {reason}; leave one of them out, or ask for the tasks by a pattern, of which those that can give it do")
    return [
        _with(task, [metric(name, task.levels) for name, reasons in refusals.items() if reasons[place] is None]) for place, task in enumerate(tasks)
    ]


def _refuses_metric(task: Task, name: str) -> str | None:
    """Why a task's predictions cannot give the metric of that name, or None where they can."""
    base, at, level = name.partition("@")
    if at and level not in task.levels:
        return f"{metric(base).name} at a level {level!r}: {task.name} has no such level of its classes"
    further = metric(name, task.levels)
    if further in task.metrics:
        return None
    if task.probe.scores not in further.reads:
        return f"{name} is worked out from {' or '.join(further.reads)}, and the scores of {task.name} are {task.probe.scores}"
    return f"{name} is nothing that {task.name} measures" if task.probe.quantities else None


def _with(task: Task, further: Sequence[Metric]) -> Task:
    instead = _with(task.instead, further) if task.instead is not None else None
    return replace(task, metrics=tuple(dict.fromkeys((*task.metrics, *further))), instead=instead)


def _check_overrides(shared: Overrides, by_task: Mapping[str, Overrides], fields_of: Mapping[str, frozenset[str]]) -> None:
    """Raises RequestError for an unknown field or task."""
    every = frozenset[str]().union(*fields_of.values())
    for key in shared:
        if key not in every:
            raise RequestError(
                f"protocol.{key}: no task of these data sets has this field{nearest(key, every)}; they have {', '.join(sorted(every))}"
            )
    for name, fields in by_task.items():
        if name not in fields_of:
            raise RequestError(f"protocol.{name}: expected a task of these data sets, got {name!r}{nearest(name, fields_of)}")
        for key in fields:
            if key not in fields_of[name]:
                hint = f"{nearest(key, fields_of[name])}; it has {', '.join(sorted(fields_of[name]))}"
                raise RequestError(f"protocol.{name}.{key}: {name} has no such field{hint}")


def _trained_elsewhere(task: Task, manifest: Manifest) -> Task:
    """The task with the classes of the data set that it is trained on. Raises RequestError where its counterparts are not among them."""
    highest = max((label for labels in task.counterparts for label in labels), default=-1)
    if highest >= len(manifest.classes):
        raise RequestError(
            f"{task.name}: expected counterparts among the {len(manifest.classes)} classes of {manifest.dataset}, got label {highest}; "
            "correct `counterparts` in the manifest, or build both data sets again"
        )
    return replace(task, classes=manifest.classes)
