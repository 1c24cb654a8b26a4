"""What a family knows of an encoder apart from its network."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.core import LoadReport
from harness.encoders.digest import weights_sha256
from harness.encoders.positions import PositionResize
from harness.encoders.preprocessing import Chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class Identity:
    """The parts of an EncoderInfo that the network itself cannot tell."""

    name: str
    family: str
    architecture: str
    source: str
    preprocessing: Chosen
    position_resize: PositionResize = "antialias"
    random: bool = False
    load_report: LoadReport | None = None
    notes: tuple[str, ...] = ()


class EncoderNetwork(torch.nn.Module):
    """An encoder's trunk and, where it has one, its pretraining head, to be placed on a device together."""

    def __init__(self, trunk: torch.nn.Module, projector: torch.nn.Module | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.projector = projector

    def digest(self) -> str:
        """SHA-256 over the trunk's tensors by their own names and the head's under `projector.`."""
        tensors = dict(self.trunk.state_dict())
        if self.projector is not None:
            tensors |= {f"projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}
        return weights_sha256(tensors)

    def count(self) -> int:
        """Number of parameters, without SigLIP's attention pooling, which no token passes through."""
        return sum(parameter.numel() for name, parameter in self.named_parameters() if not name.startswith("trunk.attn_pool."))
