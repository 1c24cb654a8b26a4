"""Checkpoints as their authors save them: where the encoder and its pretraining head lie in the file, what shape they have, what may be left out."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import nn

from harness.core import Encoder, LoadReport, Preprocessing
from harness.encoders.create import fair_residuals, wrap
from harness.encoders.files import Checkpoint, read_checkpoint, unwrapped
from harness.encoders.heads import Tensors, WeightNormed
from harness.encoders.identity import Identity
from harness.encoders.layouts import refuse_other_authors, translate
from harness.encoders.loading import TensorSelection, first_few, load_into, refuse_silent_misfit, select
from harness.encoders.positions import PositionResize
from harness.encoders.preprocessing import IMAGENET, Chosen, at_side, decide, of_family
from harness.encoders.resize import one_line
from harness.encoders.spec import EncoderSpec
from harness.encoders.vit_shape import VitShape
from harness.errors import EncoderError

_ANCHORS = ("patch_embed.proj.weight", "conv1.weight")
_TRAINING = ("optimizer.", "lr_scheduler.", "scheduler.", "scaler.", "fp16_scaler.")
"""Beginnings of the keys of training state, which any of the authors may save."""


class Shape(Protocol):
    """What decides a forward pass besides the weights."""

    @property
    def size(self) -> int:
        """Image side that it was trained at, in pixels."""

    def describe(self) -> str: ...

    def create(self) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a file an encoder may lie: beginnings of its keys and of its pretraining head's."""

    trunk: str
    head: str | None = None
    accepts: Callable[[Tensors], bool] | None = None
    """Whether the tensors there, by their names in the file, are this format's; needed where other formats lie in the same place."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A registered name of a format: which places of a file it means, and which shape it must have (None: that of the file)."""

    description: str
    places: tuple[Place, ...]
    content: str
    """What lies there, for the record: e.g. `the teacher`."""
    shape: Shape | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """One authors' way of saving checkpoints."""

    family: str
    paper: str
    entries: Mapping[str, Entry]
    read_shape: Callable[[str, Tensors, int | None], Shape]
    """From path, tensors and the given number of heads."""
    droppable: tuple[str, ...]
    """Beginnings of the encoder's keys that its authors save and the forward pass does not need."""
    beside: tuple[str, ...] = ()
    """Beginnings of keys, by their full path, that its authors save outside the encoder and its head."""
    make_head: Callable[[Tensors, Mapping[str, object]], nn.Module] | None = None
    """From the head's tensors and the training arguments in the file."""
    head_droppable: tuple[str, ...] = ()
    convert: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    """Renames the authors' tensors to the network's names."""
    convert_head: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)
    preprocessing: Preprocessing = IMAGENET
    position_resize: PositionResize = "bicubic"
    notes: tuple[str, ...] = ()


def bind(fmt: Format) -> tuple[Callable[[], dict[str, str]], Callable[[EncoderSpec], bool], Callable[[EncoderSpec], Encoder]]:
    """The three functions that a family's module defines: `names, claims, build = bind(FORMAT)`."""

    def names() -> dict[str, str]:
        return {name: entry.description for name, entry in fmt.entries.items()}

    def claims(spec: EncoderSpec) -> bool:
        return spec.encoder in fmt.entries

    def build(spec: EncoderSpec) -> Encoder:
        return _build(fmt, spec)

    return names, claims, build


def _build(fmt: Format, spec: EncoderSpec) -> Encoder:
    """The encoder of a checkpoint in the authors' format, with its pretraining head where the file has one, or its random twin.

    Raises EncoderError unless every key is accounted for and the shape is known.
    """
    entry = fmt.entries[spec.encoder or ""]
    heads = _given_heads(spec)
    if spec.checkpoint is None:
        if not spec.random:
            raise EncoderError(f"encoder {spec.name}: {spec.encoder} needs checkpoint: FILE, as its authors publish it, or random: true")
        if entry.shape is None:
            sized = ", ".join(name for name, other in fmt.entries.items() if other.shape is not None)
            raise EncoderError(f"encoder {spec.name}: a random twin of {spec.encoder} has no size: give checkpoint: FILE, or one of {sized}")
        return _random(fmt, spec, entry.shape, None, None)
    fmt, located = _find(fmt, spec, read_checkpoint(spec.checkpoint))
    checkpoint, place, content = located.checkpoint, located.place, located.content
    trunk_tensors, head_tensors, classifier = _parts(fmt, located, spec)
    refuse_other_authors(checkpoint, trunk_tensors)
    shape = fmt.read_shape(checkpoint.path, trunk_tensors, heads)
    _check_shape(fmt, spec, entry, shape)
    if heads is None and isinstance(shape, VitShape):
        refuse_silent_misfit(checkpoint, trunk_tensors, width=shape.width, heads=shape.heads, reader=spec.encoder or fmt.family)
    head = _make_head(fmt, checkpoint, head_tensors)
    if spec.random:
        return _random(fmt, spec, shape, head, checkpoint)
    trunk = _create(shape, 0)
    report = _load(fmt, spec, located, (trunk, trunk_tensors), (head, head_tensors), classifier)
    where = f", under {place.trunk!r}" if place.trunk else ""
    identity = Identity(
        name=spec.name,
        family=fmt.family,
        architecture=shape.describe(),
        source=f"{fmt.paper}: {content} in {checkpoint.file}{where}, sha256 {checkpoint.sha256[:12]}",
        preprocessing=_preprocessing(fmt, spec, shape, checkpoint),
        position_resize=fmt.position_resize,
        load_report=report,
        notes=(*fmt.notes, *(("a classifier lies in the file and is left out: the encoder may be fine-tuned",) if classifier else ())),
    )
    return wrap(trunk, identity, head)


def _make_head(fmt: Format, checkpoint: Checkpoint, tensors: Tensors) -> nn.Module | None:
    if not tensors or fmt.make_head is None:
        return None
    try:
        return fmt.make_head(tensors, checkpoint.args)
    except (AttributeError, IndexError, KeyError, RuntimeError, ValueError) as error:
        example = ", ".join(list(tensors)[:3])
        raise EncoderError(
            f"checkpoint {checkpoint.path}: its pretraining head is not {fmt.family}'s: {one_line(error)} among keys such as {example}; "
            "drop: [head.] leaves it out"
        ) from error


def _given_heads(spec: EncoderSpec) -> int | None:
    """num_heads, the one option that a file does not determine."""
    options = dict(spec.options)
    heads = options.pop("num_heads", None)
    if options:
        raise EncoderError(f"encoder {spec.name}: {spec.encoder} takes the option num_heads only, got {', '.join(options)}; leave the others out")
    if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
        raise EncoderError(f"encoder {spec.name}: option num_heads must be a whole number of at least 1, got {heads!r}")
    return heads


@dataclass(frozen=True, kw_only=True, eq=False)
class _LocatedEncoder:
    """An encoder in a file."""

    checkpoint: Checkpoint
    place: Place
    content: str
    translated: TensorSelection | None = None
    """Its tensors by timm's names, where the file uses other authors' names."""


def _find(fmt: Format, spec: EncoderSpec, given: Checkpoint) -> tuple[Format, _LocatedEncoder]:
    """The encoder that the spec means, and the format with places that match its keys.

    The search goes through the authors' own places, then the same without the wrappers that parallel training leaves in the keys, then other authors'
    names for the same network. Raises EncoderError where nothing matches.
    """
    checkpoint, prefix = unwrapped(given, spec.prefix)
    for form, file, start in ((fmt, checkpoint, prefix), _without_modules(fmt, checkpoint, prefix)):
        located = _locate(form, form.entries[spec.encoder or ""], file, start)
        if located is not None:
            return form, located
    other = None if spec.rename else translate(checkpoint, prefix)
    entry = fmt.entries[spec.encoder or ""]
    if other is not None:
        return fmt, _LocatedEncoder(
            checkpoint=checkpoint, place=Place(trunk=other[0].prefix), content=f"{entry.content}, {other[1].name} names", translated=other[0]
        )
    if prefix is not None:
        return fmt, _LocatedEncoder(checkpoint=checkpoint, place=Place(trunk=prefix), content="the encoder")
    tried = ", ".join(repr(place.trunk) for place in entry.places)
    starts = ", ".join(sorted({".".join(name.split(".")[:2]) for name in checkpoint.tensors})[:6])
    raise EncoderError(
        f"checkpoint {checkpoint.path}: is not one of {fmt.family} as its authors save them: expected {entry.content} under one of {tried}, "
        f"but keys begin with {starts}; give prefix, or use another encoder"
    )


def _locate(fmt: Format, entry: Entry, checkpoint: Checkpoint, prefix: str | None) -> _LocatedEncoder | None:
    """The first of the entry's places that holds an encoder, or the place under the given prefix, with its head where the format lists that place."""
    if prefix is not None:
        if not any(name.startswith(prefix) for name in checkpoint.tensors):
            return None
        candidates = ((place, other.content) for other in (entry, *fmt.entries.values()) for place in other.places)
        place, content = next((candidate for candidate in candidates if candidate[0].trunk == prefix), (Place(trunk=prefix), "the encoder"))
        if not any(f"{prefix}{anchor}" in checkpoint.tensors for anchor in _ANCHORS) and translate(checkpoint, prefix) is not None:
            return None
        return _LocatedEncoder(checkpoint=checkpoint, place=place, content=content)
    for place in entry.places:
        if not any(f"{place.trunk}{anchor}" in checkpoint.tensors for anchor in _ANCHORS):
            continue
        inside = {name.removeprefix(place.trunk): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(place.trunk)}
        if place.accepts is None or place.accepts(inside):
            return _LocatedEncoder(checkpoint=checkpoint, place=place, content=entry.content)
    return None


def _without_modules(fmt: Format, checkpoint: Checkpoint, prefix: str | None) -> tuple[Format, Checkpoint, str | None]:
    """Format, checkpoint and prefix without the `module.` wrappers of parallel training; unchanged where two tensors would then share a name."""
    tensors = {_plain(name): tensor for name, tensor in checkpoint.tensors.items()}
    if len(tensors) != len(checkpoint.tensors):
        return fmt, checkpoint, prefix
    entries = {name: dataclasses.replace(entry, places=tuple(map(_plain_place, entry.places))) for name, entry in fmt.entries.items()}
    plain = dataclasses.replace(fmt, entries=entries, beside=tuple(map(_plain, fmt.beside)))
    return plain, dataclasses.replace(checkpoint, tensors=tensors), None if prefix is None else _plain(prefix)


def _plain(name: str) -> str:
    return re.sub(r"(?<![^.])module\.", "", name)


def _plain_place(place: Place) -> Place:
    return dataclasses.replace(place, trunk=_plain(place.trunk), head=None if place.head is None else _plain(place.head))


def _parts(fmt: Format, located: _LocatedEncoder, spec: EncoderSpec) -> tuple[Tensors, Tensors, tuple[str, ...]]:
    """The trunk's tensors and the head's, by the network's names, and the full keys of a classifier that lies in the place of a pretraining head."""
    if located.translated is not None:
        return fmt.convert(located.translated.tensors), {}, ()
    checkpoint, place = located.checkpoint, located.place
    trunk = select(checkpoint, (), prefix=place.trunk, rename=spec.rename, architecture=fmt.family).tensors
    head: Tensors = {}
    if place.head is not None and not (spec.drop and "head.".startswith(spec.drop)):
        head = {name.removeprefix(place.head): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(place.head)}
    classifier: tuple[str, ...] = ()
    if head and set(head) <= {"weight", "bias"}:  # one linear layer in the place of a pretraining head
        classifier, head = tuple(f"{place.head}{name}" for name in head), {}
    if head and place.head is not None and place.head.startswith(place.trunk):
        inside = place.head.removeprefix(place.trunk)
        trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith(inside)}
    return fmt.convert(trunk), fmt.convert_head(head), classifier


def _check_shape(fmt: Format, spec: EncoderSpec, entry: Entry, shape: Shape) -> None:
    expected = entry.shape
    if expected is None:
        return
    comparable = {key: value for key, value in vars(shape).items() if key not in ("size", "kind")}
    wrong = [f"{key} {value}, expected {getattr(expected, key)}" for key, value in comparable.items() if value != getattr(expected, key)]
    if wrong:
        raise EncoderError(f"checkpoint {spec.checkpoint}: is no {spec.encoder}: {'; '.join(wrong)}; use encoder: {fmt.family} to take it as it is")


def _load(
    fmt: Format,
    spec: EncoderSpec,
    located: _LocatedEncoder,
    trunk: tuple[nn.Module, Tensors],
    head: tuple[nn.Module | None, Tensors],
    classifier: tuple[str, ...],
) -> LoadReport:
    """Load trunk and head strictly; one report on the whole file."""
    checkpoint, place = located.checkpoint, located.place
    if located.translated is None:
        used = tuple(prefix for prefix in (place.trunk, place.head if head[0] is not None else None) if prefix is not None)
        selection = TensorSelection(
            checkpoint=checkpoint, prefix=place.trunk, tensors=trunk[1], elsewhere=_elsewhere(fmt, spec, checkpoint, place, used)
        )
    else:
        selection = dataclasses.replace(located.translated, tensors=trunk[1])
    left = tuple(name.removeprefix(place.trunk) for name in classifier)
    report = load_into(trunk[0], selection, target=f"{fmt.family} {spec.encoder}", droppable=(*fmt.droppable, *left, *spec.drop))
    if head[0] is None:
        return report
    assert place.head is not None
    beside = TensorSelection(checkpoint=checkpoint, prefix=place.head, tensors=head[1], elsewhere=())
    remedy = f"{fmt.family}'s pretraining head (drop: [head.] leaves it out)"
    second = load_into(head[0], beside, target=remedy, droppable=fmt.head_droppable)
    return dataclasses.replace(
        report, matched=report.matched + second.matched, missing=report.missing + second.missing, dropped=report.dropped + second.dropped
    )


def _elsewhere(fmt: Format, spec: EncoderSpec, checkpoint: Checkpoint, place: Place, used: tuple[str, ...]) -> tuple[str, ...]:
    """Groups of keys outside the encoder and its head. Raises EncoderError for those that the authors do not save."""
    outside = [name for name in checkpoint.tensors if not name.startswith(used)]
    declared = (*_TRAINING, *fmt.beside, *((place.head,) if place.head is not None else ()), *spec.drop)
    unexpected = sorted(name for name in outside if not name.startswith(declared))
    if unexpected:
        listed = first_few(unexpected)
        raise EncoderError(
            f"checkpoint {checkpoint.path}: {len(unexpected)} unexpected keys beside the encoder under {place.trunk!r} ({listed}), "
            f"which {fmt.family}'s authors do not save; name the right format, or put what is to be left out, by its full path, under drop"
        )
    groups = Counter(".".join(name.split(".")[:2]) for name in outside)
    return tuple(f"{start}.* ({count})" if count > 1 else start for start, count in sorted(groups.items()))


def _random(fmt: Format, spec: EncoderSpec, shape: Shape, head: nn.Module | None, checkpoint: Checkpoint | None) -> Encoder:
    trunk = _create(shape, spec.seed)
    changed = fair_residuals(trunk)
    scales = f", {changed} residual scales set to 1" if changed else ""
    identity = Identity(
        name=spec.name,
        family=fmt.family,
        architecture=shape.describe(),
        source="random weights, never trained",
        preprocessing=_preprocessing(fmt, spec, shape, checkpoint),
        position_resize=fmt.position_resize,
        random=True,
        notes=(f"random weights, seed {spec.seed}{scales}", *fmt.notes),
    )
    return wrap(trunk, identity, _redraw(head, spec.seed))


def _redraw(head: nn.Module | None, seed: int) -> nn.Module | None:
    """The twin's head, drawn at the seed as torch draws linear layers."""
    if head is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for module in head.modules():
            if isinstance(module, nn.Linear | nn.BatchNorm1d):
                module.reset_parameters()
            elif isinstance(module, WeightNormed):
                nn.init.normal_(module.weight_v, std=0.02)
    return head


def _create(shape: Shape, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shape.create().eval()


def _preprocessing(fmt: Format, spec: EncoderSpec, shape: Shape, checkpoint: Checkpoint | None) -> Chosen:
    """The authors' evaluation at the side that the encoder was trained at, unless something else is stated."""
    values = at_side(fmt.preprocessing, (shape.size, shape.size))
    return decide(spec, values, of_family(fmt.family, values), checkpoint)


def replace_interpolation(base: Preprocessing, interpolation: Literal["bicubic", "bilinear"]) -> Preprocessing:
    """`base` with another interpolation."""
    return dataclasses.replace(base, interpolation=interpolation)
