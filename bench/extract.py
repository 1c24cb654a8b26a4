"""Extraction of the embedded sample against the bare encoder, and against what a user would write instead.

Lower bound: the encoder's forward on batches that lie ready in memory, as many as the extraction needs. Instead: WebDataset, timm's own transform, a
plain loop.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
import webdataset
from PIL import Image
from timm.data import create_transform

from bench._timing import median_of
from bench.rows import Row
from harness.core import Encoder
from harness.data.manifest import Manifest, Shard, load_manifest, shard_url
from harness.data.views.whole import Whole
from harness.encoders import EncoderSpec, load
from harness.features.bank import BankSpec
from harness.features.device import Compute, Precision
from harness.features.extract import BankJob, Extractor, Pass, ShardWork

ROOT = str(Path(__file__).parent.parent / "shards" / "data")
BATCH = 16
ENCODER, TINY_ENCODER = "efficientnet_lite0", EncoderSpec(name="tiny", architecture="test_vit", random=True)


def run(tiny: bool) -> list[Row]:
    encoder = load(TINY_ENCODER if tiny else EncoderSpec.parse(ENCODER))
    compute = Compute("float32", False, 1)
    manifest = load_manifest(ROOT, "stamps")
    shards = [shard for split in manifest.splits.values() for shard in split.shards][: 1 if tiny else None]
    images, batches = sum(shard.samples for shard in shards), sum(-(-shard.samples // BATCH) for shard in shards)
    work = [shard_work(manifest, shard, compute.precision) for shard in shards]
    extractor = Extractor(compute, lambda _: encoder, batch_size=BATCH, decode_threads=2)
    bare(encoder, compute, 1)  # the first call of a network takes longer
    seconds = median_of(
        {
            "bare encoder": lambda: bare(encoder, compute, batches),
            "extraction": lambda: [extractor.run(one, node="", attempts=1) for one in work],
            "plain WebDataset and timm loop": lambda: plain(encoder, compute, [one.url for one in work]),
        }
    )
    return [
        Row(
            row=f"extraction / {rival}",
            what=f"{encoder.info.name}, float32, one thread: {images} images from tars to bank rows, in {batches} batches of {BATCH}",
            against=rival,
            ratio=seconds["extraction"] / seconds[rival],
            target=None,
            lower_is_better=True,
            measured={f"{name}, s": value for name, value in seconds.items()},
        )
        for rival in ("bare encoder", "plain WebDataset and timm loop")
    ]


def shard_work(manifest: Manifest, shard: Shard, precision: Precision) -> ShardWork:
    job = BankJob(readout="mean", bank=bank(shard.file))
    return ShardWork(
        dataset="stamps",
        split="any",
        url=shard_url(ROOT, "stamps", shard),
        shard=shard,
        rules=manifest.rules,
        passes=(Pass(encoder="it", view=Whole(), banks=(job,), precision=precision),),
    )


def bank(file: str) -> BankSpec:
    return BankSpec(dataset="stamps", split="any", shards=((file, "", 0),), readout="mean", view="whole", identity=())


def bare(encoder: Encoder, compute: Compute, batches: int) -> None:
    """The encoder alone, on `batches` batches."""
    images = torch.randn(BATCH, 3, *encoder.info.preprocessing.size, device=compute.device)
    with torch.inference_mode(), compute.autocast():
        for _ in range(batches):
            encoder.encode(images)


def plain(encoder: Encoder, compute: Compute, urls: list[str]) -> torch.Tensor:
    """What one writes by hand: WebDataset, timm's transform, batches across shards, no account of anything."""
    preprocessing = encoder.info.preprocessing
    transform = create_transform(
        input_size=(3, *preprocessing.size),
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=min(preprocessing.size) / preprocessing.resize,
    )
    samples = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg")
    loader = torch.utils.data.DataLoader(
        samples.map_tuple(lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))).batched(
            BATCH, collation_fn=lambda rows: torch.stack([row[0] for row in rows])
        ),
        batch_size=None,
    )
    features = []
    with torch.inference_mode(), compute.autocast():
        for images in loader:
            features.append(encoder.encode(images.to(compute.device)).patches.float().mean((1, 2)).cpu())
    return torch.cat(features)
