"""Readouts: tokens → rows.

A readout is written `<pooling>[@<block>]`: `cls`, `mean` (of the patch tokens), `cls+mean` (concatenated), `tokens` (the patch grid), `all` (the
cls where there is one, then the patch tokens, as a sequence without a grid; registers are left out) or `projection`, of the encoder's output after
its final norm, or of block `<block>` before that norm. Negative blocks count from the last one (-1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from harness.core import EncoderInfo, Tokens
from harness.errors import RequestError

POOLINGS = ("cls", "mean", "cls+mean", "tokens", "all", "projection")
_PATTERN = re.compile(r"(?P<pooling>[a-z+]+)(@(?P<block>-?\d+))?")


@dataclass(frozen=True)
class Readout:
    """A parsed readout."""

    pooling: str
    block: int | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it keeps tokens apart: a bank of it is as large as the patch grid."""
        return self.pooling in ("tokens", "all")

    @property
    def has_masks(self) -> bool:
        """Whether its rows are a grid that label maps lie on."""
        return self.pooling == "tokens"

    def block_index(self, info: EncoderInfo) -> int | None:
        """0-based index of the block that is read, None for the final output."""
        if self.block is None:
            return None
        return self.block if self.block >= 0 else len(info.block_dims) + self.block


def parse_readout(text: str) -> Readout:
    """The readout that `text` names. Raises RequestError where it is not a readout."""
    match = _PATTERN.fullmatch(text)
    if match is None or match["pooling"] not in POOLINGS or (match["pooling"] == "projection" and match["block"]):
        raise RequestError(f"readout: expected one of {', '.join(POOLINGS)}, optionally with @<block>, got {text!r}")
    return Readout(match["pooling"], int(match["block"]) if match["block"] else None)


def unavailable(readout: Readout, info: EncoderInfo) -> str | None:
    """Why `info`'s encoder cannot give this readout, or None where it can."""
    if readout.pooling in ("cls", "cls+mean") and not info.has_cls:
        return "the encoder has no cls token"
    if readout.pooling == "projection" and info.projection_dim is None:
        return "the checkpoint has no pretraining head"
    block = readout.block_index(info)
    if block is not None and not 0 <= block < len(info.block_dims):
        return f"the encoder has {len(info.block_dims)} blocks"
    return None


def blocks_needed(readouts: Iterable[Readout], info: EncoderInfo) -> tuple[int, ...]:
    """Sorted 0-based indices of the blocks that `readouts` read."""
    return tuple(sorted({block for readout in readouts if (block := readout.block_index(info)) is not None}))


def read(tokens: Tokens, readout: Readout, info: EncoderInfo) -> torch.Tensor:
    """Rows of a batch: [B, D] (2D for cls+mean, P for projection), [B, h, w, D] for tokens, or [B, 1 + h w, D] for all (h w without a cls).

    Means are taken in float32 whatever the precision of the tokens.
    """
    block = readout.block_index(info)
    source = tokens if block is None else tokens.blocks[block]
    if readout.pooling == "tokens":
        return source.patches
    if readout.pooling == "all":
        patches = source.patches.flatten(1, 2)
        return patches if source.cls is None else torch.cat([source.cls[:, None].to(patches.dtype), patches], dim=1)
    if readout.pooling == "mean":
        return source.patches.float().mean(dim=(1, 2))
    vector = tokens.projection if readout.pooling == "projection" else source.cls
    if vector is None:
        raise ValueError(f"{info.name} gave no {readout.pooling}")
    if readout.pooling == "cls+mean":
        return torch.cat([vector.float(), source.patches.float().mean(dim=(1, 2))], dim=1)
    return vector.float()
