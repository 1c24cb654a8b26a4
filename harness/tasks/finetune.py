"""Full fine-tuning: what an encoder is worth as a start, and not as it is (shape-reliant transfer in DILEMMA, Sameni et al., AAAI 2023)."""

from __future__ import annotations

from typing import Any

from harness.data.manifest import Manifest
from harness.probes.fields import Several
from harness.probes.finetune import NAME, FinetuneFields
from harness.tasks import BaseProtocol, Template
from harness.tasks.objects import object_template

READOUTS = ("mean",)
"""Of the patch tokens: what every encoder has, and what MAE fine-tunes. With more of them, each has a stack of learning rates of its own."""


class Finetune(BaseProtocol, FinetuneFields):
    """Full fine-tuning."""

    readouts: Several[str] = READOUTS


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Where samples have labels. A pattern must have the word `finetune` to ask for it."""
    if "label" not in manifest.annotations:
        return []
    return [object_template(manifest, NAME, NAME, {"plain": Finetune()}, feed="streamed", listed=False)]
