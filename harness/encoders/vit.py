"""Vision transformers of timm as encoders: cls, registers and patch tokens after the final norm, any block's raw output.

Shape legend: B batch, N patches (h·w, row-major), n kept patches, k prefix tokens (cls first, then registers), T = k + N tokens, D features.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from harness.core import EncoderInfo, PositionKind, Tokens
from harness.encoders.checks import check_blocks, check_images, check_indices, refusals
from harness.encoders.identity import EncoderNetwork, Identity
from harness.encoders.positions import DESCRIPTION, resize_positions
from harness.encoders.resize import SizedCopies
from harness.errors import EncoderError

_STEPPED = (VisionTransformer, VisionTransformerDistilled, Eva, Beit)
"""Classes whose forward pass is walked step by step here: exact types, since subclasses may embed or attend in their own way."""

_RESIZABLE = ("pos_embed", "relative_position_bias_table")
_RELATIVE = {Beit: "geometric sequence and cubic spline (as BEiT)"}


def is_vit(network: nn.Module) -> bool:
    """Whether `network` gives a sequence of tokens that this module understands."""
    if type(network) in _STEPPED:
        return True
    walk = getattr(network, "forward_intermediates", None)
    return (
        isinstance(getattr(network, "num_prefix_tokens", None), int)
        and walk is not None
        and "return_prefix_tokens" in inspect.signature(walk).parameters
    )


class VitEncoder:
    """An encoder around a timm vision transformer."""

    def __init__(self, trunk: nn.Module, identity: Identity, projector: nn.Module | None = None) -> None:
        self._network = EncoderNetwork(trunk, projector).eval().requires_grad_(False)
        self._identity = identity
        self._prefix = int(trunk.num_prefix_tokens)  # type: ignore[arg-type]
        self._has_cls = _has_cls(trunk)
        self._stepped = type(trunk) in _STEPPED
        self._positions = _position_kind(trunk)
        self._norm, norm_note = _final_norm(trunk)
        self._native_size, self._native_grid, self._patch = _geometry(identity.name, trunk)
        self._copies = SizedCopies(identity.name, self._native_size)
        self._position_cache: dict[tuple[tuple[int, int], torch.device, torch.dtype], torch.Tensor] = {}
        if self._stepped:
            trunk.patch_embed.strict_img_size = False  # type: ignore[union-attr]
        self._info = self._describe(norm_note)

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
        """Tokens of `images`, float [B, 3, H, W], already normalised; H and W multiples of the patch. See harness.core.Encoder."""
        check_images(self._identity.name, images)
        check_blocks(self._identity.name, blocks, len(self._info.block_dims))
        with torch.inference_mode():
            return self._encode(images, tuple(blocks), projection, keep, positions)

    def _encode(
        self, images: torch.Tensor, blocks: tuple[int, ...], projection: bool, keep: torch.Tensor | None, positions: torch.Tensor | None
    ) -> Tokens:
        grid = self._grid(images)
        self._check_choice(images, grid, keep, positions)
        with refusals(self._identity.name, self._network.trunk, images):
            if self._stepped:
                last, outputs = self._step(images, grid, blocks, keep, positions)
            else:
                last, outputs = self._intermediates(images, blocks)
            final = self._norm(last)
        shape = grid if keep is None else (1, keep.shape[1])
        nested = {block: self._split(output, shape) for block, output in outputs.items()}
        return self._split(final, shape, blocks=nested, projection=self._project(final) if projection else None)

    # --- as a network that is trained ---------------------------------------------------------------------------------

    def unfreeze(self) -> nn.Module:
        """The trunk, requiring gradients from now on; one whose sizes are built in is resized for good to the size of the preprocessing."""
        if not self._stepped or self._positions == "relative":
            self._network.trunk, self._copies = self._copies.settled(self._network.trunk, self._info.preprocessing.size)
            self._norm, _ = _final_norm(self._network.trunk)
        return self._network.trunk.requires_grad_(True)

    def differentiable(self, images: torch.Tensor, blocks: tuple[int, ...]) -> Tokens:
        """As `encode`, unchecked and outside inference mode, so that gradients reach the weights."""
        self._position_cache.clear()  # it remembers what was made of positions that have moved since
        return self._encode(images, blocks, False, None, None)

    # --- one pass -----------------------------------------------------------------------------------------------------

    def _step(
        self, images: torch.Tensor, grid: tuple[int, int], blocks: tuple[int, ...], keep: torch.Tensor | None, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The last block's output [B, T, D], and the chosen blocks'."""
        trunk: Any = self._network.trunk
        if self._positions == "relative":
            trunk = self._copies.at(trunk, (images.shape[2], images.shape[3]))
        x_BTD = self._embed(trunk, images, grid, keep, positions)
        outputs: dict[int, torch.Tensor] = {}
        arguments = _block_arguments(trunk, grid)
        for index, block in enumerate(trunk.blocks):
            x_BTD = block(x_BTD, **arguments(index))
            if index in blocks:
                outputs[index] = x_BTD
        return x_BTD, {block: outputs[block] for block in blocks}

    def _embed(
        self, trunk: Any, images: torch.Tensor, grid: tuple[int, int], keep: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Patch and prefix tokens with their position embeddings, [B, T, D], without the patches that are not kept."""
        patches = trunk.patch_embed(images)
        patches = patches.flatten(1, 2) if patches.ndim == 4 else patches
        batch = patches.shape[0]
        prefix = [token.expand(batch, -1, -1) for token in _prefix_tokens(trunk)]
        if keep is not None:
            patches = _gather(patches, keep)
        if trunk.pos_embed is not None:
            on_prefix, on_patches = self._position_embeddings(trunk, grid)
            chosen = positions if positions is not None else keep
            patches = patches + (on_patches if chosen is None else on_patches[0][chosen])
            if on_prefix is not None and prefix:
                prefix = [torch.cat(prefix, dim=1) + on_prefix]
        x_BTD = torch.cat([*prefix, patches], dim=1)
        return trunk.norm_pre(x_BTD) if hasattr(trunk, "norm_pre") else x_BTD

    def _position_embeddings(self, trunk: Any, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Position embeddings of the prefix, [1, k, D] or None where it has none, and of the patches at `grid`, [1, N, D]."""
        embedding, native = trunk.pos_embed, tuple(trunk.patch_embed.grid_size)
        on_prefix = embedding.shape[1] - native[0] * native[1]
        key = (grid, embedding.device, embedding.dtype)
        if key not in self._position_cache:
            if len(self._position_cache) >= 16:
                self._position_cache.pop(next(iter(self._position_cache)))
            self._position_cache[key] = resize_positions(embedding[:, on_prefix:], native, grid, self._identity.position_resize)
        return (embedding[:, :on_prefix] if on_prefix else None), self._position_cache[key]

    def _intermediates(self, images: torch.Tensor, blocks: tuple[int, ...]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The same for transformers that are not walked step by step, through timm's accessor, which applies a norm that precedes pooling."""
        trunk: Any = self._copies.at(self._network.trunk, (images.shape[2], images.shape[3]))
        final, outputs = trunk.forward_intermediates(
            images, indices=sorted(set(blocks)) or 1, return_prefix_tokens=self._prefix > 0, output_fmt="NLC"
        )
        sequences = [torch.cat([output[1], output[0]], dim=1) if isinstance(output, tuple) else output for output in outputs]
        return final, dict(zip(sorted(set(blocks)), sequences, strict=False))

    def _split(
        self,
        tokens_BTD: torch.Tensor,
        grid: tuple[int, int],
        *,
        blocks: Mapping[int, Tokens] | None = None,
        projection: torch.Tensor | None = None,
    ) -> Tokens:
        first_patch = tokens_BTD.shape[1] - grid[0] * grid[1]
        first_register = int(self._has_cls)
        return Tokens(
            cls=tokens_BTD[:, 0] if self._has_cls else None,
            registers=tokens_BTD[:, first_register:first_patch] if first_patch > first_register else None,
            patches=tokens_BTD[:, first_patch:].reshape(tokens_BTD.shape[0], *grid, -1),
            blocks=blocks or {},
            projection=projection,
        )

    def _project(self, final_BTD: torch.Tensor) -> torch.Tensor:
        projector = self._network.projector
        if projector is None:
            raise EncoderError(f"encoder {self._identity.name}: has no pretraining head; leave projection out or load a checkpoint that has one")
        return projector(final_BTD[:, 0])  # type: ignore[no-any-return]

    # --- what it is ---------------------------------------------------------------------------------------------------

    def _grid(self, images: torch.Tensor) -> tuple[int, int]:
        height, width = images.shape[2], images.shape[3]
        if height % self._patch[0] or width % self._patch[1]:
            near = tuple(max(1, round(side / patch)) * patch for side, patch in zip((height, width), self._patch, strict=True))
            raise EncoderError(
                f"encoder {self._identity.name}: expected images whose sides are multiples of the patch {self._patch[0]}x{self._patch[1]}, "
                f"got {height}x{width}; {near[0]}x{near[1]} would do"
            )
        return height // self._patch[0], width // self._patch[1]

    def _check_choice(self, images: torch.Tensor, grid: tuple[int, int], keep: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        if keep is None and positions is None:
            return
        name, trunk = self._identity.name, type(self._network.trunk).__name__
        if self._positions != "absolute" or not self._stepped:
            raise EncoderError(
                f"encoder {name}: cannot drop or misplace tokens: expected absolute position embeddings, "
                f"but {trunk} has {self._positions} positions; use a ViT with absolute positions"
            )
        cells = grid[0] * grid[1]
        if keep is not None:
            check_indices(name, "keep", keep, images.shape[0], cells)
        if positions is not None:
            check_indices(name, "positions", positions, images.shape[0], cells)
            expected = cells if keep is None else keep.shape[1]
            if positions.shape[1] != expected:
                raise EncoderError(
                    f"encoder {name}: positions must name one position for each of the {expected} kept tokens, got {positions.shape[1]}"
                )

    def _describe(self, norm_note: str | None) -> EncoderInfo:
        identity, trunk = self._identity, self._network.trunk
        size = identity.preprocessing.values.size
        with torch.inference_mode():
            images = torch.zeros(1, 3, *size)
            tokens = self._encode(images, (), False, None, None)
            projection = self._network.projector(tokens.cls) if self._network.projector is not None else None
        grid = (tokens.patches.shape[1], tokens.patches.shape[2])
        dim = tokens.patches.shape[3]
        notes, report = list(identity.notes), identity.load_report
        if norm_note is not None:
            notes.append(norm_note)
        if grid != self._native_grid:
            how = DESCRIPTION[identity.position_resize] if self._positions == "absolute" else _RELATIVE.get(type(trunk), "as timm does")
            if report is not None:
                report = dataclasses.replace(report, resized=tuple(name for name in trunk.state_dict() if name.endswith(_RESIZABLE)))
            notes.append(f"positions resized from {self._native_grid[0]}x{self._native_grid[1]} to {grid[0]}x{grid[1]}: {how}")
        return EncoderInfo(
            name=identity.name,
            family=identity.family,
            architecture=identity.architecture,
            source=identity.source,
            weights_sha256=self._network.digest(),
            params=self._network.count(),
            embed_dim=dim,
            block_dims=(dim,) * len(trunk.blocks),  # type: ignore[arg-type]
            grid=grid,
            has_cls=self._has_cls,
            registers=0 if tokens.registers is None else tokens.registers.shape[1],
            projection_dim=None if projection is None else projection.shape[1],
            positions=self._positions,
            preprocessing=identity.preprocessing.values,
            preprocessing_source=identity.preprocessing.source,
            preprocessing_replaced=identity.preprocessing.replaced,
            random=identity.random,
            chooses_tokens=self._positions == "absolute" and self._stepped,
            load_report=report,
            notes=tuple(notes),
        )


def _gather(tokens_BND: torch.Tensor, indices_Bn: torch.Tensor) -> torch.Tensor:
    return tokens_BND.gather(1, indices_Bn[:, :, None].expand(-1, -1, tokens_BND.shape[2]))


def _prefix_tokens(trunk: Any) -> list[torch.Tensor]:
    """cls, distillation and register tokens, [1, ·, D] each, in the order of the sequence."""
    tokens = (getattr(trunk, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    return [token for token in tokens if token is not None]


def _block_arguments(trunk: Any, grid: tuple[int, int]) -> Any:
    """What each block takes beside the tokens, as a function of its index."""
    if isinstance(trunk, Beit):
        shared = trunk.rel_pos_bias() if trunk.rel_pos_bias is not None else None
        return lambda index: {"shared_rel_pos_bias": shared}
    if isinstance(trunk, Eva):
        rope = trunk.rope.get_embed(shape=grid) if trunk.rope is not None else None
        if rope is not None and getattr(trunk, "rope_mixed", False):
            return lambda index: {"rope": rope[index]}
        return lambda index: {"rope": rope}
    return lambda index: {}


def _has_cls(trunk: Any) -> bool:
    if trunk.num_prefix_tokens == 0:
        return False
    return getattr(trunk, "cls_token", None) is not None


def _position_kind(trunk: Any) -> PositionKind:
    if getattr(trunk, "rope", None) is not None:
        return "rotary"
    if any("rel_pos" in name or "relative_position" in name for name in trunk.state_dict()):
        return "relative"
    return "absolute" if getattr(trunk, "pos_embed", None) is not None else "none"


def _final_norm(trunk: Any) -> tuple[nn.Module, str | None]:
    """The trunk's final norm, where its forward pass does not apply it, and a note.

    timm moves it behind the pooling in models made to classify mean patch tokens.
    """
    norm, pooled = getattr(trunk, "norm", None), getattr(trunk, "fc_norm", None)
    if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
        return (norm if type(trunk) in _STEPPED else nn.Identity()), None
    if isinstance(pooled, nn.Module) and not isinstance(pooled, nn.Identity):
        return pooled, "final norm applied to every token (timm applies it after mean pooling)"
    return nn.Identity(), "no final norm"


def _geometry(name: str, trunk: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Image size, patch grid and patch size that the network was built for."""
    embed: Any = getattr(trunk, "patch_embed", None) or getattr(trunk, "pixel_embed", None)  # pixel_embed: TNT
    if getattr(embed, "img_size", None) is None or getattr(embed, "grid_size", None) is None:
        raise EncoderError(
            f"encoder {name}: expected a transformer that is built for one patch grid, got a {type(trunk).__name__}; use another architecture"
        )
    size, grid = tuple(embed.img_size), tuple(embed.grid_size)
    return (size[0], size[1]), (grid[0], grid[1]), (size[0] // grid[0], size[1] // grid[1])
