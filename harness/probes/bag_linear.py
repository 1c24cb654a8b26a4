"""The linear probe on means of patch features, trained as in EMP-SSL's evaluation (Tong et al., arXiv 2304.03977).

SGD with momentum 0.9, weight decay 5e-5, batches of 100, 100 epochs and a cosine; of its learning rate, 0.03, a search takes the place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from harness.core import Probe
from harness.probes.bags import BagFields, BagProbe, BagProbeFields
from harness.probes.fields import Count, Momentum, NonNegative
from harness.probes.linear import LinearFields, LinearProbe

NAME = "bag_linear"


class BagLinearFields(BagProbeFields, LinearFields):
    epochs: Count = 100
    batch_size: Count = 100
    momentum: Momentum = 0.9
    weight_decay: NonNegative = 5e-5


DEFAULTS: dict[str, Any] = BagLinearFields().model_dump()


@dataclass(frozen=True)
class BagLinear(BagProbe):
    """Each draw's bags train heads of their own, which are searched as one."""

    fields: ClassVar[type[BagFields]] = BagLinearFields


PROBE: Probe = BagLinear(NAME, LinearProbe())
