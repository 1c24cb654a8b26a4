"""Data sets for timings: JPEGs with the statistics of photographs, in tars of a given number of samples."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.manifest import Rules, Shard
from harness.data.views.whole import Whole
from harness.features.bank import BankSpec
from harness.features.device import Precision
from harness.features.extract import BankJob, Pass, ShardWork

QUALITY = 90
"""Gives pictures of 500 × 375 pixels some 120 kB, as ImageNet's have."""
DISTINCT = 48
"""Pictures that are drawn; shards repeat them."""
RULES = Rules(annotations=frozenset({"label"}), classes=1, parts=frozenset(), mask_values={})


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] whose amplitudes fall with the frequency, as a photograph's do."""
    waves = rng.standard_normal((height, width, 3)) + 1j * rng.standard_normal((height, width, 3))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    values = np.fft.ifft2(waves / frequency[..., None], axes=(0, 1)).real
    pixels: np.ndarray = np.clip(values / values.std() * 50 + 120, 0, 255).astype(np.uint8)
    return pixels


def jpegs(height: int, width: int, count: int = DISTINCT) -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(picture(rng, height, width)).save(buffer, "JPEG", quality=QUALITY)
        files.append(buffer.getvalue())
    return files


def write_shards(folder: Path, files: list[bytes], counts: list[int]) -> list[tuple[str, Shard]]:
    """(path, shard) of a tar for each count of samples, which take the files by turns."""
    shards = []
    for number, count in enumerate(counts):
        path = folder / f"{number:03d}.tar"
        with tarfile.open(path, "w") as tar:
            for index in range(count):
                for name, data in ((f"{index:06d}.jpg", files[index % len(files)]), (f"{index:06d}.json", b'{"label": 0}')):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append((str(path), Shard(file=path.name, samples=count, bytes=path.stat().st_size, sha256=digest)))
    return shards


def work_on(shard: tuple[str, Shard], encoder: str, precision: Precision, readout: str = "mean") -> ShardWork:
    """One pass of whole images over a shard."""
    url, entry = shard
    bank = BankSpec(dataset="pictures", split="any", shards=((entry.file, "", 0),), readout=readout, view="whole", identity=())
    encoder_pass = Pass(encoder=encoder, view=Whole(), banks=(BankJob(readout=readout, bank=bank),), precision=precision)
    return ShardWork(dataset="pictures", split="any", url=url, shard=entry, rules=RULES, passes=(encoder_pass,))
