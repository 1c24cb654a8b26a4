"""k-NN on means of patch features, with the k = 20 and T = 0.07 of EMP-SSL's evaluation (Tong et al., arXiv 2304.03977)."""

from __future__ import annotations

from harness.probes.fields import Count, Positive
from harness.probes.knn import PROBE as KNN
from harness.probes.knn import KNNFields
from harness.probes.lib.bags import ACCURACIES, BagProbe, BagProbeFields


class BagKNNFields(BagProbeFields, KNNFields):
    """The bags of a draw have the training bags of the same draw as neighbours."""

    k: Count = 20
    temperature: Positive = 0.07


PROBE = BagProbe(name="bag_knn", fields=BagKNNFields, inner=KNN, metrics=ACCURACIES)
