"""The tars of a data set: records in, deterministic bytes out, and every shard read back and checked against its data set's rules."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from harness.core import Box, Keypoint
from harness.data.manifest import MaskKind, Rules
from harness.errors import RequestError, ShardError

EXTENSIONS: tuple[str, ...] = ("jpg", "png", "webp")
ImageExtension = Literal["jpg", "png", "webp"]
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,149}")
_MASKS: tuple[MaskKind, ...] = get_args(MaskKind)
_END = bytes(1024)


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One sample as a recipe gives it, its image encoded."""

    key: str
    """Unique in its data set; letters, digits, `_` and `-`, as WebDataset cuts a member's name at its first dot."""
    image: bytes
    extension: ImageExtension
    label: int | None = None
    boxes: Sequence[Box] = ()
    keypoints: Sequence[Keypoint] = ()
    object_mask: np.ndarray | None = None
    """uint8 or uint16 [H, W] label map."""
    part_mask: np.ndarray | None = None
    """uint8 or uint16 [H, W] label map."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Further content of its JSON, such as where the image comes from."""


# --- writing ----------------------------------------------------------------------------------------------------------


def write_tar(path: Path, records: Iterable[Record]) -> list[str]:
    """A tar of the records, under its name only once it is whole; returns their keys."""
    keys = []
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for record in records:
                    for name, data in members(record):
                        # a TarInfo starts with time, owner and group 0 and mode 0644: nothing of this machine enters
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    keys.append(record.key)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return keys


def members(record: Record) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of a record's members, in a shard's order. Raises RequestError for a key that readers could not separate from the suffixes."""
    if not _KEY.fullmatch(record.key):
        raise RequestError(f"key: expected 1 to 150 letters, digits, '_' and '-', got {shown(record.key)}")
    if record.extension not in EXTENSIONS:
        raise RequestError(f"{record.key}: expected an image as {', '.join(EXTENSIONS)}, got {shown(record.extension)}")
    about: dict[str, Any] = {
        **record.about,
        "boxes": [dataclasses.asdict(box) for box in record.boxes],
        "keypoints": [_plain(keypoint) for keypoint in record.keypoints],
    }
    if record.label is not None:
        about["label"] = record.label
    yield f"{record.key}.{record.extension}", record.image
    try:
        text = json.dumps(about, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except ValueError:
        raise RequestError(f"{record.key}: expected finite numbers in boxes and keypoints, got NaN or infinity") from None
    yield f"{record.key}.json", text.encode("utf-8", "replace")
    for kind, mask in (("object", record.object_mask), ("part", record.part_mask)):
        if mask is not None:
            yield f"{record.key}.{kind}.png", encode_mask(mask)


def _plain(keypoint: Keypoint) -> dict[str, Any]:
    """A keypoint as JSON; without an instance where the data set has none."""
    return {name: value for name, value in dataclasses.asdict(keypoint).items() if name != "instance" or value is not None}


def encode_mask(mask: np.ndarray) -> bytes:
    """A label map, uint8 or uint16 [H, W], as a greyscale PNG of 8 or 16 bit. Raises RequestError for any other array."""
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.uint16):
        raise RequestError(f"mask: expected uint8 or uint16 [H, W], got {mask.dtype} {list(mask.shape)}")
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG", compress_level=9)
    return file.getvalue()


# --- reading back -----------------------------------------------------------------------------------------------------


def verify_shard(path: Path, keys: Sequence[str], rules: Rules) -> None:
    """Read a shard from disk and check every sample against the rules. Raises ShardError for the first that breaks one."""
    try:
        read_keys = []
        for key, parts in _samples(path):
            _verify_sample(f"{path.name}: {key}", parts, rules)
            read_keys.append(key)
    except tarfile.TarError as error:
        raise ShardError(f"{path.name}: expected a tar, got {error}") from error
    if read_keys != list(keys):
        raise ShardError(f"{path.name}: expected {len(keys)} samples with the keys that were written, got {len(read_keys)}; is the disk sound?")


def verify_record(record: Record, rules: Rules) -> None:
    """Check a record, as its members would be written, against the rules. Raises ShardError or RequestError where it breaks one."""
    _verify_sample(record.key, {name.partition(".")[2]: data for name, data in members(record)}, rules)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, suffix → bytes) of each sample. Raises ShardError where members of a sample are separated or repeated, or the end is missing."""
    seen: set[str] = set()
    current, parts = "", dict[str, bytes]()
    with path.open("rb") as file:
        if path.stat().st_size < len(_END) or (file.seek(-len(_END), os.SEEK_END) >= 0 and file.read() != _END):
            raise ShardError(f"{path.name}: expected zeros at its end, got none: it is cut")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if key != current:
                    if parts:
                        yield current, parts
                    if key in seen:
                        raise ShardError(f"{path.name}: expected keys that differ, got {shown(key)} twice")
                    seen.add(key)
                    current, parts = key, {}
                if suffix in parts:
                    raise ShardError(f"{path.name}: expected keys that differ, got {shown(key)} twice")
                stream = tar.extractfile(member)
                parts[suffix] = stream.read() if stream else b""
    if parts:
        yield current, parts


def _verify_sample(name: str, parts: Mapping[str, bytes], rules: Rules) -> None:
    images = [suffix for suffix in parts if suffix in EXTENSIONS]
    if len(images) != 1 or "json" not in parts:
        raise ShardError(f"{name}: expected one image and a json, got {', '.join(parts)}")
    size = _decoded(name, parts[images[0]], _FORMATS[images[0]]).size
    try:
        about = json.loads(parts["json"])
    except ValueError as error:
        raise ShardError(f"{name}.json: expected JSON, got {error}") from error
    verify_about(name, about, size, rules)
    for kind in _MASKS:
        mask = parts.get(f"{kind}.png")
        if mask is None and kind in rules.annotations:
            raise ShardError(f"{name}: expected {kind} mask, as its data set says, got none")
        if mask is not None and kind not in rules.annotations:
            raise ShardError(f"{name}: expected no {kind} mask, as its data set says, got one")
        if mask is not None:
            _verify_mask(f"{name}.{kind}.png", mask, size, rules.mask_values.get(kind))


def verify_about(name: str, about: Mapping[str, Any], size: tuple[int, int], rules: Rules) -> None:
    label = about.get("label")
    if "label" in rules.annotations and not (isinstance(label, int) and 0 <= label < rules.classes):
        raise ShardError(f"{name}: expected a label from 0 to {rules.classes - 1}, got {shown(label)}")
    for annotation, present in (("label", label is not None), ("boxes", bool(about["boxes"])), ("keypoints", bool(about["keypoints"]))):
        if present and annotation not in rules.annotations:
            raise ShardError(f"{name}: expected no {annotation}, as its data set says, got some")
    for point in about["keypoints"]:
        if point["part"] not in rules.parts:
            raise ShardError(f"{name}: expected a part of the data set, got {shown(point['part'])}")
        if point["visible"] and not (0 <= point["x"] <= size[0] and 0 <= point["y"] <= size[1]):
            raise ShardError(f"{name}: expected {point['part']} in the image of {size[0]}×{size[1]}, got ({point['x']}, {point['y']})")
        if not 0 <= point.get("instance", 0) < max(1, len(about["boxes"])):
            raise ShardError(f"{name}: expected {point['part']} of one of {len(about['boxes'])} boxes, got instance {point['instance']}")


def _verify_mask(name: str, data: bytes, size: tuple[int, int], values: int | None) -> None:
    mask = _decoded(name, data, "PNG")
    if mask.mode not in ("L", "I;16"):
        raise ShardError(f"{name}: expected greyscale of 8 or 16 bit, got mode {mask.mode}")
    if mask.size != size:
        raise ShardError(f"{name}: expected the image's size {size[0]}×{size[1]}, got {mask.size[0]}×{mask.size[1]}")
    highest = int(np.asarray(mask).max())
    if values is not None and highest >= values:
        raise ShardError(f"{name}: expected values below {values}, got {highest}")


def _decoded(name: str, data: bytes, expected: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=[expected]) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise ShardError(f"{name}: expected a readable {expected}, got {error}") from error


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
