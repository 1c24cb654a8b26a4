"""Tasks whose probe is trained on one data set and tested on another that shares some of its classes: ObjectNet by heads of ImageNet."""

from __future__ import annotations

from typing import Any

from harness.data.manifest import Manifest
from harness.metrics import metric
from harness.probes import defaults
from harness.probes.finetune import NAME as FINETUNE
from harness.tasks import Template, finetune
from harness.tasks.objects import POOLED, whole


def templates(manifest: Manifest) -> list[Template]:
    """A linear probe, k-NN and fine-tuning for every data set that the manifest has counterparts in, which has to lie beside it.

    The head predicts all of the other data set's classes and is right with any counterpart of an item's label; items whose label has none are not
    scored. ObjectNet is scored so (Barbu et al., NeurIPS 2019, and the public repository abarbu/objectnet-template-pytorch): 113 of its 313 kinds,
    top-1 among the 1,000 classes of ImageNet.
    """
    kinds: list[dict[str, Any]] = [
        {"name": "object-linear", "probe": "linear", "protocols": {"zhu2023": {**defaults("linear"), "readouts": POOLED}}, "view": whole},
        {"name": "object-knn", "probe": "knn", "protocols": {"dino": {**defaults("knn"), "readouts": POOLED}}, "view": whole},
        {"name": FINETUNE, "probe": FINETUNE, "view": finetune.checked, "feed": "streamed", "listed": False}
        | {"protocols": {"plain": {**defaults(FINETUNE), "readouts": finetune.READOUTS}}},
    ]
    return [
        Template(
            **{**kind, "name": f"{kind['name']}-from-{other}"},
            level="object",
            metrics=(metric("accuracy"), metric("mean_class_accuracy")),
            classes=lambda _: manifest.classes,
            train_dataset=other,
        )
        for other in manifest.counterparts
        for kind in kinds
    ]
