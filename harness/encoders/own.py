"""Your own checkpoint in a timm architecture: a torch or safetensors file, in whatever wrapper it was saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from harness.core import Encoder
from harness.encoders._create import create, describe_architecture, timm_preprocessing, wrap
from harness.encoders._files import read_checkpoint
from harness.encoders._identity import Identity
from harness.encoders._load import load_into, refuse_silent_misfit, select
from harness.encoders._spec import EncoderSpec

FAMILY = "own checkpoint"
DESCRIPTION = "your own weights: {architecture: a timm name, checkpoint: a file}, with prefix, rename, drop and options where needed"


def names() -> dict[str, str]:
    """None: it goes by file."""
    return {}


def claims(spec: EncoderSpec) -> bool:
    """A file with a timm architecture, named as `architecture` or as `timm:<model>`."""
    return spec.checkpoint is not None and not spec.random and (spec.encoder is None or spec.encoder.startswith("timm:"))


def build(spec: EncoderSpec) -> Encoder:
    """The architecture with the file's weights. Raises EncoderError unless every key is accounted for."""
    assert spec.checkpoint is not None
    architecture = spec.architecture if spec.encoder is None else spec.encoder.removeprefix("timm:")
    assert architecture is not None
    options = dict(spec.options)
    checkpoint = read_checkpoint(spec.checkpoint)
    outline = create(architecture, options.items(), device="meta")
    what = describe_architecture(architecture, options.items())
    selection = select(checkpoint, list(outline.state_dict()), prefix=spec.prefix, rename=spec.rename, architecture=what)
    if "num_heads" not in options:
        refuse_silent_misfit(checkpoint, width=getattr(outline, "embed_dim", None), heads=_attention_heads(outline), what=architecture)
    native = None if "img_size" in options else native_size(outline, selection.tensors)
    if native is not None:
        options["img_size"] = native
    network = create(architecture, options.items())
    preprocessing, notes = timm_preprocessing(network, options.items())
    classifier = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    declared = [f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)]
    report = load_into(network, selection, what=what, droppable=[*declared, *spec.drop])
    where = f" under {selection.prefix!r}" if selection.prefix else ""
    identity = Identity(
        name=spec.name,
        family=FAMILY,
        architecture=describe_architecture(architecture, spec.options),
        source=f"own checkpoint {checkpoint.file}{where}, sha256 {checkpoint.sha256[:12]}",
        preprocessing=spec.preprocessing.apply(preprocessing),
        load_report=report,
        notes=(*notes, *spec.preprocessing.notes()),
    )
    return wrap(network, identity)


def native_size(outline: nn.Module, tensors: Mapping[str, torch.Tensor]) -> int | None:
    """The square image size that the file's position embeddings were trained at, where it is not the architecture's own; else None."""
    expected, given = getattr(outline, "pos_embed", None), tensors.get("pos_embed")
    embed = getattr(outline, "patch_embed", None)
    if not isinstance(expected, torch.Tensor) or given is None or embed is None or given.ndim != 3 or given.shape == expected.shape:
        return None
    patches = given.shape[1] - (expected.shape[1] - int(embed.num_patches))
    side = math.isqrt(max(patches, 0))
    return side * int(embed.patch_size[0]) if side > 0 and side * side == patches else None


def _attention_heads(outline: nn.Module) -> int | None:
    """The number of heads of the first attention that says one."""
    counts = (getattr(module, "num_heads", None) for module in outline.modules())
    return next((count for count in counts if isinstance(count, int)), None)
