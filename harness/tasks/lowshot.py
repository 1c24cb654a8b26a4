"""Low-shot classification of objects: logistic regression on a share of the training images, or on a few images per class."""

from __future__ import annotations

from typing import Any

from harness.data.manifest import Manifest
from harness.probes.lowshot import NAME, LowShotFields
from harness.tasks import Template
from harness.tasks.objects import ObjectProtocol, object_template


class ObjectLowShot(ObjectProtocol, LowShotFields):
    """Of whole images."""


PROTOCOLS = {
    "1-percent": ObjectLowShot(share=0.01),
    "10-percent": ObjectLowShot(share=0.1),
    **{f"{shots}-shot": ObjectLowShot(share=None, shots=shots) for shots in (1, 5, 10)},
}


def templates(manifest: Manifest) -> list[Template[Any]]:
    """Where samples have labels."""
    return [object_template(manifest, "object-lowshot", NAME, PROTOCOLS, listed=False)] if "label" in manifest.annotations else []
