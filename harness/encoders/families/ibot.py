"""iBOT's ViT checkpoints (Zhou et al. 2022, arXiv 2111.07832; github.com/bytedance/ibot): backbone files and full checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from harness.encoders.heads import PrototypeHead, Tensors
from harness.encoders.official import Entry, Format, Place, bind
from harness.encoders.vit_shape import VitShape, read_shape

FAMILY = "ibot"
DESCRIPTION = (
    "iBOT ViT backbone files and full checkpoints, teacher or student, with the cls head where there is one: {encoder: ibot, checkpoint: FILE}"
)

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}
_BACKBONE = (Place(trunk="state_dict.", head="state_dict.head."), Place(trunk="", head="head."))
_TEACHER = (Place(trunk="teacher.backbone.", head="teacher.head."), Place(trunk="teacher.module.backbone.", head="teacher.module.head."))
_STUDENT = (Place(trunk="student.module.backbone.", head="student.module.head."), Place(trunk="student.backbone.", head="student.head."))


def _sized(size: str, width: int, depth: int) -> Entry:
    shape = VitShape(kind="vit", patch=16, width=width, depth=depth, heads=_HEADS[width], hidden=4 * width)
    return Entry(description=f"iBOT ViT-{size}/16, the teacher", places=(*_TEACHER, *_BACKBONE), content="the teacher", shape=shape)


def _layer_scale(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """iBOT has its layer scales, where it has any, beside the layers; timm's ViT has them as layers."""
    return {name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma"): tensor for name, tensor in tensors.items()}


def _head(tensors: Tensors, args: Mapping[str, object]) -> PrototypeHead:
    """The cls head, with the activation that `--act_in_head` gave its training where the file tells it."""
    activation = args.get("act_in_head") or "gelu"
    if activation not in _ACTIVATIONS:
        raise ValueError(f"act_in_head in its args is {activation!r}, expected {' or '.join(_ACTIVATIONS)}")
    return PrototypeHead(tensors, _ACTIVATIONS[str(activation)])


FORMAT = Format(
    family=FAMILY,
    paper="iBOT, self-supervised (arXiv 2111.07832)",
    entries={
        "ibot": Entry(
            description="any iBOT ViT file: the teacher (checkpoint_teacher.pth holds it)", places=(*_TEACHER, *_BACKBONE), content="the teacher"
        ),
        "ibot_teacher": Entry(description="a full checkpoint's teacher", places=_TEACHER, content="the teacher"),
        "ibot_student": Entry(description="a full checkpoint's student", places=_STUDENT, content="the student"),
        "ibot_small": _sized("S", 384, 12),
        "ibot_base": _sized("B", 768, 12),
        "ibot_large": _sized("L", 1024, 24),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors, "vit", _HEADS, heads),
    droppable=("masked_embed",),
    beside=("teacher.", "student.", "ibot_loss."),
    make_head=_head,
    head_droppable=("last_layer2.",),  # the patch tokens' head
    convert=_layer_scale,
    position_resize="offset",
)

names, claims, build = bind(FORMAT)
