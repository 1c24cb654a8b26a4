"""JPEG shards to features against what one would write by hand, and what an encoder actor takes of memory.

By hand: timm's network, its transform, a WebDataset DataLoader with 0, 1 or 2 workers, the same autocast; the best of these counts. Here: as many
processes as cores, each an extractor of one thread, as the encoder actors of a sweep are. Both read the same tars of 500 × 375 pixels; weights are
random. Each round times both, one after the other; the median of the ratios counts. The memory is that of a process that has loaded ViT-Ti/16 and
encodes many small pictures, beyond what it has after a first batch of zeros, which needs the activations.
"""

from __future__ import annotations

import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
import webdataset
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from bench._pictures import jpegs, work_on, write_shards
from bench.rows import Row
from harness.data.manifest import Shard
from harness.encoders import EncoderSpec, load
from harness.features import cores
from harness.features.device import Compute, Precision
from harness.features.extract import Extractor

BATCH, DECODE_THREADS, ROUNDS, IMAGES = 64, 1, 3, 512
PRECISIONS: dict[str, tuple[Precision, float]] = {
    "vit_small_patch16_224": ("bf16", 1.1),
    "vit_tiny_patch16_224": ("bf16", 1.25),
    "efficientnet_lite0": ("float32", 1.5),
    "resnet50": ("bf16", 1.3),
}
"""Of each network what it computes in, and the target."""
TINY = "test_vit"
QUARTERS = tuple(f"after quarter {number}, MB" for number in range(1, 5))
SMALL_SIDE, SMALL_IMAGES, MOST_MEGABYTES = 32, 4_096, 600


def extractor(name: str, precision: Precision, batch: int) -> Extractor:
    compute = Compute(precision, False, 1)
    encoder = load(EncoderSpec.parse({"name": "it", "architecture": name, "random": True}))
    return Extractor(compute, lambda _: encoder, batch_size=batch, decode_threads=DECODE_THREADS)


def serve(orders: Connection, name: str, precision: Precision, batch: int) -> None:
    """A process that encodes the shards that it is sent, until it is sent nothing."""
    mine = extractor(name, precision, batch)
    orders.send(None)
    while (shards := orders.recv()) is not None:
        for _, begun in mine.each([work_on(shard, "it", precision) for shard in shards], node=""):
            begun.result()
        orders.send(None)


class Actors(ExitStack):
    """Processes that encode, each its share of the shards."""

    def __init__(self, count: int, name: str, precision: Precision, batch: int) -> None:
        super().__init__()
        self._orders: list[Connection] = []
        for _ in range(count):
            receiving, sending = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=serve, args=(sending, name, precision, batch))
            process.start()
            self._orders.append(receiving)
            self.callback(process.join)
            self.callback(receiving.send, None)
        self._wait()

    def encode(self, shards: Sequence[tuple[str, Shard]]) -> None:
        for number, orders in enumerate(self._orders):
            orders.send(shards[number :: len(self._orders)])
        self._wait()

    def _wait(self) -> None:
        for orders in self._orders:
            orders.recv()


def decoded(data: bytes, transform: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    return transform(Image.open(io.BytesIO(data)).convert("RGB"))


def stacked(rows: Sequence[tuple[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([row[0] for row in rows])


class ByHand:
    """A plain loop over a DataLoader, in this process."""

    def __init__(self, name: str, precision: Precision, batch: int) -> None:
        self._network = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
        self._transform = create_transform(**resolve_model_data_config(self._network), is_training=False)
        self._precision, self._batch = precision, batch

    def encode(self, shards: Sequence[tuple[str, Shard]], workers: int) -> torch.Tensor:
        torch.set_num_threads(max(1, cores.available() - workers) if workers else cores.available())
        urls = [url for url, _ in shards]
        samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).to_tuple("jpg")
        batches = samples.map_tuple(partial(decoded, transform=self._transform)).batched(self._batch, collation_fn=stacked)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
        features = []
        autocast: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bf16")
        with torch.inference_mode(), autocast:
            for images in loader:
                features.append(self._network(images).float())
        return torch.cat(features)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def end_to_end(name: str, shards: Sequence[tuple[str, Shard]], *, rounds: int, batch: int) -> tuple[float, dict[str, float]]:
    """The median ratio of the best loop's seconds to the actors' over rounds, and images per second."""
    precision, _ = PRECISIONS.get(name, ("float32", 1.0))
    hand, count = ByHand(name, precision, batch), cores.available()
    ratios, rates = list[float](), dict[str, list[float]]()
    images = sum(shard.samples for _, shard in shards)
    with Actors(count, name, precision, batch) as actors:
        actors.encode(shards[:count])
        for _ in range(rounds):
            spent = {f"{workers} workers": seconds_of(partial(hand.encode, shards, workers)) for workers in range(min(2, count) + 1)}
            spent["actors"] = seconds_of(partial(actors.encode, shards))
            for runner, seconds in spent.items():
                rates.setdefault(runner, []).append(images / seconds)
            ratios.append(min(seconds for runner, seconds in spent.items() if runner != "actors") / spent["actors"])
    return statistics.median(ratios), {f"{runner}, images/s": statistics.median(values) for runner, values in rates.items()}


def memory(pipe: Connection, name: str, shards: Sequence[tuple[str, Shard]], batch: int) -> None:
    """Megabytes of resident memory: idle with the encoder, after a batch of zeros, and the most at each quarter of the shards."""
    mine, process = extractor(name, "float32", batch), psutil.Process()
    encoder = load(EncoderSpec.parse({"name": "it", "architecture": name, "random": True}))
    idle = process.memory_info().rss
    with torch.inference_mode():
        encoder.encode(torch.zeros(batch, 3, *encoder.info.preprocessing.size))
    resident = [idle, process.memory_info().rss]
    quarter = -(-len(shards) // 4)
    for start in range(0, len(shards), quarter):
        for _, begun in mine.each([work_on(shard, "it", "float32") for shard in shards[start : start + quarter]], node=""):
            begun.result()
        resident.append(process.memory_info().rss)
    pipe.send([value / 2**20 for value in resident])


def memory_row(name: str, shards: Sequence[tuple[str, Shard]], batch: int) -> Row:
    receiving, sending = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=memory, args=(sending, name, shards, batch))
    process.start()
    idle, zeros, *quarters = receiving.recv()
    process.join()
    most = max(quarters) - max(idle, zeros)
    return Row(
        row="memory of an encoder actor",
        what=f"an encoder actor, {name}, batch {batch}, over {sum(shard.samples for _, shard in shards):,} small pictures",
        against=f"an idle one after a batch of zeros, and {MOST_MEGABYTES} MB",
        ratio=most / MOST_MEGABYTES,
        target=1.0,
        lower_is_better=True,
        measured={
            "idle, MB": idle,
            "after a batch of zeros, MB": zeros,
            **{f"after quarter {place + 1}, MB": value for place, value in enumerate(quarters)},
        },
    )


def run(tiny: bool) -> list[Row]:
    """End to end for each encoder, and the memory of an actor."""
    rows: list[Row] = []
    encoders, batch = ([TINY], 4) if tiny else (list(PRECISIONS), BATCH)
    with tempfile.TemporaryDirectory() as folder:
        count = 8 if tiny else IMAGES // 4 // BATCH * BATCH  # whole batches: a padded one costs as much
        shards = write_shards(Path(folder), jpegs(*((24, 32) if tiny else (375, 500)), 4 if tiny else 48), [count] * 4)
        for name in encoders:
            precision, target = PRECISIONS.get(name, ("float32", 1.0))
            ratio, rates = end_to_end(name, shards, rounds=1 if tiny else ROUNDS, batch=batch)
            rows.append(
                Row(
                    row=f"end to end, {name}",
                    what=f"JPEG shards to features, {name} {precision}, {cores.available()} cores",
                    against="timm and a WebDataset DataLoader, best worker count, same autocast",
                    ratio=ratio,
                    target=target,
                    lower_is_better=False,
                    measured=rates,
                )
            )
        small = write_shards(Path(folder), jpegs(SMALL_SIDE, SMALL_SIDE, 8), [8 if tiny else SMALL_IMAGES // 16] * (4 if tiny else 16))
        rows.append(memory_row(TINY if tiny else "vit_tiny_patch16_224", small, batch))
    return rows
