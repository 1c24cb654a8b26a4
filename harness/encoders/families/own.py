"""Your own checkpoint in a timm architecture: a torch or safetensors file, in any usual wrapper."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from timm.models.beit import Beit
from torch import nn

from harness.core import Encoder
from harness.encoders.create import create, describe_architecture, known_preprocessing, tag_of, wrap
from harness.encoders.families.timm import build_published
from harness.encoders.files import Checkpoint, read_checkpoint, unwrapped
from harness.encoders.identity import Identity
from harness.encoders.layouts import Layout, refuse_other_config, translate
from harness.encoders.loading import OtherKeysError, TensorSelection, check_keys, load_into, refuse_silent_misfit, select
from harness.encoders.positions import position_rule
from harness.encoders.preprocessing import at_side, decide, differences
from harness.encoders.spec import EncoderSpec
from harness.errors import EncoderError

_TABLE = "relative_position_bias_table"

FAMILY = "own checkpoint"
DESCRIPTION = "your own weights: {architecture: a timm name, checkpoint: a file}, with prefix, rename, drop and options where needed"


def names() -> dict[str, str]:
    """None: the encoder is chosen by its file."""
    return {}


def claims(spec: EncoderSpec) -> bool:
    """A file with a timm architecture, named as `architecture` or as `timm:<model>`."""
    return spec.checkpoint is not None and not spec.random and (spec.encoder is None or spec.encoder.startswith("timm:"))


def build(spec: EncoderSpec) -> Encoder:
    """The architecture with the file's weights. Raises EncoderError unless every key is accounted for."""
    assert spec.checkpoint is not None
    checkpoint, prefix = unwrapped(read_checkpoint(spec.checkpoint), spec.prefix)
    try:
        return _build(spec, checkpoint, prefix)
    except OtherKeysError:
        if spec.encoder is None or spec.prefix is not None or spec.rename or spec.drop or spec.options:
            raise
        try:  # timm may publish such a file for this name, with keys that it converts
            return build_published(spec, spec.checkpoint)
        except EncoderError:
            pass
        raise


def _build(spec: EncoderSpec, checkpoint: Checkpoint, prefix: str | None) -> Encoder:
    architecture = spec.architecture if spec.encoder is None else spec.encoder.removeprefix("timm:")
    assert architecture is not None
    options = dict(spec.options)
    outline = create(architecture, options.items(), device="meta")
    target = describe_architecture(architecture, options.items())
    selection, layout = _select(spec, checkpoint, prefix, outline, target)
    _refuse_idle_drops(spec, selection)
    if "num_heads" not in options:
        heads, width = _attention_heads(outline), getattr(outline, "embed_dim", None)
        refuse_silent_misfit(checkpoint, selection.tensors, width=width, heads=heads, reader=architecture)
    refuse_other_config(checkpoint, architecture, outline)
    native = None if "img_size" in options else native_size(outline, selection.tensors)
    if native is not None:
        options["img_size"] = native
    network = create(architecture, options.items())
    droppable = [*_classifiers(network), *spec.drop]
    check_keys(network, selection, target=target, droppable=droppable)
    _refuse_another_size(spec, selection.tensors, network)
    base, source = known_preprocessing(network, architecture, options.items(), published=spec.encoder is not None)
    if layout is not None and layout.preprocessing is not None and spec.encoder is None and "." not in architecture:
        base = at_side(layout.preprocessing, base.size)
        source = f"as for files with {layout.name} names ({differences(base)}, unlike most)"
    report = load_into(network, selection, target=target, droppable=droppable)
    where = f" under {selection.prefix!r}" if selection.prefix else ""
    named = f", {layout.name} names" if layout is not None else ""
    identity = Identity(
        name=spec.name,
        family=FAMILY,
        architecture=describe_architecture(architecture, spec.options),
        source=f"own checkpoint {checkpoint.file}{where}{named}, sha256 {checkpoint.sha256[:12]}",
        preprocessing=decide(spec, base, source, checkpoint),
        position_resize=position_rule(architecture, tag_of(architecture) if spec.encoder is not None else "", checkpoint.tensors),
        load_report=report,
    )
    return wrap(network, identity)


def _select(
    spec: EncoderSpec, checkpoint: Checkpoint, prefix: str | None, outline: nn.Module, architecture: str
) -> tuple[TensorSelection, Layout | None]:
    """The encoder's tensors by timm's names, and the layout whose names they had where it is not timm's."""
    other = None if spec.rename else translate(checkpoint, prefix)
    if other is not None:
        return other
    return select(checkpoint, list(outline.state_dict()), prefix=prefix, rename=spec.rename, architecture=architecture), None


def _classifiers(network: nn.Module) -> list[str]:
    """Beginnings of the keys of a classifier, which a trunk does not have."""
    classifier = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return [f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)]


def native_size(outline: nn.Module, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The square image size that the file's absolute positions or BEiT's relative ones were trained at, where it is not the architecture's own."""
    embed = getattr(outline, "patch_embed", None)
    if embed is None:
        return None
    expected, given = getattr(outline, "pos_embed", None), tensors.get("pos_embed")
    side = None
    if isinstance(expected, torch.Tensor) and given is not None and given.ndim == 3 and given.shape != expected.shape:
        side = _root(given.shape[1] - (expected.shape[1] - int(embed.num_patches)))
    elif isinstance(outline, Beit) and (table := next((tensors[name] for name in tensors if name.endswith(_TABLE)), None)) is not None:
        side = _window(table.shape[0] - 3)  # three more entries: cls to patch, patch to cls, cls to cls
    size = None if side is None else side * int(embed.patch_size[0])
    return None if size == int(embed.img_size[0]) else size


def _attention_heads(outline: nn.Module) -> int | None:
    """The number of heads of the first attention module that states one."""
    counts = (getattr(module, "num_heads", None) for module in outline.modules())
    return next((count for count in counts if isinstance(count, int)), None)


def _root(cells: int) -> int | None:
    """The side of a square grid with that many cells, if there is one."""
    side = math.isqrt(max(cells, 0))
    return side if side > 0 and side * side == cells else None


def _window(distances: int) -> int | None:
    """The side of the square window with that many relative positions, (2 side - 1)², if there is one."""
    span = _root(distances)
    return (span + 1) // 2 if span is not None and span % 2 else None


def _refuse_another_size(spec: EncoderSpec, tensors: Mapping[str, torch.Tensor], network: nn.Module) -> None:
    """Raise EncoderError for positions of another grid than the network's, with the size that they were trained at, or the option that states it."""
    for name, expected in network.state_dict().items():
        given = tensors.get(name)
        if given is None or given.ndim != expected.ndim or given.shape == expected.shape or given.shape[-1] != expected.shape[-1]:
            continue
        if not name.endswith(("pos_embed", _TABLE)):
            continue
        trained = f"checkpoint {spec.checkpoint}: {name} is {list(given.shape)}, expected {list(expected.shape)}: "
        native = native_size(network, tensors)
        if native is not None:
            raise EncoderError(
                f"{trained}it was trained on {native}x{native} px images; leave the option img_size out, preprocessing: {{size: …}} sets their size"
            )
        if name == "pos_embed" and given.ndim == 3:
            raise EncoderError(
                f"{trained}no square grid of patches; give options: {{img_size: [height, width]}} of the images that it was trained on"
            )
        window = _window(given.shape[0]) if name.endswith(_TABLE) else None
        if window is not None:
            raise EncoderError(
                f"{trained}it was trained with windows of {window}x{window}; "
                f"give options: {{window_size: {window}, img_size: …}}, img_size being the side of the images that it was trained on"
            )


def _refuse_idle_drops(spec: EncoderSpec, selection: TensorSelection) -> None:
    for start in spec.drop:
        if not any(name.startswith(start) for name in selection.tensors):
            example = ", ".join(list(selection.tensors)[:3])
            raise EncoderError(f"checkpoint {spec.checkpoint}: drop {start!r} matches no key; keys are e.g. {example}")
