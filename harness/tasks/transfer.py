"""Tasks whose probe is trained on one data set and tested on another that shares some of its classes: ObjectNet by heads of ImageNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.data.manifest import Manifest
from harness.probes.finetune import NAME as FINETUNE
from harness.probes.linear import LinearFields
from harness.tasks import BaseProtocol, Template
from harness.tasks.finetune import Finetune
from harness.tasks.objects import ObjectKNN, ObjectProtocol, object_template


class TransferLinear(ObjectProtocol, LinearFields):
    """The linear probe, on uncropped images."""


TASKS: Sequence[tuple[str, str, Mapping[str, BaseProtocol], Mapping[str, Any]]] = (
    ("object-linear", "linear", {"zhu2023": TransferLinear()}, {}),
    ("object-knn", "knn", {"dino": ObjectKNN()}, {}),
    (FINETUNE, FINETUNE, {"plain": Finetune()}, {"feed": "streamed", "listed": False}),
)
"""Name, probe, protocols, and further options of the template."""


def templates(manifest: Manifest) -> list[Template[Any]]:
    """A linear probe, k-NN and fine-tuning for every data set that the manifest has counterparts in; its shards must lie in the same folder.

    The head predicts all classes of the other data set, and any counterpart of an item's label is correct; items whose label has no counterpart
    are not scored. ObjectNet is scored so (Barbu et al., NeurIPS 2019, and the public repository abarbu/objectnet-template-pytorch): 113 of its
    313 kinds, top-1 among the 1,000 classes of ImageNet.
    """
    return [
        object_template(manifest, f"{name}-from-{other}", probe, protocols, train_dataset=other, **options)
        for other in manifest.counterparts
        for name, probe, protocols, options in TASKS
    ]
