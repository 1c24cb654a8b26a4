"""Full fine-tuning: what an encoder is worth as a start, and not as it is (shape-reliant transfer in DILEMMA, Sameni et al., AAAI 2023)."""

from __future__ import annotations

from harness.core import View
from harness.data.manifest import Manifest
from harness.data.views.whole import Whole
from harness.errors import ProbeError, RequestError
from harness.metrics import metric
from harness.probes import defaults
from harness.probes.finetune import NAME, FinetuneFields
from harness.tasks import Fields, Template

READOUTS = ("mean",)
"""Of the patch tokens: what every encoder has, and what MAE fine-tunes. With more of them, each has a stack of learning rates of its own."""


def checked(fields: Fields) -> View:
    """The view of the stream. Raises RequestError where a field has a value that it cannot take."""
    try:
        FinetuneFields.read(NAME, fields)
    except ProbeError as error:
        raise RequestError(str(error)) from None
    return Whole()


def templates(manifest: Manifest) -> list[Template]:
    """Where samples have labels. A pattern must have the word `finetune` to ask for it."""
    if "label" not in manifest.annotations:
        return []
    return [
        Template(
            name=NAME,
            level="object",
            probe=NAME,
            metrics=(metric("accuracy"), metric("mean_class_accuracy")),
            protocols={"plain": {**defaults(NAME), "readouts": READOUTS}},
            view=checked,
            classes=lambda _: manifest.classes,
            feed="streamed",
            listed=False,
        )
    ]
