"""Full fine-tuning: the value of an encoder as an initialisation, not as it is (shape-reliant transfer in DILEMMA, Sameni et al., AAAI 2023)."""

from __future__ import annotations

from typing import Any

from harness.data.manifest import Manifest
from harness.probes.fields import Several
from harness.probes.finetune import NAME, FinetuneFields
from harness.tasks import BaseProtocol, Template
from harness.tasks.objects import object_template

READOUTS = ("mean",)
"""The mean of the patch tokens, which every encoder has and which MAE fine-tunes. Several readouts have a stack of learning rates each."""


class Finetune(BaseProtocol, FinetuneFields):
    """Full fine-tuning."""

    readouts: Several[str] = READOUTS


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Where samples have labels. A pattern must contain the word `finetune` to match the task."""
    if "label" not in manifest.annotations:
        return []
    return [object_template(manifest, NAME, NAME, {"plain": Finetune()}, feed="streamed", listed=False)]
