"""Mutated bytes to everything that reads data of unknown makers: `python -m tests.helpers.fuzz` from the repository's root, or `make fuzz`.

Pictures of every format, label maps, records' JSON, tars, manifests and COCO's annotations are damaged at random, as a seed decides, and read. Every
outcome must be a value, a loss with a name, or a refusal in one line. Whatever else happens, more memory than 2 GB, a crash or an endless loop
included, is a fault, and `python -m tests.helpers.fuzz --target NAME --first INDEX --mutations 1` makes it happen again. It runs in a process of its
own.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, features
from pycocotools import mask as rle

from harness.core import Item, Preprocessing, Sample
from harness.data.manifest import Manifest, Rules, Shard, parse_manifest
from harness.data.preprocess import prepare, prepare_mask
from harness.data.shards import ShardAudit, attempt, decode_sample, in_order, label_and_group, read_samples
from harness.data.views.keypoint_patch import KeypointPatch
from harness.data.views.whole import Whole
from harness.errors import HarnessError, ManifestError, SampleError, ShardError
from shards import coco, tars

MEMORY = 2 * 10**9
"""Bytes that reading may take, beside what the process has imported."""
SECONDS = 60
"""After which a mutation is endless."""
PARTS = ("head", "body")
RULES = Rules(annotations=frozenset({"label", "boxes", "keypoints", "object", "part"}), classes=3, parts=frozenset(PARTS), mask_values={"object": 2})
INPUT = Preprocessing(size=(32, 32), resize=40)
SHOWN = 20


class Fault(Exception):
    """An outcome that must not be."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One reader, and sound inputs for it."""

    seeds: Sequence[bytes]
    read: Callable[[bytes], str]
    """What came of some bytes: `sample`, or the name of a loss or of a refusal."""
    share: int
    """Of all mutations, in percent."""
    damage: Callable[[Sequence[bytes], random.Random], bytes]
    """A damaged input."""


# --- mutations ----------------------------------------------------------------------------------------------------------

VALUES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF, 0x30, 0x39)
WORDS = (
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"1e9",
    b"-1",
    b"9" * 400,
    b"[]",
    b"{}",
    b'"\\ud800"',
    b'"\\u0000"',
    b"true",
    b"0.5",
    b"[[1]]",
    b'""',
)


def mutated(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of the inputs with one to eight faults in its bytes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        rng.choice(FAULTS)(data, seeds, rng)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """Headers, where lengths and sizes stand, are hit as often as all the rest."""
    return rng.randrange(min(len(data), 600) if rng.random() < 0.5 else len(data)) if data else 0


def _flip(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    if data:
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _set(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    place = _place(data, rng)
    data[place : place + rng.choice((1, 1, 2, 4))] = bytes([rng.choice(VALUES)]) * rng.choice((1, 2, 4))


def _scramble(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    place, length = _place(data, rng), rng.randrange(1, 33)
    data[place : place + length] = rng.randbytes(length)


def _cut(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    place = _place(data, rng)
    del data[place : place + rng.randrange(1, 65)]


def _truncate(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _repeat(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = data[place : place + rng.randrange(1, 513)]


def _splice(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    other, place = rng.choice(seeds), _place(data, rng)
    start = rng.randrange(len(other))
    data[place:] = other[start:]


def _word(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    """A number or a value of JSON becomes another."""
    ends = b",:]} \n\0"
    starts = [place + 1 for place, byte in enumerate(data[:-1]) if byte in b":[,"]
    start = rng.choice(starts) if starts else _place(data, rng)
    stop = next((place for place in range(start, min(start + 400, len(data))) if data[place] in ends and place > start), start)
    data[start:stop] = rng.choice(WORDS)


ODD: tuple[Any, ...] = (None, True, 0, -1, 0.5, 1e9, -1e9, 1e308, math.nan, math.inf, 2**31, 2**63, 10**400, "", "1", "person", "\ud800", "a\0b\n")
ODD += ([], {}, [[1]], [None], {"a": 1}, [1e9] * 6, ["a"] * 3, [0] * 5000)


def restructured(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """JSON that stays JSON, one to four of its values being odd, gone, doubled or another's; or, one time in four, with faults in its bytes."""
    if rng.random() < 0.25:
        return mutated(seeds, rng)
    root = [json.loads(rng.choice(seeds))]
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(root))
        holder, place = rng.choice(places)
        other, elsewhere = rng.choice(places)
        match rng.randrange(5):
            case 0 if holder is not root:
                del holder[place]
            case 1 if isinstance(holder, list) and holder is not root:
                holder.insert(place, copy.deepcopy(holder[place]))
            case 2:
                holder[place] = copy.deepcopy(other[elsewhere])
            case _:
                holder[place] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(root[0]).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(list or object, index or key) of everything within a value."""
    for place in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, place
        if not (isinstance(value[place], list) and len(value[place]) > 50):
            yield from _places(value[place])


FAULTS = (_flip, _flip, _set, _set, _scramble, _cut, _truncate, _repeat, _splice, _word)


# --- pictures and label maps --------------------------------------------------------------------------------------------


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """One of every format and of every kind of values that files have."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    wide, words = colour.resize((200, 3)), np.tile(np.arange(20, dtype=np.uint16) * 3000, (24, 1))
    made = [
        *(
            encoded(colour, "JPEG", **options)
            for options in ({}, {"progressive": True}, {"quality": 5, "subsampling": 0}, {"exif": b"Exif\0\0II*\0"})
        ),
        *(encoded(colour.convert(mode), "JPEG") for mode in ("L", "CMYK")),
        *(encoded(colour.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(encoded(words, kind) for kind in ("PNG", "TIFF", "PPM")),
        encoded(wide, "PNG"),
        *(encoded(colour, "WEBP", lossless=lossless) for lossless in (True, False)),
        *(encoded(colour, "TIFF", compression=compression) for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        *(encoded(colour.convert(mode), "TIFF") for mode in ("1", "L", "PA", "LAB", "YCbCr", "CMYK", "I", "F")),
        *(encoded(colour.convert(mode), kind) for mode, kind in (("P", "GIF"), ("P", "BMP"), ("P", "PCX"), ("P", "TGA"), ("1", "XBM"), ("P", "ICO"))),
        *(encoded(colour, kind) for kind in ("BMP", "PPM", "TGA", "PCX", "SGI", "DDS", "QOI", "ICO", "ICNS", "MPO", "MSP", "BLP") if can(kind)),
    ]
    if features.check("jpg_2000"):
        made.append(encoded(colour, "JPEG2000"))
    if features.check("avif"):
        made.append(encoded(colour, "AVIF"))
    return made


def can(kind: str) -> bool:
    """Whether Pillow writes RGB pictures of a format."""
    try:
        return bool(encoded(Image.new("RGB", (64, 64)), kind))
    except (OSError, KeyError, ValueError):
        return False


def damaged_picture(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """A picture with faults; more often than not, the check sums of a PNG's chunks are right again, so that what they guard is looked at."""
    data, place = bytearray(mutated(seeds, rng)), 8 if rng.random() < 0.7 else sys.maxsize
    while data[:4] == b"\x89PNG" and place + 12 <= len(data):
        stop = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if stop + 4 > len(data):
            break
        data[stop : stop + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : stop]))
        place = stop + 4
    return bytes(data)


LABELS = encoded(np.eye(24, 20, dtype=np.uint8), "PNG")
ABOUT = {
    "label": 1,
    "group": "a",
    "boxes": [{"x": 0, "y": 0.5, "width": 8, "height": 9, "label": 2}, {"x": 3, "y": 4, "width": 5, "height": 6}],
    "keypoints": [
        {"part": "head", "x": 3, "y": 4.5, "visible": True, "instance": 0},
        {"part": "body", "x": 13, "y": 14, "visible": True, "instance": 1},
        {"part": "body", "x": 1, "y": 2, "visible": False},
    ],
}
SOUND = {"png": encoded(np.full((24, 20, 3), 90, np.uint8), "PNG"), "json": json.dumps(ABOUT).encode(), "object.png": LABELS, "part.png": LABELS}


def seen(sample: Sample) -> Sample:
    """The sample, brought to an encoder's input as a run brings it: whole, and by its parts."""
    if sample.image.dtype != np.uint8 or sample.image.ndim != 3 or sample.image.shape[2] != 3:
        raise Fault(f"an image of {sample.image.dtype} {sample.image.shape}")
    items: list[tuple[Item, Any]] = [(item, view.fit) for view in (Whole(), KeypointPatch(parts=PARTS)) for item in view(sample)]
    for item, fit in items:
        if prepare(item.image, INPUT, fit).shape != (3, 32, 32):
            raise Fault("an input of another size")
        for mask in item.masks.values():
            prepare_mask(mask, INPUT, fit)
    return sample


def outcome_of(result: object) -> str:
    """The name of what became of one sample. Raises Fault where it has none."""
    if not isinstance(result, ShardError):
        return "sample"
    if isinstance(result.__cause__, Fault):
        raise result.__cause__
    unforeseen = result.__cause__ is not None and str(result).startswith(type(result.__cause__).__name__)
    if unforeseen or isinstance(result.__cause__, MemoryError):
        raise Fault(f"a loss that nobody named: {result}") from result.__cause__
    return "lost: " + one_line(result.reason if isinstance(result, SampleError) else str(result))


def one_line(message: str) -> str:
    message.encode()
    if not message or not message.isprintable() or len(message) > 2000:
        raise Fault(f"a message that is no line: {message[:200]!r}")
    return message


def read_member(name: str, rules: Rules = RULES) -> Callable[[bytes], str]:
    def read(data: bytes) -> str:
        members = {**SOUND, name: data}
        label, group = label_and_group(members)
        json.dumps([label, group], ensure_ascii=False).encode()
        return outcome_of(attempt(lambda: seen(decode_sample("a", members, rules))))

    return read


# --- tars and manifests -------------------------------------------------------------------------------------------------


def tarred(records: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in records.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def archives() -> list[bytes]:
    records = {f"{key}.{name}": data for key in ("a", "b", "c") for name, data in SOUND.items()}
    long = {f"{'deep/' * 30}{name}": data for name, data in records.items()}
    return [tarred(records, format=tarfile.USTAR_FORMAT), tarred(long, format=tarfile.GNU_FORMAT), tarred(long, format=tarfile.PAX_FORMAT)]


def damaged_tar(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """A tar with faults in its bytes, in its headers' sizes, types and names, or in both; most often with the headers' check sums right again."""
    data = bytearray(mutated(seeds, rng) if rng.random() < 0.5 else rng.choice(seeds))
    if rng.random() < 0.2:
        return bytes(data)
    for place in range(0, len(data) - 511, 512):
        if data[place + 257 : place + 262] == b"ustar":
            if rng.random() < 0.15:
                data[place + rng.choice(FIELDS)] = rng.choice((*VALUES, *b"\x800157LKSxgV"))
            data[place + 148 : place + 156] = b" " * 8
            data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    return bytes(data)


FIELDS = (0, 1, 5, 99, 124, 125, 130, 134, 135, 156, 157, 345, 482, 483)
"""Bytes of a header: of the name, the size, the type, the link's name, the prefix, and, of sparse members, the unfolded size."""


def read_tar(data: bytes) -> str:
    path = WORK / "a.tar"
    path.write_bytes(data)
    shard = Shard(file="a.tar", samples=3, bytes=max(10240, len(data)), sha256=hashlib.sha256(data).hexdigest())
    audit = ShardAudit(shard="a.tar", expected=3)
    try:
        for key, result in in_order(((key, lambda decode=decode: seen(decode())) for key, decode in read_samples(str(path), shard, RULES, audit)), 1):
            if outcome_of(result) == "sample":
                audit.seen += 1
            elif isinstance(result, ShardError):
                audit.fail(key, result)
    except ShardError as error:
        return "refused: " + one_line(str(error)).split(": ", 1)[1]
    audit.close()
    if audit.seen + audit.failed != audit.expected:
        raise Fault(f"an account of {audit.seen} seen and {audit.failed} failed of {audit.expected}")
    for reason, names in audit.reasons.items():
        for text in (reason, *names):
            one_line(text)
    return "sample" if audit.complete else "lost: " + ", ".join(sorted(audit.reasons))


def manifests() -> list[bytes]:
    shard = {"file": "train-00000.tar", "samples": 3, "bytes": 10240, "sha256": "0" * 64}
    about = {"schema": 1, "dataset": "toy", "version": "1", "license": "CC0-1.0", "source": "fuzz", "range": [0, 4095], "max_pixels": 10**6}
    labels = {"classes": ["a", "b"], "parts": list(PARTS), "part_of": {"head": "a"}, "annotations": ["label", "keypoints", "object"]}
    rest = {"mask_classes": {"object": ["ground", "figure"]}, "levels": {"top": [0, 0]}, "counterparts": {"toy2": [[0], []]}}
    return [json.dumps({**about, **labels, **rest, "splits": {"train": {"samples": 3, "shards": [shard]}}}).encode()]


def read_manifest(data: bytes) -> str:
    try:
        manifest: Manifest = parse_manifest(data, "m.json")
    except ManifestError as error:
        return "refused: " + one_line(str(error))[:60]
    if parse_manifest(manifest.to_json().encode(), "m.json") != manifest:
        raise Fault("a manifest that is another one once it is written")
    return "sample"


# --- COCO ---------------------------------------------------------------------------------------------------------------


def annotations() -> list[bytes]:
    """Objects and persons on two photographs, in one file that is both."""
    listed = [{"id": number, "file_name": f"{number}.jpg", "width": 20, "height": 24} for number in (1, 2)]
    categories = [{"id": 1, "name": "person", "keypoints": ["nose", "foot"], "skeleton": [[1, 2]]}]
    outlines: list[Any] = [[[2, 2, 12, 2, 12, 12, 2, 12.5]], {"size": [24, 20], "counts": [100, 80, 300]}]
    compressed = rle.encode(np.asfortranarray(np.eye(24, 20, dtype=np.uint8)))
    outlines += [{"size": [24, 20], "counts": compressed["counts"].decode()}, [[2, 2, 9, 2, 9, 9], [4.5, 4.5, 12, 12, 4, 12]]]
    things = [
        {
            "id": number,
            "image_id": 1 + number % 2,
            "category_id": 1,
            "bbox": [2, 2, 10, 10.5],
            "area": 100,
            "iscrowd": 0,
            "segmentation": outline,
            "keypoints": [3, 4, 2, 5, 6, 1],
            "num_keypoints": 2,
        }
        for number, outline in enumerate(outlines)
    ]
    return [json.dumps({"info": {}, "images": listed, "annotations": things, "categories": categories}).encode()]


def lay_out_coco() -> None:
    (WORK / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (WORK / "coco" / split).mkdir()
        for number in (1, 2):
            (WORK / "coco" / split / f"{number}.jpg").write_bytes(encoded(np.full((24, 20, 3), 90, np.uint8), "JPEG"))
        for kind in ("instances", "person_keypoints"):
            (WORK / "coco" / "annotations" / f"{kind}_{split}.json").write_bytes(annotations()[0])


def read_coco(data: bytes) -> str:
    outcomes = [_read_coco(data, *kind) for kind in (("coco_objects", "instances"), ("coco_keypoints", "person_keypoints"))]
    return min(outcomes)  # a refusal, where there is one


def _read_coco(data: bytes, name: str, kind: str) -> str:
    for split in ("train2017", "val2017"):
        (WORK / "coco" / "annotations" / f"{kind}_{split}.json").write_bytes(data)
    try:
        data_set = coco.describe(WORK / "coco", data_set=name, partial=True)
        records = [data_set.make(item) for items in data_set.splits.values() for item in items]
    except HarnessError as error:
        return "refused: " + one_line(str(error).replace(str(WORK), ""))[:60]
    return "sample" if all(list(tars.members(record)) for record in records) else "refused: an empty record"


# --- the run ------------------------------------------------------------------------------------------------------------

WORK = Path()


def targets() -> dict[str, Target]:
    return {
        "image": Target(
            seeds=pictures(), read=read_member("png", replace(RULES, annotations=frozenset({"label"}))), share=45, damage=damaged_picture
        ),
        "labels": Target(
            seeds=[LABELS, encoded(np.eye(24, 20, dtype=np.uint16), "PNG")], read=read_member("part.png"), share=10, damage=damaged_picture
        ),
        "json": Target(seeds=[SOUND["json"]], read=read_member("json"), share=15, damage=restructured),
        "tar": Target(seeds=archives(), read=read_tar, share=15, damage=damaged_tar),
        "manifest": Target(seeds=manifests(), read=read_manifest, share=5, damage=restructured),
        "coco": Target(seeds=annotations(), read=read_coco, share=10, damage=restructured),
    }


def run(name: str, target: Target, seed: int, indices: range, here: int) -> tuple[Counter[str], list[str]]:
    """The outcome of each mutation, and the faults; `here` is a file that names the one being read, in case the process dies of it."""
    outcomes, faults = Counter[str](), list[str]()
    for index in indices:
        os.pwrite(here, f"{name} {index}".ljust(40).encode(), 0)
        signal.alarm(SECONDS)
        try:
            outcomes[target.read(target.damage(target.seeds, random.Random(f"{seed}/{name}/{index}")))] += 1
        except Exception as error:
            faults.append(f"{name} {index}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            signal.alarm(0)
        if len(faults) == SHOWN:
            break
    return outcomes, faults


def child(options: argparse.Namespace, work: Path) -> int:
    global WORK
    WORK = work
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit = psutil.Process().memory_info().data + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders written in C speak to the terminal
    lay_out_coco()
    here = os.open(WORK / "here", os.O_RDWR | os.O_CREAT)
    faults: list[str] = []
    for name, target in targets().items():
        if options.target in (None, name):
            count = options.mutations if options.target else options.mutations * target.share // 100
            outcomes, new_faults = run(name, target, options.seed, range(options.first, options.first + count), here)
            faults += new_faults
            counted = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common(options.shown))
            print(f"{name}: {sum(outcomes.values())} mutations, {len(outcomes)} outcomes, {len(new_faults)} faults\n    {counted}", flush=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f"memory: {most / 1e6:.0f} MB at most, beside {before / 1e6:.0f} MB of imports", flush=True)
    if most > MEMORY:
        faults.append(f"memory: {most} bytes, of at most {MEMORY}")
    print("\n".join(faults))
    return 1 if faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one of image, labels, json, tar, manifest, coco")
    parser.add_argument("--first", type=int, default=0, help="index of the first mutation of each target")
    parser.add_argument("--shown", type=int, default=5, help="outcomes to tell of each target")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        status = in_a_process(options, work)
        if status not in (0, 1):
            here = work / "here"
            print(f"the process died (status {status}) of {here.read_text().strip() if here.exists() else 'its own preparations'}")
        return status and 1
    finally:
        shutil.rmtree(work)


def in_a_process(options: argparse.Namespace, work: Path) -> int:
    """Exit status of `child`, in a process forked off this one; that of a signal is negative."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 2
    try:
        status = child(options, work)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
