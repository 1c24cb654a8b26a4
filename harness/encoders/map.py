"""Convolutional and hierarchical networks of timm as encoders: the final feature map as patches, stages as blocks, cls only where it has one.

Shape legend: B batch, h w the map's height and width, D channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from harness.core import EncoderInfo, PositionKind, Tokens
from harness.encoders.checks import check_blocks, check_images, refusals
from harness.encoders.identity import EncoderNetwork, Identity
from harness.encoders.resize import SizedCopies
from harness.errors import EncoderError


class MapEncoder:
    """An encoder around a timm network that gives a feature map."""

    def __init__(self, trunk: nn.Module, identity: Identity, projector: nn.Module | None = None) -> None:
        self._network = EncoderNetwork(trunk, projector).eval().requires_grad_(False)
        self._identity = identity
        self._native_size = _native_size(trunk, identity.preprocessing.values.size)
        self._copies = SizedCopies(identity.name, self._native_size)
        self._stride = (1, 1)
        self._float32_only = _loses_too_much_in_half(trunk)
        self._channels_last = _is_faster_in_channels_last(trunk)
        if self._channels_last:
            self._network.to(memory_format=torch.channels_last)  # its outputs follow, whatever its inputs are
        self._info = self._describe()

    @property
    def info(self) -> EncoderInfo:
        return self._info

    @property
    def module(self) -> nn.Module:
        return self._network

    def encode(
        self,
        images: torch.Tensor,
        *,
        blocks: Sequence[int] = (),
        projection: bool = False,
        keep: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> Tokens:
        """Tokens of `images`, float [B, 3, H, W], already normalised. See harness.core.Encoder; `keep` and `positions` are refused."""
        name = self._identity.name
        check_images(name, images)
        check_blocks(name, blocks, len(self._info.block_dims))
        if keep is not None or positions is not None:
            raise EncoderError(
                f"encoder {name}: cannot drop or misplace tokens: expected a ViT with absolute position embeddings, "
                f"got the feature map of a {type(self._network.trunk).__name__}; use such a ViT"
            )
        if projection and self._network.projector is None:
            raise EncoderError(f"encoder {name}: has no pretraining head; leave projection out or load a checkpoint that has one")
        with torch.inference_mode():
            tokens = self.differentiable(images, tuple(blocks))
            if not projection:
                return tokens
            with self._precision(images.device.type):
                return dataclasses.replace(tokens, projection=self._project(tokens.patches))

    def unfreeze(self) -> nn.Module:
        """The trunk, requiring gradients from now on; one whose sizes are built in is resized for good to the size of the preprocessing."""
        self._network.trunk, self._copies = self._copies.settled(self._network.trunk, self._info.preprocessing.size)
        return self._network.trunk.requires_grad_(True)

    def differentiable(self, images: torch.Tensor, blocks: tuple[int, ...]) -> Tokens:
        """As `encode`, unchecked and outside inference mode, so that gradients reach the weights."""
        with self._precision(images.device.type):
            cls, final, stages = self._run(images, blocks)
            return Tokens(cls=cls, patches=final, blocks={block: Tokens(cls=None, patches=stage) for block, stage in stages.items()})

    def _precision(self, device_type: str) -> AbstractContextManager[Any]:
        """The caller's precision, or float32."""
        return torch.autocast(device_type, enabled=False) if self._float32_only else nullcontext()

    def _run(self, images: torch.Tensor, blocks: tuple[int, ...] | None) -> tuple[torch.Tensor | None, torch.Tensor, dict[int, torch.Tensor]]:
        """The cls token [B, D] where there is one, the final map [B, h, w, D] and the chosen stages' (all of them for None)."""
        size = (images.shape[2], images.shape[3])
        trunk: Any = self._copies.at(self._network.trunk, size)
        indices = None if blocks is None else sorted(set(blocks))
        with refusals(self._identity.name, trunk, images):
            if indices == [] or not hasattr(trunk, "forward_intermediates"):
                final, stages = trunk.forward_features(images), []
            else:
                final, stages = trunk.forward_intermediates(images, indices=indices, output_fmt="NCHW")
            if indices is None and stages:
                self._stride = (size[0] // stages[-1].shape[2], size[1] // stages[-1].shape[3])
            cls, final = self._as_map(trunk, final, size)
        maps = [stage.permute(0, 2, 3, 1) for stage in stages]
        return cls, final, dict(zip(range(len(maps)) if indices is None else indices, maps, strict=False))

    def _as_map(self, trunk: Any, final: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """cls and [B, h, w, D] from what the network ends with: a map in either layout, or a sequence of (cls and) patch tokens."""
        if not isinstance(final, torch.Tensor):
            raise EncoderError(
                f"encoder {self._identity.name}: {type(trunk).__name__} ends with {len(final)} parallel sequences or maps, expected one; "
                "use another architecture"
            )
        if final.ndim == 4:
            channels_first = getattr(trunk, "output_fmt", "NCHW") != "NHWC"
            return None, _normed(trunk, final.permute(0, 2, 3, 1) if channels_first else final, channels_first=channels_first)
        grid = (size[0] // self._stride[0], size[1] // self._stride[1])
        first = final.shape[1] - grid[0] * grid[1] if final.ndim == 3 else -1
        has_cls = first == 1 and isinstance(getattr(trunk, "cls_token", None), torch.Tensor)
        if first != int(has_cls):
            raise EncoderError(
                f"encoder {self._identity.name}: {type(trunk).__name__} ends with {list(final.shape)}, expected one map or its patch tokens; "
                "use another architecture"
            )
        map_BhwD = final[:, first:].reshape(final.shape[0], *grid, -1)
        return (final[:, 0] if has_cls else None), _normed(trunk, map_BhwD, channels_first=False)

    def _project(self, final_BhwD: torch.Tensor) -> torch.Tensor:
        assert self._network.projector is not None
        return self._network.projector(final_BhwD.mean(dim=(1, 2)))  # type: ignore[no-any-return]

    def _describe(self) -> EncoderInfo:
        identity, trunk = self._identity, self._network.trunk
        with torch.inference_mode():
            cls, final, stages = self._run(torch.zeros(1, 3, *identity.preprocessing.values.size), None)
            projection = self._project(final) if self._network.projector is not None else None
        notes, report = list(identity.notes), identity.load_report
        if _head_norm(trunk) is not None:
            notes.append("final norm applied at every position of the map (timm applies it after mean pooling)")
        if hasattr(trunk, "set_input_size") and identity.preprocessing.values.size != self._native_size:
            notes.append(f"resized from {self._native_size[0]}x{self._native_size[1]} px as timm does for this architecture")
            if report is not None:
                sized = self._copies.at(trunk, identity.preprocessing.values.size).state_dict()
                changed = (name for name, tensor in trunk.state_dict().items() if name in sized and sized[name].shape != tensor.shape)
                report = dataclasses.replace(report, resized=tuple(changed))
        if self._float32_only:
            notes.append("computed in float32 at every precision: its depthwise convolutions between batch norms lose too much in bf16")
        return EncoderInfo(
            name=identity.name,
            family=identity.family,
            architecture=identity.architecture,
            source=identity.source,
            weights_sha256=self._network.digest(),
            params=self._network.count(),
            embed_dim=final.shape[3],
            block_dims=tuple(stage.shape[3] for stage in stages.values()),
            grid=(final.shape[1], final.shape[2]),
            has_cls=cls is not None,
            registers=0,
            projection_dim=None if projection is None else projection.shape[1],
            positions=_position_kind(trunk),
            preprocessing=identity.preprocessing.values,
            preprocessing_source=identity.preprocessing.source,
            preprocessing_replaced=identity.preprocessing.replaced,
            random=identity.random,
            float32_only=self._float32_only,
            channels_last=self._channels_last,
            load_report=report,
            notes=tuple(notes),
        )


def _loses_too_much_in_half(trunk: nn.Module) -> bool:
    """Depthwise convolutions between batch norms, as in EfficientNet and MobileNet: on photographs EfficientNet-Lite0's map in bf16 was 5 % from that
    in float32, its mean 3 %; other networks stay below 2 %, except Inception-v3 (docs/encoders.md).
    """
    depthwise = any(isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 for module in trunk.modules())
    return depthwise and any(isinstance(module, nn.BatchNorm2d) for module in trunk.modules())


def _is_faster_in_channels_last(trunk: nn.Module) -> bool:
    """Convolutions between batch norms, of a network that takes any size: with the channels last EfficientNet-Lite0 ran 1.4 times as fast in float32,
    ResNet-50 1.2 times, and in bf16 twice (bench/NOTES.md). ConvNeXt, which has no batch norms, does so itself where it pays.
    """
    return any(isinstance(module, nn.BatchNorm2d) for module in trunk.modules()) and not hasattr(trunk, "set_input_size")


def _head_norm(trunk: Any) -> nn.Module | None:
    """The final norm where timm keeps it in the classifier head, behind the pooling, as for ConvNeXt, MetaFormer, Hiera and MambaOut.

    A norm of another width belongs to an MLP in the head.
    """
    norm = getattr(getattr(trunk, "head", None), "norm", None)
    weight = getattr(norm, "weight", None)
    return norm if isinstance(norm, nn.Module) and isinstance(weight, torch.Tensor) and weight.shape == (trunk.num_features,) else None


def _normed(trunk: nn.Module, map_BhwD: torch.Tensor, *, channels_first: bool) -> torch.Tensor:
    """The head's norm, where there is one, at each position separately, in the layout in which timm passes it the pooled map."""
    norm = _head_norm(trunk)
    if norm is None:
        return map_BhwD
    positions = map_BhwD.flatten(0, 2)
    normed = norm(positions[:, :, None, None])[:, :, 0, 0] if channels_first else norm(positions)
    return normed.unflatten(0, map_BhwD.shape[:3])  # type: ignore[no-any-return]


def _native_size(trunk: Any, fallback: tuple[int, int]) -> tuple[int, int]:
    """The size that the network was built for; `fallback` for networks that take any size."""
    embed = getattr(trunk, "patch_embed", None)
    size = getattr(embed, "img_size", None) or getattr(trunk, "img_size", None)
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else fallback


def _position_kind(trunk: nn.Module) -> PositionKind:
    names = list(trunk.state_dict())
    if any("rel_pos" in name or "relative_position" in name or "rpb" in name or "cpb_mlp" in name for name in names):
        return "relative"
    return "absolute" if any(name.endswith(("pos_embed", "absolute_pos_embed")) for name in names) else "none"
