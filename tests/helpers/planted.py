"""Pictures that say what they show, and encoders that repeat a chosen part of it: what the harness must find in them is known beforehand.

A picture is 28 rows by 16 columns. Its figure fills the left half, in three pictures of four, or the right half. Red is the object's class on the
figure and 0 beside it; green is the part, from top to bottom head (8 rows), body (8) and foot (12), and 0 beside the figure; blue is noise. Each part
has its keypoint in the middle of its upper 8 × 8 pixels, so the nearest other one is 8 pixels away and the paper's crop shows that part alone.

An encoder has one token a pixel, so that label maps and tokens lie on each other without a border.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.core import EncoderInfo, Preprocessing, Task, Tokens
from harness.data.manifest import Manifest, load_manifest, shard_url
from harness.data.shards import Source
from harness.encoders import EncoderSpec
from harness.features.bank import BankSpec, BankStore
from harness.features.device import Compute
from harness.features.extract import BankJob, Extractor, Pass, ShardWork
from harness.features.readouts import parse_readout, unavailable
from harness.plan.plan import POOLS
from harness.probes import grid
from harness.search.propose import choose, first_rates
from harness.search.runner import Runner
from harness.search.study import BankRef, Score, Stream, Study
from harness.tasks import select
from tests.helpers import tiny

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


def one_hot(levels: torch.Tensor, known: Sequence[int]) -> torch.Tensor:
    """[..., 1 + levels]: which of the levels a value is, the first place being for none of them (0)."""
    return nn.functional.one_hot((levels[..., None] - torch.tensor([0, *known])).abs().argmin(dim=-1), len(known) + 1).float()


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
        width, projection = (None if one is None else one(torch.zeros(1, HEIGHT, WIDTH, 3)).shape[-1] for one in (knows, projects))
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


@dataclass(frozen=True, kw_only=True)
class World:
    """The built data set and a cache of banks and streams' accounts, which fills as tasks are asked for."""

    shards: Path
    cache: Path
    manifest: Manifest

    def score(self, encoder: str, task: str, lr: tuple[float, float] = (0.1, 1.0), **overrides: Any) -> Score:
        """What `<task>[@<protocol>]` finds in an encoder: heads fitted on train and chosen on val, one scored on test.

        Of banks that are extracted from the tars, or of the tars as they stream by.
        """
        chosen = select([f"planted/{task}"], str(self.shards), overrides)[0][0]
        study, refs = self._study(encoder, chosen, lr)
        rates = first_rates(*lr, 2) if chosen.probe.has_learning_rate else grid(chosen.probe.name, chosen.protocol.fields)
        runner = Runner(str(self.cache), gpu=False, threads=1, load_encoder=lambda spec: ENCODERS[spec.name])
        heads = runner.run_round(study, 0, [(readout, rate) for readout in study.readouts for rate in rates]).heads
        head = choose(heads, study.readouts)
        assert head is not None, [each.error for each in heads]
        first, *more = (refs[split][head.readout] for split in POOLS[chosen.protocol.fields.get("pool", "test")])
        return runner.score(study, head, replace(first, more=tuple(more)))

    def _study(self, encoder: str, task: Task, lr: tuple[float, float]) -> tuple[Study, Mapping[str, Mapping[str, BankRef]]]:
        """The study, and what it reads, by split and readout."""
        readouts = tuple(readout for readout in task.readouts if unavailable(parse_readout(readout), ENCODERS[encoder].info) is None)
        refs = {split: {readout: self._ref(encoder, task, readout, split) for readout in readouts} for split in SPLITS}
        study = Study(
            name=f"{encoder} {task.name}",
            probe=task.probe.name,
            metrics=tuple(metric.name for metric in task.metrics),
            classes=len(task.classes),
            protocol=dict(task.protocol.fields),
            readouts=readouts,
            train=refs["train"],
            val=refs["val"],
            holds_out=False,
            trials=1,
            stack=2,
            lr=lr,
            seed=0,
            contents="",
            stream=self._stream_of(encoder) if task.feed == "streamed" else None,
        )
        return study, refs

    @staticmethod
    def _stream_of(encoder: str) -> Stream:
        spec = EncoderSpec(name=encoder, architecture=encoder)
        return Stream(encoder=spec, weights_sha256=encoder, precision="float32", batch_size=16, decode_threads=1, checkpoint_seconds=600.0)

    def _ref(self, encoder: str, task: Task, readout: str, split: str) -> BankRef:
        if task.feed == "banked":
            return BankRef(bank=self.bank(encoder, task, readout, split))
        bank = self._spec(encoder, task, "stream", split, protocol=json.dumps(task.protocol.fields, sort_keys=True))
        shards = tuple((shard_url(str(self.shards), "planted", shard), shard) for shard in self.manifest.split(split).shards)
        return BankRef(bank=bank, source=Source(shards=shards, rules=self.manifest.rules))

    def _spec(self, encoder: str, task: Task, readout: str, split: str, **identity: str) -> BankSpec:
        return BankSpec(
            dataset="planted",
            split=split,
            shards=tuple((shard.file, shard.sha256, shard.samples) for shard in self.manifest.split(split).shards),
            readout=readout,
            view=task.view.identity,
            identity=(("encoder", encoder), *identity.items()),
        )

    def bank(self, encoder: str, task: Task, readout: str, split: str) -> BankSpec:
        """The bank of a readout, extracted from the tars if it is not there yet."""
        shards, bank = self.manifest.split(split).shards, self._spec(encoder, task, readout, split)
        store = BankStore(str(self.cache))
        extractor = Extractor(Compute("float32", False, 1), ENCODERS.__getitem__, batch_size=16, decode_threads=1)
        for shard in shards:
            if store.receipt(bank, shard.file) is not None:
                continue
            work = ShardWork(
                dataset="planted",
                split=split,
                url=shard_url(str(self.shards), "planted", shard),
                shard=shard,
                rules=self.manifest.rules,
                passes=(Pass(encoder=encoder, view=task.view, banks=(BankJob(readout=readout, bank=bank),)),),
            )
            for spec, rows, receipt in extractor.run(work, node="here", attempts=1):
                assert receipt.status == "ok", receipt
                store.write_part(spec, rows, receipt)
        return bank


def values(score: Score) -> Mapping[str, float | None]:
    """Metric to value."""
    return {value.metric: value.value for value in score.values}
