"""Resize absolute position embeddings to another grid, as the authors of each encoder do.

Shape legend: B batch, N patches, D features, h w patch grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
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


_FILES: tuple[tuple[str, PositionResize], ...] = (
    (r"(^|\.)masked_embed$|(^|\.)(ibot|dino)_loss\.", "offset"),
    (r"(^|\.)(teacher|student)\.(module\.)?backbone\.", "offset"),
    (r"(^|\.)last_layer\.weight_[gv]$", "offset"),
    (r"(^|\.)decoder_(embed\.|pos_embed$|blocks\.)", "bicubic"),
    (r"(^|\.)(base_encoder|momentum_encoder)\.", "bicubic"),
    (r"(^|\.)target_encoder\.", "bicubic"),
)
"""Keys that show whose training a file comes from, wherever the encoder lies in it, and how those authors resize positions: iBOT, DINO and DINOv2
with teacher and student; MAE with its decoder; MoCo v3; I-JEPA."""


def position_rule(architecture: str, tag: str = "", keys: Iterable[str] = ()) -> PositionResize:
    """How the authors of an encoder's weights resize its absolute positions: by timm's architecture and tag, else by the keys of its whole file.

    One rule for weights that timm fetches, for files given in their place and for own checkpoints.
    """
    base, _, named = architecture.partition(".")
    tag = tag or named
    if "dinov2" in base:
        return "antialias" if "_reg" in base else "offset"
    if tag == "dino":
        return "offset"
    if tag.startswith("mae") or "ijepa" in tag or base.startswith(("deit_", "deit3_")):
        return "bicubic"
    if tag:
        return "antialias"
    names = list(keys)
    return next((rule for pattern, rule in _FILES if any(re.search(pattern, name) for name in names)), "antialias")


def resize_positions(positions_1ND: torch.Tensor, native: tuple[int, int], grid: tuple[int, int], method: PositionResize) -> torch.Tensor:
    """float [1, h·w, D] for `grid` from the embeddings [1, N, D] of the `native` grid, row-major; the same tensor where the grids agree."""
    if native == grid:
        return positions_1ND
    image_1Dhw = positions_1ND.float().reshape(1, *native, -1).permute(0, 3, 1, 2)
    with torch.autocast(image_1Dhw.device.type, enabled=False):  # in float32, whatever precision the caller uses
        if method == "offset":
            scale = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
            resized = F.interpolate(image_1Dhw, scale_factor=scale, mode="bicubic", align_corners=False)
        else:
            resized = F.interpolate(image_1Dhw, size=grid, mode="bicubic", align_corners=False, antialias=method == "antialias")
    return resized.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(positions_1ND.dtype)


def resize_bias_table(table_MK: torch.Tensor, native: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """BEiT's table of relative position biases, float [M, K] for K heads, resized from the `native` grid to another, as its authors do.

    The table's distances are stretched in a geometric sequence, so that near ones keep their resolution, and interpolated by a cubic spline; the last
    three rows (cls to patches, patches to cls, cls to itself) stay. timm uses the same sequence with linear interpolation.
    Source: run_class_finetuning.py of github.com/microsoft/unilm, beit/, which handles square grids only; here each axis has its own sequence.
    """
    from scipy.interpolate import RectBivariateSpline

    if native == grid:
        return table_MK
    source = [2 * side - 1 for side in native]
    target = [2 * side - 1 for side in grid]
    rows, columns = (_geometric_distances(old, new) for old, new in zip(source, target, strict=True))
    to_rows, to_columns = (np.arange(-(side // 2), side // 2 + 1, dtype=np.float64) for side in target)
    biases = table_MK[:-3].double().cpu().numpy()
    resized = []
    for head in range(biases.shape[1]):
        spline = RectBivariateSpline(rows, columns, biases[:, head].reshape(source), kx=min(3, source[0] - 1), ky=min(3, source[1] - 1), s=0)
        resized.append(torch.from_numpy(spline(to_rows, to_columns).reshape(-1)))
    return torch.cat([torch.stack(resized, dim=1).to(table_MK), table_MK[-3:]])


def _geometric_distances(source: int, target: int) -> list[float]:
    """`source` positions around 0 whose gaps grow by a factor q found by bisection, so that they reach about half of `target`."""
    half = source // 2
    low, high = 1.01, 1.5
    factor = low
    while high - low > 1e-6:
        factor = (low + high) / 2
        if (1 - factor**half) / (1 - factor) > target // 2:
            high = factor
        else:
            low = factor
    distances, reach = [], 1.0
    for step in range(half):
        distances.append(reach)
        reach += factor ** (step + 1)
    return [-distance for distance in reversed(distances)] + [0.0] + distances


def has_moco_positions(positions: torch.Tensor | None) -> bool:
    """Whether positions [1, 1 + N, D] are MoCo v3's: fixed sines and cosines of a square grid, the row's frequencies first, zero for the cls token.

    Other authors' positions of that shape differ: MAE's and I-JEPA's have the column first. Source: vits.py of github.com/facebookresearch/moco-v3.
    """
    if positions is None or positions.ndim != 3 or positions.shape[0] != 1 or positions.shape[2] % 4 or not positions.is_floating_point():
        return False
    side, quarter = math.isqrt(positions.shape[1] - 1), positions.shape[2] // 4
    if side < 2 or side * side != positions.shape[1] - 1:
        return False
    angles_sq = torch.arange(side)[:, None] / 10000 ** (torch.arange(quarter) / quarter)
    waves = torch.cat([angles_sq.sin(), angles_sq.cos()], dim=1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    grid = torch.cat([rows, columns], dim=2).reshape(side * side, -1)
    expected = torch.cat([torch.zeros(1, grid.shape[1]), grid])
    return bool((positions[0].float() - expected).abs().max() < 5e-3)  # bfloat16 moves them by up to 4e-3
