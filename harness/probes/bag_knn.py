"""k-NN on means of patch features, with the k = 20 and T = 0.07 of EMP-SSL's evaluation (Tong et al., arXiv 2304.03977)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from harness.core import Probe
from harness.probes.bags import BagFields, BagProbe, BagProbeFields
from harness.probes.fields import Count, Positive
from harness.probes.knn import KNNFields, KNNProbe

NAME = "bag_knn"


class BagKNNFields(BagProbeFields, KNNFields):
    k: Count = 20
    temperature: Positive = 0.07


DEFAULTS: dict[str, Any] = BagKNNFields().model_dump()


@dataclass(frozen=True)
class BagKNN(BagProbe):
    """Each draw's bags vote for those of the same draw."""

    fields: ClassVar[type[BagFields]] = BagKNNFields


PROBE: Probe = BagKNN(NAME, KNNProbe())
