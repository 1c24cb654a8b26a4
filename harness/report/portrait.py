"""An encoder's portrait: the main numbers of all its tasks of a run on one data set, in groups.

Each task is shown under the protocol that comes first in the results, locality under every protocol, each curve by its ends and what stands apart.
Only values on a scale from 0 to 1 are shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.data.manifest import Manifest, load_manifest
from harness.errors import HarnessError
from harness.report.axes import Value, axis_of
from harness.report.board import Row, is_ranked, parsed, reason, status
from harness.report.curves import FLOORS, Curve, curves, ends
from harness.report.points import is_point
from harness.report.units import FRACTION, is_defined, known_chance, unit

GROUPS = ("objects", "parts", "bags", "locality", "misplacement", "sparsity", "shape")
FEWEST = 3
"""Minimum number of groups with a value that make a portrait."""
_BOUNDED = (FRACTION, "cosine")
_ALONG: Mapping[str, tuple[str, str]] = {
    "bag-knn": ("bags", "k-NN"),
    "bag-linear": ("bags", "linear"),
    "bag-convergence": ("bags", "cosine"),
    "misplaced-tokens": ("misplacement", "AUROC"),
    "dropped-tokens": ("sparsity", "k-NN"),
    "shuffled-patches": ("shape", "k-NN"),
}
"""Tasks that are curves: their group, and what they are called in it."""
_LOCALITY = "patch-locality"
_FAMILIES = {"knn": "k-NN", "finetune": "fine-tuned"}


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value in [-1, 1] with its interval, as far as it has one."""

    value: float
    low: float | None
    high: float | None
    floor: float | None
    """Chance level, or the measured floor; None where it is unknown."""
    incomplete: bool


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the portrait."""

    group: str
    label: str
    mark: Mark | None
    """None where it has no value."""
    twin: Mark | None
    """The mark of the encoder with random weights."""
    missing: str
    """Why there is no value; empty where there is one."""
    readout: str | None = None
    """The chosen readout, where bags stand beside the task, which may have another."""


@dataclass(frozen=True, kw_only=True)
class Portrait:
    """All lines of one encoder on one data set, group by group."""

    encoder: str
    twin: str | None
    dataset: str
    entries: tuple[Entry, ...]
    bags: str = ""
    """Which readout bags have, and how often they were drawn; empty where there are none."""

    @property
    def groups(self) -> list[str]:
        """Those with a line, in their order."""
        return [group for group in GROUPS if any(entry.group == group for entry in self.entries)]

    @property
    def is_enough(self) -> bool:
        return len({entry.group for entry in self.entries if entry.mark is not None}) >= FEWEST


def portraits(results: Sequence[Row], twins: Mapping[str, str | None], shards: str | None) -> list[Portrait]:
    """A portrait of every encoder and data set with enough groups, except random twins, which are drawn beside their encoders.

    `shards` is where manifests say how many classes there are, for chance; without it chance is known for fewer numbers.
    """
    partners = {trained: random for random, trained in twins.items() if trained is not None}
    along = curves(results)
    drawn_portraits = []
    for dataset in dict.fromkeys(row["dataset"] for row in results):
        manifest = _manifest(shards, dataset)
        for encoder in dict.fromkeys(row["encoder"] for row in results):
            if twins.get(encoder) is not None:
                continue
            drawn = _Sitting(results, along, encoder, partners.get(encoder), dataset, manifest)
            portrait = Portrait(encoder=encoder, twin=partners.get(encoder), dataset=dataset, entries=tuple(drawn.entries()), bags=drawn.bags())
            if portrait.is_enough:
                drawn_portraits.append(portrait)
    return drawn_portraits


def _manifest(shards: str | None, dataset: str) -> Manifest | None:
    try:
        return load_manifest(shards, dataset) if shards is not None else None
    except HarnessError:
        return None


class _Sitting:
    """The rows of one encoder and its twin on one data set."""

    def __init__(
        self, results: Sequence[Row], along: Sequence[Curve], encoder: str, twin: str | None, dataset: str, manifest: Manifest | None
    ) -> None:
        self._rows = {
            (row["encoder"], row["task"], row["protocol"], row["metric"]): row
            for row in results
            if row["dataset"] == dataset and row["encoder"] in (encoder, twin)
        }
        self._curves = [curve for curve in along if curve.dataset == dataset and encoder in curve.encoders]
        self._encoder, self._twin, self._manifest = encoder, twin, manifest

    def entries(self) -> list[Entry]:
        lines = [*self._plain(), *self._along()]
        return sorted(lines, key=lambda entry: GROUPS.index(entry.group))

    def bags(self) -> str:
        """Readouts and draws of the bags' rows that have a value."""
        rows = [row for row in self._bag_rows() if parsed(row["protocol_fields"]).get("bag_size")]
        draws = {fields["draws"] for row in rows if "draws" in (fields := parsed(row["protocol_fields"]))}
        words = [f"{draw} draw{'' if draw == 1 else 's'} an image" for draw in sorted(draws)]
        return ", ".join([*dict.fromkeys(f"readout {row['readout']}" for row in rows if row["readout"]), *words])

    def _bag_rows(self) -> list[Row]:
        of_bags = {task for task, (group, _) in _ALONG.items() if group == "bags"}
        return [
            row
            for (encoder, task, _, _), row in self._rows.items()
            if encoder == self._encoder and task.rpartition("/")[2] in of_bags and is_defined(row["value"])
        ]

    def _plain(self) -> Iterator[Entry]:
        """Entries of tasks that are not curves: the first metric; for locality and coarser levels every metric."""
        first: dict[str, tuple[str | None, str | None]] = {}
        missing: set[tuple[str, str | None]] = set()
        for (encoder, task, protocol, metric), row in self._rows.items():
            if encoder != self._encoder or is_point(protocol):
                continue
            main = first.setdefault(task, (protocol, metric))
            kind = task.rpartition("/")[2]
            placed = _place(kind, metric, is_main=(protocol, metric) == main)
            if placed is None or (protocol != main[0] and kind != _LOCALITY):
                continue
            group, label = placed
            if protocol != main[0] and is_defined(row["value"]):
                label = f"{label}, {protocol}"
            elif protocol != main[0]:  # one line for everything without a value
                if (task, protocol) in missing:
                    continue
                missing.add((task, protocol))
                label = str(protocol)
            yield self._entry(row, group, label)

    def _along(self) -> Iterator[Entry]:
        """Entries of curves: their ends, under the first protocol that has a value."""
        by_task: dict[str, list[Curve]] = {}
        for curve in self._curves:
            by_task.setdefault(curve.task, []).append(curve)
        for task, task_curves in by_task.items():
            placed = _ALONG.get(task.rpartition("/")[2])
            if placed is None:
                continue
            group, name = placed
            curve = next((candidate for candidate in task_curves if ends(candidate, self._encoder)), task_curves[0])
            shown = [point for point in ends(curve, self._encoder) if not (name == "cosine" and point.place[curve.x] in axis_of(curve.x).apart)]
            for point in shown:  # the whole image trivially equals itself
                how = "grey, " if curve.protocol.startswith("grey") else ""
                yield self._entry(point.row, group, f"{name}, {how}{_at(curve.x, point.place[curve.x])}")
            if not shown:
                rows = [point.row for point in curve.main_points() if point.row["encoder"] == self._encoder]
                yield self._entry(rows[0], group, name)

    def _entry(self, row: Row, group: str, label: str) -> Entry:
        twin = self._rows.get((self._twin, row["task"], row["protocol"], row["metric"])) if self._twin is not None else None
        return Entry(
            group=group,
            label=label,
            mark=_mark(row, self._floor(row)),
            twin=_mark(twin, self._floor(twin)) if twin is not None else None,
            missing="" if is_defined(row["value"]) else f"{status(row)}: {reason(row)}",
            readout=row["readout"] if self._stands_beside(row) else None,
        )

    def _stands_beside(self, row: Row) -> bool:
        """Whether the portrait has bags with a probe of the same kind."""
        dataset, _, kind = row["task"].rpartition("/")
        return kind.startswith("object-") and f"{dataset}/bag-{kind.removeprefix('object-')}" in {bag_row["task"] for bag_row in self._bag_rows()}

    def _floor(self, row: Row) -> float | None:
        metric = str(row["metric"])
        for ending in FLOORS:
            other = self._rows.get((row["encoder"], row["task"], row["protocol"], f"{metric}{ending}"))
            if other is not None and is_defined(other["value"]):
                return float(other["value"])
        if metric not in ("accuracy", "mean_class_accuracy"):
            return known_chance(metric)
        classes = self._classes(row)
        return 1 / classes if classes else None

    def _classes(self, row: Row) -> int | None:
        """The number of equally likely classes of a guess; None where it is unknown."""
        parts = parsed(row["protocol_fields"]).get("parts")
        if isinstance(parts, Iterable) and not isinstance(parts, str):
            return len(list(parts))
        if self._manifest is None or row["level"] != "object" or "-from-" in row["task"]:
            return None
        return len(self._manifest.classes)


def _place(kind: str, metric: str | None, *, is_main: bool) -> tuple[str, str] | None:
    """Group and label of a number that is not a point of a curve; None where it is not shown."""
    if unit(metric) not in (*_BOUNDED, None):
        return None
    if kind == _LOCALITY:
        return ("locality", str(metric).replace("_", " ")) if metric is None or not metric.endswith(FLOORS) else None
    level, _, family = kind.partition("-")
    name = _FAMILIES.get(family or kind, (family or kind).replace("-", " "))
    if metric is not None and "@" in metric:
        return "shape", f"{name} @ {metric.partition('@')[2]}"
    if not is_main:
        return None
    label = name if metric in (None, "accuracy") else f"{name}, {metric}"
    if kind == "finetune" or "-from-" in kind:
        return "shape", label
    return (f"{level}s", label) if level in ("object", "part") else None


def _at(field: str, value: Value) -> str:
    """A place on a curve in a few letters."""
    if isinstance(value, int | float) and value not in axis_of(field).apart:
        if field == "bag_size":
            return f"{value:g} patch{'es' if value != 1 else ''}"
        if field == "kept_share":
            return f"{100 * value:g} % kept"
        if field == "grid":
            return f"{value:g}×{value:g} cells" if value != 1 else "intact"
        return f"{field.replace('_', ' ')} {value:g}".replace("-", "−")
    return axis_of(field).text(value)


def _mark(row: Row, floor: float | None) -> Mark | None:
    if not is_defined(row["value"]):
        return None
    bounds = [float(row[bound]) if is_defined(row[bound]) else None for bound in ("ci_low", "ci_high")]
    return Mark(value=row["value"], low=bounds[0], high=bounds[1], floor=floor, incomplete=not is_ranked(row))
