"""Shards to decoded samples, with an account of every one of them.

WebDataset reads the members and groups them into records. What it passes over in silence is counted here: a tar cut at a member boundary, members
that do not follow each other, a missing member, a key that comes twice, an image that does not decode, more samples than the manifest knows. One
shard's account always adds up: seen + failed = expected, for whatever the file holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import sys
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, TypeGuard, TypeVar

import fsspec
import numpy as np
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from harness.core import Box, Keypoint, Sample
from harness.errors import ShardError
from harness.manifest import Rules, Shard

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
MEMBERS_OF = {"label": "json", "boxes": "json", "keypoints": "json", "object": "object.png", "part": "part.png"}
"""The member that carries each annotation."""
IGNORED = 255
"""What a label map may hold beside its labels: pixels that count for none."""
_TAR_END = 1024  # a complete tar ends in two zero blocks of 512 bytes
NAMED = 100
"""How many failures of one kind an account names; the rest are counted."""
_SUFFIX = "#"
"""Where the suffix of an item's key begins that tells it from other items of its sample."""

T = TypeVar("T")
Keyed = tuple[str, Callable[[], T]]
"""A sample's key, and the work that is still to be done on it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The shards of one split."""

    shards: tuple[tuple[str, Shard], ...]
    """(path or URL, what it must hold), in the manifest's order."""
    rules: Rules

    @property
    def samples(self) -> int:
        return sum(shard.samples for _, shard in self.shards)


@dataclass(kw_only=True)
class ShardAudit:
    """What became of every sample of one shard."""

    shard: str
    expected: int
    seen: int = 0
    failed: int = 0
    duplicates: int = 0
    sha256: str = ""
    """Digest of the bytes that were read."""
    reasons: dict[str, list[str]] = field(default_factory=dict)
    """Reason to what it befell: sample keys, or a few words where there is no key."""

    @property
    def complete(self) -> bool:
        return not self.reasons and self.seen == self.expected

    def note(self, reason: str, what: str) -> None:
        """Add to the account without failing a sample."""
        named = self.reasons.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(what)
        elif len(named) == NAMED:
            named.append("and more")

    def fail(self, key: str, reason: str) -> None:
        """One sample is lost, for `reason`."""
        self.failed += 1
        self.note(reason, key)

    def close(self) -> None:
        """Account for the samples that the manifest promises and that never came."""
        lost = self.expected - self.seen - self.failed
        if lost > 0:
            self.failed += lost
            self.note("absent", f"{lost} of {self.expected} samples")


class _HashingReader(io.RawIOBase):
    """Passes a stream through, keeping its digest, its length and its last bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.length = 0
        self.tail = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        self.length += len(data)
        self.tail = (self.tail + data)[-_TAR_END:]
        return data

    def drain(self) -> str:
        """Read to the end; the digest of everything."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


def sample_of(item: str) -> str:
    """Key of the sample that the item of a key was made of."""
    return item.partition(_SUFFIX)[0]


def read_samples(url: str, shard: Shard, rules: Rules, audit: ShardAudit) -> Iterator[Keyed[Sample]]:
    """(key, decoder) of every whole record of one shard, in the shard's order; `audit` keeps the account of the others.

    A decoder can be called in any thread and raises ShardError where its sample is broken or breaks the rules; the caller says so with `audit.fail`,
    or counts it in `audit.seen`. `audit` is complete only after the iterator has ended and `audit.close()` was called. Raises ShardError where the
    file cannot be opened or read at all.
    """
    for key, members in read_records(url, shard, rules, audit):
        yield key, partial(decode_sample, key, members, rules)


def read_records(url: str, shard: Shard, rules: Rules, audit: ShardAudit) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members by name) of every whole record of one shard, undecoded; otherwise as `read_samples`."""
    needed = frozenset(MEMBERS_OF[annotation] for annotation in rules.annotations)
    try:
        with fsspec.open(url, "rb") as stream:
            reader = _HashingReader(stream)
            yield from _records(reader, needed, audit)
            audit.sha256 = reader.drain()
    except OSError as error:
        raise ShardError(f"{url}: cannot be read: {error}; check that the shard is there and readable") from error
    if reader.tail != bytes(_TAR_END):
        audit.note("truncated", f"{reader.length} bytes, without a tar's end, expected {shard.bytes} bytes")
    if audit.sha256 != shard.sha256:
        audit.note("sha256", f"expected {shard.sha256[:12]}…, got {audit.sha256[:12]}…")


def _records(reader: _HashingReader, needed: frozenset[str], audit: ShardAudit) -> Iterator[tuple[str, dict[str, bytes]]]:
    state: dict[str, bool] = {}  # key -> was it complete
    for record in group_by_keys(_members(reader, audit), handler=_duplicate_members(audit)):
        key = record["__key__"]
        members = {name: value for name, value in record.items() if not name.startswith("__")}
        missing = sorted(needed - members.keys())
        if not any(name in members for name in IMAGE_MEMBERS):
            missing.insert(0, "image")
        if key in state:
            audit.duplicates += 1
            audit.note("duplicate key" if state[key] and not missing else "members not adjacent", key)
            continue
        if len(state) == audit.expected:
            audit.note("unexpected", key)
            continue
        state[key] = not missing
        if _SUFFIX in key:
            audit.fail(key, f"key with {_SUFFIX}")
            continue
        if missing:
            audit.fail(key, f"missing member: {', '.join(missing)}")
            continue
        yield key, members


def _members(reader: _HashingReader, audit: ShardAudit) -> Iterator[dict[str, Any]]:
    try:
        for member in tar_file_iterator(reader):
            yield {**member, "__url__": audit.shard}
    except (tarfile.TarError, EOFError) as error:
        audit.note("truncated", " ".join(str(error).split()) or type(error).__name__)


def _duplicate_members(audit: ShardAudit) -> Callable[[Exception], bool]:
    def handle(error: Exception) -> bool:
        audit.duplicates += 1
        audit.note("duplicate member", str(error.args[0]).split(":")[0] if error.args else "unknown")
        return True

    return handle


def label_and_group(members: dict[str, bytes]) -> tuple[int | None, str | None]:
    """Label and group that a record's members carry, without decoding its image; None where there is none that can be read."""
    with contextlib.suppress(ShardError):
        about = _json(members["json"]) if "json" in members else {}
        label, group = about.get("label"), about.get("group")
        return label if isinstance(label, int) else None, group if isinstance(group, str) else None
    return None, None


def decode_sample(key: str, members: dict[str, bytes], rules: Rules) -> Sample:
    """A sample from its members' bytes: of what they hold, the annotations that the rules name.

    Raises ShardError, whose text is the reason, where one does not decode or breaks the rules.
    """
    image = decode_rgb(next(members[name] for name in IMAGE_MEMBERS if name in members))
    about = _json(members["json"]) if "json" in members else {}
    group = about.get("group")
    if group is not None and not isinstance(group, str):
        raise ShardError("group that is not text")
    try:
        boxes = tuple(Box(**box) for box in about.get("boxes", ())) if "boxes" in rules.annotations else ()
        keypoints = tuple(Keypoint(**keypoint) for keypoint in about.get("keypoints", ())) if "keypoints" in rules.annotations else ()
    except TypeError as error:
        raise ShardError("broken json") from error
    _check_boxes(boxes, rules)
    _check_keypoints(keypoints, image.shape, len(boxes), rules)
    return Sample(
        key=key,
        image=image,
        label=_label(about, rules),
        boxes=boxes,
        keypoints=keypoints,
        object_mask=_mask(members, "object", image.shape, rules),
        part_mask=_mask(members, "part", image.shape, rules),
        group=group,
    )


def decode_rgb(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a JPEG, PNG or WebP; grey, palette and CMYK images become RGB, alpha is dropped. Raises ShardError.

    Pillow, as in the pipelines that the published numbers come from: neither an EXIF rotation nor a colour profile is applied.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ShardError("broken image") from error


def _label(about: Mapping[str, Any], rules: Rules) -> int | None:
    if "label" not in rules.annotations:
        return None
    label = about.get("label")
    if not _is_index(label, rules.classes):
        raise ShardError("no label" if label is None else f"label that is not one of {rules.classes} classes")
    return label


def _check_boxes(boxes: Sequence[Box], rules: Rules) -> None:
    for box in boxes:
        if not all(_is_number(value) for value in (box.x, box.y, box.width, box.height)) or min(box.width, box.height) < 0:
            raise ShardError("box that has no place")
        if box.label is not None and not _is_index(box.label, rules.classes):
            raise ShardError(f"box whose label is not one of {rules.classes} classes")


def _check_keypoints(keypoints: Sequence[Keypoint], shape: Sequence[int], boxes: int, rules: Rules) -> None:
    instances = boxes if "boxes" in rules.annotations else sys.maxsize
    for keypoint in keypoints:
        if not isinstance(keypoint.part, str) or keypoint.part not in rules.parts:
            raise ShardError(f"keypoint that is not one of {len(rules.parts)} parts")
        if not isinstance(keypoint.visible, bool):
            raise ShardError("keypoint that is neither visible nor not")
        if not (_is_number(keypoint.x) and _is_number(keypoint.y)):
            raise ShardError("keypoint that has no place")
        if keypoint.visible and not (0 <= keypoint.x <= shape[1] and 0 <= keypoint.y <= shape[0]):
            raise ShardError("visible keypoint outside of the image")
        if keypoint.instance is not None and not _is_index(keypoint.instance, instances):
            raise ShardError("keypoint whose instance is not one of the boxes")


def _is_index(value: object, count: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value out of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _mask(members: Mapping[str, bytes], kind: str, shape: Sequence[int], rules: Rules) -> np.ndarray | None:
    """uint8 or uint16 [H', W'] label map, at a resolution of its own, of an image of `shape` [H, W, 3]."""
    name = f"{kind}.png"
    if kind not in rules.annotations or name not in members:
        return None
    try:
        with Image.open(io.BytesIO(members[name]), formats=("PNG",)) as image:
            mask: np.ndarray = np.asarray(image).astype(np.uint16 if image.mode.startswith("I") else np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ShardError(f"broken {name}") from error
    if mask.ndim != 2:
        raise ShardError(f"{name} of more than one channel")
    if abs(mask.shape[0] * shape[1] - mask.shape[1] * shape[0]) > max(shape):  # further than rounding to whole pixels can bring it
        raise ShardError(f"{name} of another shape than its image")
    values = rules.mask_values.get(kind)
    if values is not None and mask.max() >= values and not ((mask < values) | (mask == IGNORED)).all():
        raise ShardError(f"{name} of other labels than 0 to {values - 1} and {IGNORED}")
    return mask


def _json(data: bytes) -> dict[str, Any]:
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError("broken json") from error
    if not isinstance(about, dict):
        raise ShardError("broken json")
    return about


def in_order(work: Iterable[Keyed[T]], threads: int, ahead: int = 32) -> Iterator[tuple[str, T | ShardError]]:
    """(key, result) of `work` in its order, computed by `threads` threads, at most `ahead` of them before they are asked for.

    A ShardError is given, not raised.
    """

    def guarded(job: Callable[[], T]) -> T | ShardError:
        try:
            return job()
        except ShardError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[str, Future[T | ShardError]]] = deque()
        for key, job in work:
            pending.append((key, pool.submit(guarded, job)))
            if len(pending) >= ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for key, future in pending:
            yield key, future.result()
