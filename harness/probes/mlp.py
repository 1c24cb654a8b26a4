"""The MLP probe: one hidden layer on feature rows, trained and searched as the linear probe is."""

from typing import Literal

from torch import Generator, nn

from harness.core import State
from harness.probes.classifier import ClassifierFields, ClassifierProbe
from harness.probes.fields import BelowOne, Count
from harness.probes.heads import NetworkHead


class MLPFields(ClassifierFields):
    """The hidden layer and its initialisation are our choice and follow no paper; all other defaults are the linear probe's."""

    width: Count = 512
    activation: Literal["relu", "gelu"] = "relu"
    dropout: BelowOne = 0.0
    """Probability that a training step drops a hidden unit."""


class MLPHead(NetworkHead[MLPFields]):
    @staticmethod
    def network(width: int, classes: int, fields: MLPFields) -> nn.Module:
        activation = nn.ReLU() if fields.activation == "relu" else nn.GELU()
        return nn.Sequential(nn.Linear(width, fields.width), activation, nn.Dropout(fields.dropout), nn.Linear(fields.width, classes))

    @staticmethod
    def initialise(module: nn.Module, fields: MLPFields, generator: Generator) -> None:
        """Hidden weights of N(0, 2 / D), as in He et al. (arXiv 1502.01852), output weights of N(0, init_std²), biases of 0."""
        hidden_weight, *_, weight, _ = module.parameters()
        nn.init.kaiming_normal_(hidden_weight, generator=generator)
        weight.normal_(0, fields.init_std, generator=generator)

    @staticmethod
    def shape(state: State) -> tuple[int, int]:
        return state["0.weight"].shape[1], len(state["3.bias"])


PROBE = ClassifierProbe(name="mlp", fields=MLPFields, head=MLPHead)
