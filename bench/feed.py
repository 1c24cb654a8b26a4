"""The feed of an encoder: reading, decoding and resizing, against an encoder that only sleeps, and against torchvision.

An encoder that sleeps at a given rate is what an accelerator looks like to the feed. The ideal of a run is the longer of two times: that of its
batches at the encoder's rate, and that of its images at the feed's own, which is measured before and after it, without an encoder. Padded batches
take a whole batch's time. An accelerator normalises on the device, so here nobody does.
"""

from __future__ import annotations

import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torchvision.transforms import v2

from bench._pictures import jpegs, work_on, write_shards
from bench.rows import Row
from harness.core import EncoderInfo, Preprocessing, Tokens
from harness.data.images import Decoder, decode_rgb
from harness.data.preprocess import prepare_pixels
from harness.features.device import Compute
from harness.features.extract import Extractor, ShardWork

PREPROCESSING = Preprocessing(size=(224, 224), resize=256)
SIDES, BATCHES, THREADS = ((375, 500), (240, 320)), (16, 64, 256), (1, 2, 4)
RATES = (0.25, 1.0, 4.0)
"""Of the encoder, as multiples of the feed's own."""
SAMPLES = [1000, 100, 400]
"""Of the shards, which are taken by turns."""
LEAST_BATCHES = 40
OWN_IMAGES = 1000
"""Of a run that measures the feed's own rate."""
WIDTH = 8


class Sleeper(torch.nn.Module):
    """An encoder that takes `seconds` per batch, and no core."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.batches = 0
        self.info = EncoderInfo(
            name="sleeper",
            family="none",
            architecture="none",
            source="none",
            weights_sha256="",
            params=0,
            embed_dim=WIDTH,
            block_dims=(WIDTH,),
            grid=(1, 1),
            has_cls=False,
            registers=0,
            projection_dim=None,
            positions="none",
            preprocessing=PREPROCESSING,
        )

    @property
    def module(self) -> torch.nn.Module:
        return self

    def encode(self, images: torch.Tensor, **_: object) -> Tokens:
        self.batches += 1
        time.sleep(self.seconds)
        return Tokens(cls=None, patches=torch.zeros(len(images), 1, 1, WIDTH))


class Feed:
    """Runs of an extractor over shards, with an encoder that sleeps."""

    def __init__(self, works: Sequence[ShardWork], batch: int, threads: int) -> None:
        self._works, self._batch = works, batch
        self._sleeper = Sleeper()
        self._extractor = Extractor(Compute("float32", False, 1), lambda _: self._sleeper, batch_size=batch, decode_threads=threads)

    def seconds(self, works: Sequence[ShardWork], per_batch: float) -> float:
        """Of a run over `works`, with an encoder that takes so many seconds per batch."""
        self._sleeper.seconds = per_batch
        start = time.perf_counter()
        for _, begun in self._extractor.each(works, node=""):
            begun.result()
        return time.perf_counter() - start

    def own(self, images: int) -> float:
        """Seconds per image without an encoder."""
        works = self.at_least(images, 0)
        return self.seconds(works, 0.0) / sum(work.shard.samples for work in works)

    def at_least(self, images: int, batches: int) -> list[ShardWork]:
        """Shards by turns until there are so many images and batches."""
        chosen = list[ShardWork]()
        for work in itertools.cycle(self._works):
            if sum(work.shard.samples for work in chosen) >= images and self.batches_of(chosen) >= batches:
                return chosen
            chosen.append(work)
        return chosen

    def batches_of(self, works: Iterable[ShardWork]) -> int:
        return sum(-(-work.shard.samples // self._batch) for work in works)

    def cell(self, rate: float, *, batches: int, own_images: int) -> dict[str, float]:
        """One run at `rate` of the feed's own: its ideal seconds, its seconds, and the feed's own seconds per image."""
        before = self.own(own_images)
        works, per_batch = self.at_least(0, batches), self._batch * before / rate
        seconds = self.seconds(works, per_batch)
        own = (before + self.own(own_images)) / 2
        ideal = max(self.batches_of(works) * per_batch, sum(work.shard.samples for work in works) * own)
        return {"ideal": ideal, "seconds": seconds, "own images per second": 1 / own}


def cells(
    folder: Path, sides: Iterable[tuple[int, int]], batches: Sequence[int], threads: Sequence[int], tiny: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    for height, width in sides:
        place = folder / f"{height}x{width}"
        place.mkdir()
        shards = write_shards(place, jpegs(height, width, 4 if tiny else 48), [5, 3] if tiny else SAMPLES)
        works = [work_on(shard, "sleeper", "float32") for shard in shards]
        for batch, count, rate in itertools.product(batches, threads, RATES):
            measured = Feed(works, batch, count).cell(rate, batches=3 if tiny else LEAST_BATCHES, own_images=8 if tiny else OWN_IMAGES)
            yield f"{width} × {height}, batch {batch}, {count} threads, encoder at {rate:g} of the feed", measured


def reference(data: bytes, transform: Callable[[Any], Any]) -> Any:
    return transform(Image.open(io.BytesIO(data)).convert("RGB"))


def per_core(side: tuple[int, int], decoders: Sequence[Decoder], tiny: bool) -> dict[str, float]:
    """CPU seconds per image of the feed with each decoder, and of Pillow and torchvision; one thread, image by image, by turns."""
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(PREPROCESSING.resize, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(PREPROCESSING.size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )
    torch.set_num_threads(1)
    files = jpegs(*side, 2 if tiny else 24)
    rivals: dict[str, Callable[[bytes], object]] = {decoder: partial(prepared, decoder=decoder) for decoder in decoders}
    rivals["torchvision"] = partial(reference, transform=transform)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(2 if tiny else 11):
        for name, rival in rivals.items():
            start = time.thread_time()
            for data in files:
                rival(data)
            seconds[name].append((time.thread_time() - start) / len(files))
    return {name: statistics.median(spent) for name, spent in seconds.items()}


def prepared(data: bytes, decoder: Decoder) -> torch.Tensor:
    return prepare_pixels(decode_rgb(data, decoder=decoder), PREPROCESSING, "crop")


def run(tiny: bool) -> list[Row]:
    """Ratios of ideal to real time over all cells, and of the reference's CPU time per image to the feed's."""
    sides: Sequence[tuple[int, int]] = [(24, 32)] if tiny else SIDES
    batches, threads = ([4], [1]) if tiny else (BATCHES, THREADS)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, mock.patch("harness.features.extract.normalise", lambda images, _: images):
        for name, numbers in cells(Path(folder), sides, batches, threads, tiny):
            ratios[name] = numbers["ideal"] / numbers["seconds"]
    against = "the lower of the encoder's rate and the feed's own"
    rows = [
        row(f"feed, {which} cell", f"overlap with an encoder that sleeps, {which} of {len(ratios)} cells", against, ratio, target, ratios)
        for which, ratio, target in (("median", statistics.median(ratios.values()), 0.95), ("lowest", min(ratios.values()), 0.90))
    ]
    decoders: dict[Decoder, float] = {"pillow": 1.2, **({"torchcodec": 1.5} if find_spec("torchcodec") else {})}
    for height, width in sides:
        seconds = per_core((height, width), list(decoders), tiny)
        for decoder, target in decoders.items():
            what, against = f"bytes to uint8 input by {decoder}, {width} × {height}", "Pillow, torchvision v2 resize, to float, normalise"
            milliseconds = {f"milliseconds per image, {name}": 1e3 * spent for name, spent in seconds.items()}
            rows.append(
                row(f"feed per core, {decoder}, {width} × {height}", what, against, seconds["torchvision"] / seconds[decoder], target, milliseconds)
            )
    return rows


def row(name: str, what: str, against: str, ratio: float, target: float, measured: Mapping[str, float]) -> Row:
    return Row(row=name, what=what, against=against, ratio=ratio, target=target, lower_is_better=False, measured=measured)
