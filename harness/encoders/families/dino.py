"""DINO's ViT checkpoints (Caron et al. 2021, arXiv 2104.14294; github.com/facebookresearch/dino): backbone files and full checkpoints."""

from __future__ import annotations

from harness.encoders.heads import PrototypeHead
from harness.encoders.official import Entry, Format, Place, bind
from harness.encoders.vit_shape import VitShape, read_shape

FAMILY = "dino"
DESCRIPTION = "DINO ViT backbone files and full checkpoints, teacher or student, with the head where there is one: {encoder: dino, checkpoint: FILE}"

_HEADS = {192: 3, 384: 6, 768: 12}
_BACKBONE = (Place(trunk="", head="head."), Place(trunk="state_dict.", head="state_dict.head."))
_TEACHER = (Place(trunk="teacher.backbone.", head="teacher.head."), Place(trunk="teacher.module.backbone.", head="teacher.module.head."))
_STUDENT = (Place(trunk="student.module.backbone.", head="student.module.head."), Place(trunk="student.backbone.", head="student.head."))


def _sized(size: str, width: int, patch: int) -> Entry:
    shape = VitShape(kind="vit", patch=patch, width=width, depth=12, heads=_HEADS[width], hidden=4 * width)
    return Entry(description=f"DINO ViT-{size}/{patch}, the teacher", places=(*_TEACHER, *_BACKBONE), content="the teacher", shape=shape)


FORMAT = Format(
    family=FAMILY,
    paper="DINO, self-supervised on ImageNet-1k (arXiv 2104.14294)",
    entries={
        "dino": Entry(
            description="any DINO ViT file: the teacher (published backbone files hold it)", places=(*_TEACHER, *_BACKBONE), content="the teacher"
        ),
        "dino_teacher": Entry(description="a full checkpoint's teacher", places=_TEACHER, content="the teacher"),
        "dino_student": Entry(description="a full checkpoint's student", places=_STUDENT, content="the student"),
        "dino_small16": _sized("S", 384, 16),
        "dino_small8": _sized("S", 384, 8),
        "dino_base16": _sized("B", 768, 16),
        "dino_base8": _sized("B", 768, 8),
    },
    read_shape=lambda path, tensors, heads: read_shape(path, tensors, "vit", _HEADS, heads),
    droppable=(),
    beside=("teacher.", "student.", "dino_loss."),
    make_head=lambda tensors, args: PrototypeHead(tensors),
    position_resize="offset",
)

names, claims, build = bind(FORMAT)
