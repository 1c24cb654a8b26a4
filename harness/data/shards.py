"""Shards to decoded samples, with an account of every one of them.

WebDataset groups the members into records. What it passes over in silence is counted here: a tar cut at a member boundary, members that do not follow
each other, a missing member, a key that comes twice, an image that does not decode, more samples than the manifest knows. One shard's account always
adds up: seen + failed = expected, for whatever the file holds.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard, TypeVar

import fsspec
import numpy as np
from webdataset.tariterators import group_by_keys

from harness.core import Box, Keypoint, Sample
from harness.data.images import decode_labels, decode_rgb, decoding
from harness.data.item_key import MARK
from harness.data.manifest import Rules, Shard
from harness.data.members import TAR_END, HashingReader, Unread, key_and_member, read_members, refuse_compressed
from harness.errors import HarnessError, SampleError, ShardError, in_one_line, is_of_the_place

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
MEMBERS_OF = {"label": "json", "boxes": "json", "keypoints": "json", "object": "object.png", "part": "part.png"}
"""The member that carries each annotation."""
_READ = frozenset({*IMAGE_MEMBERS, *MEMBERS_OF.values()})
IGNORED = 255
"""What a label map may hold beside its labels: pixels that count for none."""
NAMED = 100
"""How many failures of one kind an account names; the rest are counted."""
_KINDS = 100
"""How many reasons an account tells apart."""
_SHOWN = 6
"""Of a record's members, those that a reason names."""
_NAME = 40
"""Characters of a member's name."""
_KEY = 500
"""Characters of a key, in an account."""
_REASON = 200
"""Characters of an exception's text."""
_LABELS = 2**31
_FARTHEST = 2**53
"""Coordinates are below this, so that they are numbers to everything that counts with them."""

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

    def note(self, reason: str, detail: str) -> None:
        """Add to the account without failing a sample."""
        reason, detail = printable(reason), printable(detail)
        if reason not in self.reasons and len(self.reasons) >= _KINDS:
            reason, detail = "other reasons", f"{reason}: {detail}"
        named = self.reasons.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(detail[:_KEY])
        elif len(named) == NAMED:
            named.append("and more")

    def fail(self, key: str, reason: str | ShardError) -> None:
        """One sample is lost, for `reason`."""
        self.failed += 1
        detail = reason.detail if isinstance(reason, SampleError) else ""
        self.note(reason_of(reason), f"{key} ({detail})" if detail else key)

    def take(self, other: ShardAudit) -> None:
        """Add what another reading of the same shard has seen, failed and noted, behind what stands here."""
        self.seen, self.failed, self.duplicates = self.seen + other.seen, self.failed + other.failed, self.duplicates + other.duplicates
        for reason, named in other.reasons.items():
            for name in named:
                self.note(reason, name)

    def close(self) -> None:
        """Account for the samples that the manifest promises and that never came."""
        lost = self.expected - self.seen - self.failed
        if lost > 0:
            self.failed += lost
            self.note("absent", f"{lost} of {self.expected} samples")


def reason_of(error: str | ShardError) -> str:
    """What to count a loss under."""
    return error.reason if isinstance(error, SampleError) else str(error)


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
    try:
        with fsspec.open(url, "rb") as stream:
            reader = HashingReader(stream)
            refuse_compressed(url, reader.start)
            yield from _records(reader, shard.bytes, rules, audit)
            audit.sha256 = reader.drain()
    except Exception as error:
        if isinstance(error, HarnessError) or not is_of_the_place(error):
            raise
        cause = error if isinstance(error, OSError) else in_one_line(error)
        raise ShardError(f"{url}: cannot be read: {cause}; check that the shard is there and readable") from error
    if reader.tail != bytes(TAR_END):
        audit.note("truncated", f"{reader.length} bytes, without a tar's end, expected {shard.bytes} bytes")
    if audit.sha256 != shard.sha256:
        audit.note("sha256", f"expected {shard.sha256[:12]}…, got {audit.sha256[:12]}…")


def _records(reader: HashingReader, most: int, rules: Rules, audit: ShardAudit) -> Iterator[tuple[str, dict[str, bytes]]]:
    state: dict[str, bool] = {}  # key -> was it complete
    for record in group_by_keys(_members(reader, most, audit), keys=key_and_member, handler=_duplicate_members(audit)):
        key = record["__key__"]
        members = {name: value for name, value in record.items() if not name.startswith("__")}
        reason = _missing(members, rules.annotations)
        if key in state:
            audit.duplicates += 1
            audit.note("duplicate key" if state[key] and reason is None else "members not adjacent", key)
            continue
        if len(state) == audit.expected:
            audit.note("unexpected", key)
            continue
        state[key] = reason is None
        reason = unusable(key, "key") or reason or _unread(members)
        if reason is not None:
            audit.fail(key, reason)
            continue
        yield key, {name: value for name, value in members.items() if isinstance(value, bytes)}


def _missing(members: Mapping[str, object], annotations: frozenset[str]) -> str | None:
    """Which members a record lacks and, where it has others that nothing reads, what is read from where."""
    missing = sorted({MEMBERS_OF[annotation] for annotation in annotations} - members.keys())
    if not any(name in members for name in IMAGE_MEMBERS):
        missing.insert(0, "image")
    if not missing:
        return None
    reason = f"missing member: {', '.join(missing)}"
    unread = [name for name in members if name not in _READ]
    if not unread:
        return reason
    behind_a_dot = {"image" if last in IMAGE_MEMBERS else last for _, dot, last in (name.rpartition(".") for name in unread) if dot}
    if behind_a_dot & set(missing):
        reason = f"{reason}; a key ends at the first dot of a file's name"
    shown = [name[:_NAME] for name in members][:_SHOWN]
    sources = "; ".join(_source_of(name, annotations) for name in missing)
    return f"{reason}; members are {', '.join(shown)}{', …' if len(members) > len(shown) else ''}; {sources}"


def _source_of(member: str, annotations: frozenset[str]) -> str:
    if member == "image":
        return f"the image is read from {', '.join(IMAGE_MEMBERS[:-1])} or {IMAGE_MEMBERS[-1]}"
    carried = [annotation for annotation, name in MEMBERS_OF.items() if name == member and annotation in annotations]
    return f"{' and '.join(carried)} {'is' if len(carried) == 1 else 'are'} read from {member}"


def _unread(members: Mapping[str, object]) -> str | None:
    """Why a member that matters was not read, if so."""
    return next((value.reason for name, value in members.items() if isinstance(value, Unread) and name in _READ), None)


def unusable(text: str, kind: str) -> str | None:
    """Why a text out of a shard can be neither kept in a table nor told from others, or None where it can: `kind` is what it is."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{kind} that is not UTF-8"
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        return f"{kind} with control characters"
    return f"{kind} with {MARK}" if kind == "key" and MARK in text else None


def printable(text: str) -> str:
    """`text` in one line of UTF-8: control characters, and bytes that are no UTF-8, are escaped by backslashes."""
    if text.isprintable():
        return text
    return "".join(_escaped(letter) if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in text)


def _escaped(letter: str) -> str:
    code = ord(letter)
    byte = 0xDC80 <= code <= 0xDCFF  # as tarfile hands on a byte that does not decode
    return f"\\x{code - 0xDC00:02x}" if byte else letter.encode("unicode_escape").decode()


def _members(reader: HashingReader, most: int, audit: ShardAudit) -> Iterator[dict[str, Any]]:
    try:
        for name, contents in read_members(reader, most):
            yield {"fname": name, "data": contents, "__url__": audit.shard}
    except Exception as error:  # damaged headers take tarfile down in many ways: TarError, EOFError, ValueError, RecursionError …
        if is_of_the_place(error):
            raise
        audit.note("truncated", " ".join(str(error).split())[:_REASON] or type(error).__name__)


def _duplicate_members(audit: ShardAudit) -> Callable[[Exception], bool]:
    def handle(error: Exception) -> bool:
        audit.duplicates += 1
        audit.note("duplicate member", str(error.args[0]).split(": duplicate file name")[0] if error.args else "unknown")
        return True

    return handle


def label_and_group(members: dict[str, bytes]) -> tuple[int | None, str | None]:
    """Label and group that a record's members carry, without decoding its image; None where there is none that can be read."""
    with contextlib.suppress(ShardError):
        about = _json(members["json"]) if "json" in members else {}
        label = about.get("label")
        return label if _is_index(label, _LABELS) else None, _group(about)
    return None, None


def decode_sample(key: str, members: Mapping[str, bytes], rules: Rules) -> Sample:
    """A sample from its members' bytes: of what they hold, the annotations that the rules name.

    Raises SampleError, whose `reason` is what to count it under, where one does not decode or breaks the rules.
    """
    outcome = attempt(partial(_decode, key, members, rules))
    if isinstance(outcome, ShardError):
        raise outcome
    return outcome


def _decode(key: str, members: Mapping[str, bytes], rules: Rules) -> Sample:
    picture = next(members[name] for name in IMAGE_MEMBERS if name in members)
    image = decode_rgb(picture, value_range=rules.value_range, max_pixels=rules.max_pixels, decoder=rules.decoder)
    about = _json(members["json"]) if "json" in members else {}
    group = _group(about)
    with decoding("json"):
        boxes = tuple(Box(**box) for box in about.get("boxes", ())) if "boxes" in rules.annotations else ()
        keypoints = tuple(Keypoint(**keypoint) for keypoint in about.get("keypoints", ())) if "keypoints" in rules.annotations else ()
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


def _group(about: Mapping[str, Any]) -> str | None:
    group = about.get("group")
    if group is None:
        return None
    if not isinstance(group, str):
        raise SampleError("group that is not text")
    reason = unusable(group, "group")
    if reason is not None:
        raise SampleError(reason)
    return group


def _label(about: Mapping[str, Any], rules: Rules) -> int | None:
    if "label" not in rules.annotations:
        return None
    label = about.get("label")
    if not _is_index(label, rules.classes):
        raise SampleError("no label" if label is None else f"label that is not one of {rules.classes} classes")
    return label


def _check_boxes(boxes: Sequence[Box], rules: Rules) -> None:
    for box in boxes:
        sides = (box.x, box.y, box.width, box.height)
        if not all(_is_number(value) and abs(value) < _FARTHEST for value in sides) or min(box.width, box.height) < 0:
            raise SampleError("box that has no place")
        if box.label is not None and not _is_index(box.label, rules.classes):
            raise SampleError(f"box whose label is not one of {rules.classes} classes")


def _check_keypoints(keypoints: Sequence[Keypoint], shape: Sequence[int], boxes: int, rules: Rules) -> None:
    instances = boxes if "boxes" in rules.annotations else sys.maxsize
    for keypoint in keypoints:
        if not isinstance(keypoint.part, str) or keypoint.part not in rules.parts:
            raise SampleError(f"keypoint that is not one of {len(rules.parts)} parts")
        if not isinstance(keypoint.visible, bool):
            raise SampleError("keypoint that is neither visible nor not")
        if not (_is_number(keypoint.x) and _is_number(keypoint.y)):
            raise SampleError("keypoint that has no place")
        if keypoint.visible and not (0 <= keypoint.x <= shape[1] and 0 <= keypoint.y <= shape[0]):
            raise SampleError("visible keypoint outside of the image")
        if max(abs(keypoint.x), abs(keypoint.y)) >= _FARTHEST:
            raise SampleError("keypoint that has no place")
        if keypoint.instance is not None and not _is_index(keypoint.instance, instances):
            raise SampleError("keypoint whose instance is not one of the boxes")


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
    mask = decode_labels(members[name], name, max_pixels=rules.max_pixels)
    if abs(mask.shape[0] * shape[1] - mask.shape[1] * shape[0]) > max(shape):  # further than rounding to whole pixels can bring it
        raise SampleError(f"{name} of another shape than its image")
    values = rules.mask_values.get(kind)
    if values is not None and mask.max() >= values and not ((mask < values) | (mask == IGNORED)).all():
        raise SampleError(f"{name} of other labels than 0 to {values - 1} and {IGNORED}")
    return mask


def _json(data: bytes) -> dict[str, Any]:
    with decoding("json"):
        about = json.loads(data)
    if not isinstance(about, dict):
        raise SampleError("broken json")
    return about


def with_count(reason: str, first: str | None, count: str) -> str:
    """A reason and of how many samples: `missing member: json, 12 of 12 samples (members are jpg, cls; label is read from json)`.

    `first` is the first thing that an account names under the reason: of a lost shard, why it is lost.
    """
    if reason == "shard lost":
        return f"{reason} ({first}), {count}" if first else f"{reason}, {count}"
    kind, _, hint = reason.partition("; ")
    return f"{kind}, {count} ({hint})" if hint else f"{kind}, {count}"


def attempt(job: Callable[[], T]) -> T | ShardError:
    """What `job`, the work on one sample, gives, or why that sample is lost.

    The one place that decides which exceptions are the sample's own: all but those that the harness raises on purpose about something else. Data of
    unknown makers take decoders, views and resizing down in more ways than can be listed, and cost no other sample.
    """
    try:
        return job()
    except ShardError as error:
        return error
    except HarnessError:
        raise
    except Exception as error:
        lost = SampleError(printable(f"{type(error).__name__}: {' '.join(str(error).split())}")[:_REASON])
        lost.__cause__ = error
        return lost


def in_order(work: Iterable[Keyed[T]], threads: int, ahead: int = 32) -> Iterator[tuple[str, T | ShardError]]:
    """(key, result) of `work` in its order, computed by `threads` threads, at most `ahead` of them before they are asked for.

    What costs its sample (see `attempt`) is given, not raised.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[str, Future[T | ShardError]]] = deque()
        for key, job in work:
            pending.append((key, pool.submit(attempt, job)))
            if len(pending) >= ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for key, future in pending:
            yield key, future.result()
