"""Extraction of the embedded sample against the bare encoder, and against what a user would write instead.

    python bench/extract.py [ENCODER] [--precision float32|bf16] [--threads N]

Lower bound: the encoder's forward on batches that lie ready in memory, as many as the extraction needs. Instead: WebDataset, timm's own transform, a
plain loop. All in one process and one run, in turn; the medians of the ratios count, not the seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import webdataset
from PIL import Image
from timm.data import create_transform

from harness.core import Encoder
from harness.data.manifest import load_manifest, shard_url
from harness.data.views.whole import Whole
from harness.encoders import EncoderSpec, load
from harness.features.bank import BankSpec
from harness.features.device import Compute
from harness.features.extract import BankJob, Extractor, Pass, ShardWork

ROOT = str(Path(__file__).parent.parent / "shards" / "data")
BATCH = 16
RUNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", nargs="?", default="efficientnet_lite0")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    compute = Compute(options.precision, torch.cuda.is_available(), options.threads)
    encoder = load(EncoderSpec.parse(options.encoder))
    encoder.module.to(compute.device)
    manifest = load_manifest(ROOT, "stamps")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    images = sum(shard.samples for shard in shards)
    batches = sum(-(-shard.samples // BATCH) for shard in shards)
    work = [
        ShardWork(
            dataset="stamps",
            split="any",
            url=shard_url(ROOT, "stamps", shard),
            shard=shard,
            rules=manifest.rules,
            passes=(Pass(encoder="it", view=Whole(), banks=(BankJob(readout="mean", bank=bank(shard.file)),), precision=compute.precision),),
        )
        for shard in shards
    ]
    extractor = Extractor(compute, lambda _: encoder, batch_size=BATCH, decode_threads=2)
    ours = lambda: [extractor.run(one, node="", attempts=1) for one in work]  # noqa: E731
    bound = lambda: bare(encoder, compute, batches)  # noqa: E731
    instead = lambda: plain(encoder, compute, [one.url for one in work])  # noqa: E731
    seconds = {name: [timed(run) for _ in range(RUNS)] for name, run in (("warm-up", bound), ("bare", bound), ("partwise", ours), ("plain", instead))}
    print(f"{options.encoder}, {options.precision}, {options.threads} thread(s), {compute.device}: {images} images, {batches} batches of {BATCH}")
    floor = statistics.median(seconds["bare"])
    for name in ("bare", "partwise", "plain"):
        middle = statistics.median(seconds[name])
        print(f"  {name:9s} {images / middle:7.1f} img/s   {middle / floor:5.2f} x the bare encoder")
    print(json.dumps(seconds))


def bank(file: str) -> BankSpec:
    return BankSpec(dataset="stamps", split="any", shards=((file, "", 0),), readout="mean", view="whole", identity=())


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bare(encoder: Encoder, compute: Compute, batches: int) -> None:
    """The encoder alone, on `batches` batches."""
    images = torch.randn(BATCH, 3, *encoder.info.preprocessing.size, device=compute.device)
    with torch.inference_mode(), compute.autocast():
        for _ in range(batches):
            encoder.encode(images)


def plain(encoder: Encoder, compute: Compute, urls: list[str]) -> torch.Tensor:
    """What one writes by hand: WebDataset, timm's transform, batches across shards, no account of anything."""
    wanted = encoder.info.preprocessing
    transform = create_transform(
        input_size=(3, *wanted.size),
        interpolation=wanted.interpolation,
        mean=wanted.mean,
        std=wanted.std,
        crop_pct=min(wanted.size) / wanted.resize,
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


if __name__ == "__main__":
    main()
