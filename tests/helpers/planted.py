"""Pictures that say what they show, and encoders that repeat a chosen part of it: what the harness must find in them is known beforehand.

A picture is 28 rows by 16 columns. Its figure fills the left half, in three pictures of four, or the right half. Red is the object's class on the
figure and 0 beside it; green is the part, from top to bottom head (8 rows), body (8) and foot (12), and 0 beside the figure; blue is noise. Each part
has its keypoint in the middle of its upper 8 × 8 pixels, so the nearest other one is 8 pixels away and the paper's crop shows that part alone.

An encoder has one token a pixel, so that label maps and tokens lie on each other without a border.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.core import EncoderInfo, Preprocessing, Tokens
from harness.data.manifest import Manifest, load_manifest
from harness.features.bank import BankSpec
from harness.search.study import Score
from tests.helpers import here, tiny

HEIGHT, WIDTH = 28, 16
CLASSES, PARTS = ("red", "green", "blue", "grey"), ("head", "body", "foot")
TOPS, HEIGHTS = (0, 8, 16), (8, 8, 12)
CLASS_LEVELS, PART_LEVELS = (60, 110, 160, 210), (70, 140, 210)
SPLITS = {"train": 32, "val": 16, "test": 48}
PER_SHARD = 16


def is_left(index: int) -> bool:
    """Of four pictures of a class, one has its figure on the right."""
    return (index // len(CLASSES)) % 4 != 3


def record(rng: np.random.Generator, key: str, index: int) -> list[tuple[str, bytes]]:
    """(file name, contents) of one picture."""
    label = index % len(CLASSES)
    columns = slice(0, 8) if is_left(index) else slice(8, 16)
    image, part_mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
    image[..., 2] = rng.integers(0, 256, (HEIGHT, WIDTH))
    keypoints = []
    for part, (name, top, height) in enumerate(zip(PARTS, TOPS, HEIGHTS, strict=True)):
        image[top : top + height, columns, 0] = CLASS_LEVELS[label]
        image[top : top + height, columns, 1] = PART_LEVELS[part]
        part_mask[top : top + height, columns] = part + 1
        keypoints.append({"part": name, "x": columns.start + 4.0, "y": top + 4.0, "visible": True})
    about = json.dumps({"label": label, "keypoints": keypoints}).encode()
    masks = {"object": (part_mask > 0).astype(np.uint8), "part": part_mask}
    return [(f"{key}.png", tiny.encode(image, "PNG")), (f"{key}.json", about)] + [
        (f"{key}.{kind}.png", tiny.encode(mask, "PNG")) for kind, mask in masks.items()
    ]


def build(root: Path) -> Manifest:
    """The data set `planted` below `root`, every class as often in every split."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in SPLITS.items():
        records = [record(rng, f"{split}-{index:03d}", index) for index in range(count)]
        shards = [
            tiny.write_tar(root / "planted" / f"{split}-{start}.tar", records[start : start + PER_SHARD]) for start in range(0, count, PER_SHARD)
        ]
        splits[split] = {"samples": count, "shards": shards}
    manifest = {
        "schema": 1,
        "dataset": "planted",
        "version": "1",
        "license": "CC0-1.0",
        "source": "drawn by the tests",
        "classes": CLASSES,
        "parts": PARTS,
        "annotations": ["label", "keypoints", "object", "part"],
        "mask_classes": {"object": ["background", "figure"], "part": ["background", *PARTS]},
        "splits": splits,
    }
    (root / "planted" / "manifest.json").write_text(json.dumps(manifest))
    return load_manifest(str(root), "planted")


# --- encoders that know one thing ---------------------------------------------------------------------------------------


def one_hot(levels: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    """[..., 1 + levels]: which of the levels a value is, the first place being for none of them (0)."""
    return nn.functional.one_hot((levels[..., None] - torch.tensor([0, *steps])).abs().argmin(dim=-1), len(steps) + 1).float()


def objects(image: torch.Tensor) -> torch.Tensor:
    return one_hot(image[..., 0], CLASS_LEVELS)


def parts(image: torch.Tensor) -> torch.Tensor:
    return one_hot(image[..., 1], PART_LEVELS)


def noise(image: torch.Tensor) -> torch.Tensor:
    """Seven waves of the blue value, each token's own, far too fast for values to be read off them."""
    return torch.sin(image[..., 2:] * torch.tensor([0.9, 1.7, 2.3, 3.1, 4.3, 5.9, 7.7]))


def positions(image: torch.Tensor) -> torch.Tensor:
    """Row and column of the token, whatever the image."""
    height, width = image.shape[1:3]
    rows, columns = torch.eye(height)[:, None].expand(-1, width, -1), torch.eye(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).expand(len(image), -1, -1, -1)


Knows = Callable[[torch.Tensor], torch.Tensor]
"""uint8 values as float [B, h, w, 3] to tokens [B, h, w, D]."""


class PlantedEncoder:
    """Tokens that tell what `knows` reads at their pixel; the cls is their mean, and so is the projection, of what `projects` reads."""

    def __init__(self, name: str, knows: Knows, projects: Knows | None = None) -> None:
        self._knows, self._projects = knows, projects
        self.module = nn.Module()
        width, projection = (None if reads is None else reads(torch.zeros(1, HEIGHT, WIDTH, 3)).shape[-1] for reads in (knows, projects))
        assert width is not None
        self.info = EncoderInfo(
            name=name,
            family="planted",
            architecture=name,
            source="nothing learned",
            weights_sha256=name,
            params=0,
            embed_dim=width,
            block_dims=(width,),
            grid=(HEIGHT, WIDTH),
            has_cls=True,
            registers=0,
            projection_dim=projection,
            positions="none",
            preprocessing=Preprocessing(size=(HEIGHT, WIDTH), resize=WIDTH, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        )

    def encode(
        self,
        images: torch.Tensor,
        *,
        blocks: Sequence[int] = (),
        projection: bool = False,
        keep: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> Tokens:
        pixels = (images * 255).round().permute(0, 2, 3, 1)
        tokens = self._knows(pixels)
        projected = self._projects(pixels).mean(dim=(1, 2)) if projection and self._projects is not None else None
        return Tokens(cls=tokens.mean(dim=(1, 2)), patches=tokens, projection=projected)


ENCODERS = {
    encoder.info.name: encoder
    for encoder in (
        PlantedEncoder("objects", objects),
        PlantedEncoder("parts", parts, projects=objects),
        PlantedEncoder("noise", noise),
        PlantedEncoder("positions", positions),
    )
}


# --- the walk, from tars to values ----------------------------------------------------------------------------------------


class World(here.World):
    """The built data set and a cache of banks and streams' accounts, which fills as tasks are asked for."""

    def score(self, encoder: str, task: str, **how: Any) -> Score:
        """What `<task>[@<protocol>]` finds in an encoder, of banks that are extracted from the tars, or of the tars as they stream by."""
        ((_, score),) = self.scores(ENCODERS[encoder], f"planted/{task}", **how)
        return score

    def bank(self, encoder: str, task: str, readout: str, split: str) -> BankSpec:
        """The bank of a readout, extracted from the tars if it is not there yet."""
        plan = self.plan(ENCODERS[encoder], f"planted/{task}")
        self.encode(ENCODERS[encoder], plan)
        (study,) = plan.studies
        return study.banks[split][readout]


def values(score: Score) -> Mapping[str, float | None]:
    """Metric to value."""
    return {value.metric: value.value for value in score.values}
