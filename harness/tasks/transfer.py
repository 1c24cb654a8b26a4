"""Tasks whose probe is trained on one data set and tested on another that shares some of its classes: ObjectNet by heads of ImageNet."""

from __future__ import annotations

from harness.manifest import Manifest
from harness.metrics import metric
from harness.probes import defaults
from harness.tasks import Template
from harness.tasks.objects import POOLED, whole


def templates(manifest: Manifest) -> list[Template]:
    """A linear probe and k-NN for every data set that the manifest has counterparts in, which has to lie beside it.

    The head predicts all of the other data set's classes and is right with any counterpart of an item's label; items whose label has none are not
    scored. ObjectNet is scored so (Barbu et al., NeurIPS 2019, and the public repository abarbu/objectnet-template-pytorch): 113 of its 313 kinds,
    top-1 among the 1,000 classes of ImageNet.
    """
    return [
        Template(
            name=f"object-{probe}-from-{other}",
            level="object",
            probe=probe,
            metrics=(metric("accuracy"), metric("mean_class_accuracy")),
            protocols={protocol: {**defaults(probe), "readouts": POOLED}},
            view=whole,
            classes=lambda _: manifest.classes,
            train_dataset=other,
        )
        for other in manifest.counterparts
        for probe, protocol in (("linear", "zhu2023"), ("knn", "dino"))
    ]
