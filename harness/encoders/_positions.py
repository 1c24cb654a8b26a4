"""Absolute position embeddings brought to another grid, each as the authors of the encoder do it.

Shape legend: B batch, N patches, D features, h w patch grid.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

PositionResize = Literal["antialias", "bicubic", "offset"]
"""antialias: bicubic with antialiasing, as timm and DINOv2 with registers. bicubic: plain bicubic to the grid's size, as DeiT, MAE and BEiT.
offset: plain bicubic by the scale factor (grid + 0.1) / native grid, as DINO, iBOT and DINOv2 without registers: 0.1 moves the sampling points."""

DESCRIPTION: dict[PositionResize, str] = {
    "antialias": "bicubic with antialiasing (as timm)",
    "bicubic": "bicubic without antialiasing (as DeiT, MAE, BEiT)",
    "offset": "bicubic without antialiasing, scale factor from grid + 0.1 (as DINO, iBOT, DINOv2)",
}


def resize_positions(positions_1ND: torch.Tensor, native: tuple[int, int], grid: tuple[int, int], method: PositionResize) -> torch.Tensor:
    """float [1, h·w, D] for `grid` from the embeddings [1, N, D] of the `native` grid, row-major; the same tensor where the grids agree."""
    if native == grid:
        return positions_1ND
    image_1Dhw = positions_1ND.float().reshape(1, *native, -1).permute(0, 3, 1, 2)
    if method == "offset":
        scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
        resized = F.interpolate(image_1Dhw, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        resized = F.interpolate(image_1Dhw, size=grid, mode="bicubic", align_corners=False, antialias=method == "antialias")
    return resized.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(positions_1ND.dtype)
