"""The linear probe on means of patch features, trained as in EMP-SSL's evaluation (Tong et al., arXiv 2304.03977).

SGD with momentum 0.9, weight decay 5e-5, batches of 100, 100 epochs and a cosine; a search takes the place of its learning rate of 0.03.
"""

from __future__ import annotations

from harness.probes.fields import Count, Momentum, NonNegative
from harness.probes.lib.bags import ACCURACIES, BagProbe, BagProbeFields
from harness.probes.linear import PROBE as LINEAR
from harness.probes.linear import LinearFields


class BagLinearFields(BagProbeFields, LinearFields):
    """Every draw has its own heads; the search treats them as one."""

    epochs: Count = 100
    batch_size: Count = 100
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 5e-5


PROBE = BagProbe(name="bag_linear", fields=BagLinearFields, inner=LINEAR, has_learning_rate=LINEAR.has_learning_rate, metrics=ACCURACIES)
