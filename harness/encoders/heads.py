"""Pretraining heads, rebuilt from a checkpoint's tensors: what turns an encoder's cls (or pooled map) into its projection.

Shape legend: B batch, D features, P projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

Tensors = Mapping[str, torch.Tensor]


def mlp(tensors: Tensors, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """The sequence that `tensors` (`0.weight`, `1.running_mean`, …) were saved from: linear layers, batch norms, activations where no key is."""
    if not tensors:
        raise ValueError("it has no layers")
    last = max(int(name.partition(".")[0]) for name in tensors)
    layers: list[nn.Module] = []
    for index in range(last + 1):
        weight, mean = tensors.get(f"{index}.weight"), tensors.get(f"{index}.running_mean")
        if mean is not None:
            layers.append(nn.BatchNorm1d(mean.shape[0], affine=weight is not None))
        elif weight is not None:
            layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=f"{index}.bias" in tensors))
        else:
            layers.append(activation())
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """DINO's head (Caron et al. 2021, arXiv 2104.14294), also iBOT's: an MLP with GELU (iBOT: the activation of its training
    arguments), L2 normalisation, a weight-normalised linear layer.
    """

    def __init__(self, tensors: Tensors, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.mlp = mlp({name.removeprefix("mlp."): tensor for name, tensor in tensors.items() if name.startswith("mlp.")}, activation)
        self.last_layer = WeightNormed(tensors["last_layer.weight_v"])

    def forward(self, cls_BD: torch.Tensor) -> torch.Tensor:
        """[B, P]: logits over the prototypes."""
        return self.last_layer(F.normalize(self.mlp(cls_BD), dim=-1, p=2))  # type: ignore[no-any-return]


class WeightNormed(nn.Module):
    """A linear layer without bias whose rows are g · v / ‖v‖."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(weight.shape[0], 1))
        self.weight_v = nn.Parameter(torch.ones(weight.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))
