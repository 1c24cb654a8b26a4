"""Every way in which a shard can be wrong is counted once, by name, and the account always adds up."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core import Sample
from harness.data import shards as stream
from harness.data.manifest import Rules, Shard
from harness.data.shards import ShardAudit, attempt, decode_sample, in_order, label_and_group, read_samples
from harness.errors import RunError, SampleError, ShardError, is_of_the_place
from tests.helpers import tiny
from tests.helpers.damaged import (
    Records,
    about,
    broken_image,
    broken_json,
    broken_mask,
    duplicate_key,
    duplicate_member,
    json_of_another_shape,
    key_in_latin_1,
    key_with_a_suffix,
    mask,
    missing_image,
    missing_json,
    not_adjacent,
    not_an_image,
    point,
    twelve_bits,
    with_value,
)

COUNT = 6
RULES = Rules(
    annotations=frozenset({"label", "keypoints", "object"}), classes=len(tiny.CLASSES), parts=frozenset(tiny.PARTS), mask_values={"object": 2}
)


def records() -> Records:
    rng = np.random.default_rng(0)
    return [tiny.members(rng, f"test-{index:05d}", index % 3) for index in range(COUNT)]


def read(path: Path, entry: dict[str, object]) -> tuple[list[Sample], ShardAudit]:
    shard = Shard.model_validate(entry)
    audit = ShardAudit(shard=shard.file, expected=shard.samples)
    samples = []
    for key, sample in in_order(read_samples(str(path), shard, RULES, audit), threads=2):
        if isinstance(sample, ShardError):
            audit.fail(key, str(sample))
        else:
            audit.seen += 1
            samples.append(sample)
    audit.close()
    return samples, audit


def test_a_whole_shard_is_read_in_order(tmp_path: Path) -> None:
    entry = tiny.write_tar(tmp_path / "a.tar", records())
    samples, audit = read(tmp_path / "a.tar", entry)
    assert [sample.key for sample in samples] == [f"test-{index:05d}" for index in range(COUNT)]
    assert audit.complete
    assert audit.sha256 == entry["sha256"]
    first = samples[0]
    assert first.label == 0
    assert first.image.shape == (tiny.SIZE, tiny.SIZE, 3)
    assert first.object_mask is not None
    assert [keypoint.part for keypoint in first.keypoints] == list(tiny.PARTS)


def truncate_within_a_member(data: bytes, offsets: list[int]) -> bytes:
    return data[: offsets[9] + 600]


def truncate_between_members(data: bytes, offsets: list[int]) -> bytes:
    return data[: offsets[9]]  # three records of three members: what WebDataset reads without a word


def truncate_between_a_records_members(data: bytes, offsets: list[int]) -> bytes:
    return data[: offsets[10]]


def empty(_: bytes, __: list[int]) -> bytes:
    return b""


def garbage(data: bytes, _: list[int]) -> bytes:
    return b"\x07" * len(data)


def no_proper_end(data: bytes, _: list[int]) -> bytes:
    return data[:-1] + b"\x01"


@pytest.mark.parametrize(
    ("damage", "seen", "lost"),
    [
        (truncate_within_a_member, 3, {"absent": ["3 of 6 samples"]}),
        (truncate_between_members, 3, {"absent": ["3 of 6 samples"]}),
        (truncate_between_a_records_members, 3, {"missing member: json, object.png": ["test-00003"], "absent": ["2 of 6 samples"]}),
        (empty, 0, {"absent": ["6 of 6 samples"]}),
        (garbage, 0, {"absent": ["6 of 6 samples"]}),
        (no_proper_end, 6, {}),
    ],
)
def test_a_damaged_file_loses_only_what_is_not_there(
    tmp_path: Path, damage: Callable[[bytes, list[int]], bytes], seen: int, lost: dict[str, list[str]]
) -> None:
    path = tmp_path / "a.tar"
    entry = tiny.write_tar(path, records())
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar.getmembers()]
    path.write_bytes(damage(path.read_bytes(), offsets))
    samples, audit = read(path, entry)
    assert len(samples) == audit.seen == seen
    assert audit.seen + audit.failed == COUNT
    assert audit.reasons.keys() == {"truncated", "sha256", *lost}
    assert {reason: audit.reasons[reason] for reason in lost} == lost
    assert not audit.complete


@pytest.mark.parametrize(
    ("spoil", "seen", "duplicates", "reasons"),
    [
        (broken_image, 5, 0, {"broken image": ["test-00002"]}),
        (not_an_image, 5, 0, {"broken image": ["test-00002"]}),
        (broken_json, 5, 0, {"broken json": ["test-00002"]}),
        (json_of_another_shape, 5, 0, {"broken json": ["test-00002"]}),
        (broken_mask, 5, 0, {"broken object.png": ["test-00002"]}),
        (missing_json, 5, 0, {"missing member: json": ["test-00002"]}),
        (missing_image, 5, 0, {"missing member: image": ["test-00002"]}),
        (duplicate_key, 6, 1, {"duplicate key": ["test-00000"]}),
        (key_with_a_suffix, 5, 0, {"key with #": ["test#00002"]}),
        (key_in_latin_1, 5, 0, {"key that is not UTF-8": ["caf\\xe9"]}),
        (
            twelve_bits,
            5,
            0,
            {"16-bit grey of 0 to 2303: state `range: [0, 4095]` in the manifest": ["test-00002"]},
        ),
        (duplicate_member, 6, 1, {"duplicate member": ["test-00002.json"]}),
        (not_adjacent, 5, 1, {"missing member: object.png": ["test-00002"], "members not adjacent": ["test-00002"]}),
    ],
)
def test_a_broken_record_costs_that_sample_and_is_named(
    tmp_path: Path, spoil: Callable[[Records], None], seen: int, duplicates: int, reasons: dict[str, list[str]]
) -> None:
    made = records()
    spoil(made)
    entry = {**tiny.write_tar(tmp_path / "a.tar", made), "samples": COUNT}
    samples, audit = read(tmp_path / "a.tar", entry)
    assert len(samples) == len({sample.key for sample in samples}) == audit.seen == seen
    assert audit.seen + audit.failed == COUNT
    assert audit.duplicates == duplicates
    assert audit.reasons == reasons
    assert not audit.complete


CLASS = "label that is not one of 3 classes"
PLACE = "keypoint that has no place"
OUTSIDE = "visible keypoint outside of the image"
LABELS = "object.png of other labels than 0 to 1 and 255"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (about(label="x"), CLASS),
        (about(label=True), CLASS),
        (about(label=1.5), CLASS),
        (about(label=3), CLASS),
        (about(label=-1), CLASS),
        (about(label=[0]), CLASS),
        (about(label=None), "no label"),
        (about(group=5), "group that is not text"),
        (about(keypoints=5), "broken json"),
        (about(keypoints=[None]), "broken json"),
        (point(part="nose"), "keypoint that is not one of 4 parts"),
        (point(part=["head"]), "keypoint that is not one of 4 parts"),
        (point(x="3"), PLACE),
        (point(y=True), PLACE),
        (point(x=float("nan")), PLACE),
        (point(y=float("inf"), visible=False), PLACE),
        (point(x=None), PLACE),
        (point(x=1e12), OUTSIDE),
        (point(y=10**400), OUTSIDE),
        (point(x=-0.5), OUTSIDE),
        (point(visible="no"), "keypoint that is neither visible nor not"),
        (point(instance="0"), "keypoint whose instance is not one of the boxes"),
        (point(instance=-1), "keypoint whose instance is not one of the boxes"),
        (mask(np.zeros((tiny.SIZE, tiny.SIZE, 3), np.uint8)), "object.png of more than one channel"),
        (mask(np.zeros((7, 9), np.uint8)), "object.png of another shape than its image"),
        (with_value(200), LABELS),
        (with_value(2), LABELS),
        (with_value(256, np.uint16), LABELS),
    ],
)
def test_a_sample_that_its_manifest_rules_out_is_lost_alone(tmp_path: Path, spoil: Callable[[Records], None], reason: str) -> None:
    made = records()
    spoil(made)
    samples, audit = read(tmp_path / "a.tar", tiny.write_tar(tmp_path / "a.tar", made))
    assert len(samples) == audit.seen == COUNT - 1
    assert audit.failed == 1
    assert audit.reasons == {reason: ["test-00002"]}


@pytest.mark.parametrize(
    "spoil",
    [
        about(group="photograph"),
        point(x=0, y=tiny.SIZE),
        point(x=-1e12, visible=False),
        point(instance=7),
        about(boxes=[{"x": "nowhere"}]),  # which the manifest does not name
        with_value(255),
        with_value(255, np.uint16),
        with_value(1, np.uint16),
        mask(np.ones((7, 7), np.uint8)),
        mask(np.ones((95, 96), bool)),
    ],
)
def test_a_sample_within_the_rules_is_kept(tmp_path: Path, spoil: Callable[[Records], None]) -> None:
    made = records()
    spoil(made)
    samples, audit = read(tmp_path / "a.tar", tiny.write_tar(tmp_path / "a.tar", made))
    assert len(samples) == COUNT
    assert audit.complete, audit


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ({}, None),
        ({"label": 2}, None),
        ({"label": 3}, "box whose label is not one of 3 classes"),
        ({"width": -1}, "box that has no place"),
        ({"x": "3"}, "box that has no place"),
        ({"y": float("nan")}, "box that has no place"),
        ({"instance": 1}, "keypoint whose instance is not one of the boxes"),
    ],
)
def test_boxes_are_held_to_the_rules_where_the_manifest_names_them(box: dict[str, object], reason: str | None) -> None:
    instance = box.pop("instance", 0)
    annotations = {
        "boxes": [{"x": -2, "y": 3.5, "width": 0, "height": 60, **box}],
        "keypoints": [{"part": "head", "x": 1, "y": 1, "instance": instance}],
    }
    members = {"png": tiny.encode(np.zeros((8, 8, 3), np.uint8), "PNG"), "json": json.dumps(annotations).encode()}
    rules = replace(RULES, annotations=frozenset({"boxes", "keypoints"}))
    if reason is None:
        assert len(decode_sample("a", members, rules).boxes) == 1
        return
    with pytest.raises(ShardError, match=f"^{reason}$"):
        decode_sample("a", members, rules)


def test_samples_that_the_manifest_does_not_know_are_told_and_not_given(tmp_path: Path) -> None:
    made = records()
    del made[1][1]
    samples, audit = read(tmp_path / "a.tar", {**tiny.write_tar(tmp_path / "a.tar", made), "samples": 4})
    assert [sample.key for sample in samples] == ["test-00000", "test-00002", "test-00003"]
    assert (audit.expected, audit.seen, audit.failed) == (4, 3, 1)
    assert audit.reasons == {"missing member: json": ["test-00001"], "unexpected": ["test-00004", "test-00005"]}
    assert not audit.complete


def test_another_files_bytes_are_told(tmp_path: Path) -> None:
    entry = {**tiny.write_tar(tmp_path / "a.tar", records()), "sha256": hashlib.sha256(b"").hexdigest()}
    samples, audit = read(tmp_path / "a.tar", entry)
    assert len(samples) == COUNT
    assert set(audit.reasons) == {"sha256"}


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    entry = tiny.write_tar(tmp_path / "a.tar", records())
    with pytest.raises(ShardError, match=r"b\.tar: cannot be read"):
        read(tmp_path / "b.tar", entry)


class Payload(Exception):
    """As aiohttp's ClientPayloadError and botocore's FlexibleChecksumError: no OSError."""


class Breaking(io.BytesIO):
    """A stream out of a store that breaks off after so many bytes."""

    def __init__(self, data: bytes, after: int, error: Exception) -> None:
        super().__init__(data)
        self._after, self._error = after, error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self._after:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("error", [Payload("not enough data"), EOFError("gone"), ConnectionResetError("peer"), MemoryError()], ids=repr)
@pytest.mark.parametrize("after", [0, 5000])
def test_a_stream_that_breaks_off_is_no_damaged_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int) -> None:
    entry = tiny.write_tar(tmp_path / "a.tar", records())
    data = (tmp_path / "a.tar").read_bytes()
    monkeypatch.setattr(stream.fsspec, "open", lambda url, mode: Breaking(data, after, error))
    with pytest.raises(ShardError, match=r"a\.tar: cannot be read: .+; check that") as caught:
        read(tmp_path / "a.tar", entry)
    assert is_of_the_place(caught.value), "to be tried again"


def test_a_store_that_cannot_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, mode: str) -> None:
        raise type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})("no answer")

    entry = tiny.write_tar(tmp_path / "a.tar", records())
    monkeypatch.setattr(stream.fsspec, "open", refuse)
    with pytest.raises(ShardError, match="cannot be read: EndpointConnectionError: no answer") as caught:
        read(tmp_path / "a.tar", entry)
    assert is_of_the_place(caught.value)


# --- what no sample may cost beyond itself ------------------------------------------------------------------------------

LABELS = Rules(annotations=frozenset({"label"}), classes=3, parts=frozenset(), mask_values={})


def shard_of(path: Path, samples: int, **fields: object) -> Shard:
    data = path.read_bytes()
    plain = {"file": "a.tar", "samples": samples, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **fields}
    return Shard.model_validate(plain)


def record(key: str, **fields: object) -> list[tuple[str, bytes]]:
    picture = tiny.encode(np.zeros((8, 8, 3), np.uint8), "PNG")
    return [(f"{key}.png", picture), (f"{key}.json", json.dumps({"label": 0, **fields}).encode())]


def account(path: Path, samples: int, rules: Rules = LABELS, **fields: object) -> ShardAudit:
    """The account of a shard of labels, whose JSON can be written and read again."""
    shard = shard_of(path, samples, **fields)
    audit = ShardAudit(shard=shard.file, expected=samples)
    for key, sample in in_order(read_samples(str(path), shard, rules, audit), threads=2):
        if isinstance(sample, ShardError):
            audit.fail(key, sample)
        else:
            audit.seen += 1
    audit.close()
    assert audit.seen + audit.failed == samples
    json.dumps(audit.reasons, ensure_ascii=False).encode()
    return audit


def written(path: Path, records: Records, **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in (member for members in records for member in members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "shift-jis"])
def test_a_key_that_is_not_utf8_is_lost_alone(tmp_path: Path, encoding: str) -> None:
    name = {"latin-1": "café", "gbk": "照片", "shift-jis": "写真"}[encoding]
    path = written(tmp_path / "a.tar", [record("plain"), record(name), record("last")], format=tarfile.GNU_FORMAT, encoding=encoding)
    audit = account(path, 3)
    assert (audit.seen, audit.failed) == (2, 1)
    escaped = "".join(chr(byte) if byte < 128 else f"\\x{byte:02x}" for byte in name.encode(encoding))
    if encoding == "latin-1":
        assert audit.reasons == {"key that is not UTF-8": [escaped]}
    assert list(audit.reasons) == ["key that is not UTF-8"]


@pytest.mark.parametrize("key", ["写真/图片 1", "naïve", "a b", "日本\u3000語"])
def test_a_key_in_any_script_is_read(tmp_path: Path, key: str) -> None:
    audit = account(written(tmp_path / "a.tar", [record(key)], format=tarfile.PAX_FORMAT), 1)
    assert audit.complete


@pytest.mark.parametrize("key", ["a\nb", "folder\n/a", "a\x1b[31mb", "tab\tbed", "del\x7f"])
def test_a_key_with_control_characters_is_lost_alone_and_shown_in_one_line(tmp_path: Path, key: str) -> None:
    audit = account(written(tmp_path / "a.tar", [record(key), record("b")]), 2)
    assert audit.seen == 1
    assert audit.reasons == {"key with control characters": [key.encode("unicode_escape").decode()]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"group": "\ud800"}, "group that is not UTF-8"),
        ({"group": "a\0b"}, "group with control characters"),
        ({"group": ["a"]}, "group that is not text"),
        ({"label": 10**400}, "label that is not one of 3 classes"),
        ({"label": {}}, "label that is not one of 3 classes"),
    ],
)
def test_what_cannot_stand_in_a_table_is_lost_alone(tmp_path: Path, fields: dict[str, object], reason: str) -> None:
    audit = account(written(tmp_path / "a.tar", [record("a", **fields), record("b")]), 2)
    assert audit.reasons == {reason: ["a"]}
    assert audit.seen == 1


def test_a_group_of_any_script_and_with_a_hash_is_kept(tmp_path: Path) -> None:
    assert account(written(tmp_path / "a.tar", [record("a", group="写真#1")]), 1).complete


@pytest.mark.parametrize("about", [b'{"label": 10E400}', b'{"label": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"\xff\xfe", b"null", b"7"])
def test_label_and_group_are_none_where_they_cannot_be_read(about: bytes) -> None:
    assert label_and_group({"json": about}) == (None, None)


@pytest.mark.parametrize("plain", [{"label": True}, {"label": -1}, {"label": 2**63}, {"label": "3"}, {"group": "a"}])
def test_label_and_group_are_what_a_table_holds(plain: dict[str, object]) -> None:
    label, group = label_and_group({"json": json.dumps(plain).encode()})
    assert label is None
    assert group == plain.get("group")


PICTURE = {"png": tiny.encode(np.zeros((8, 8, 3), np.uint8), "PNG")}


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        ("keypoints", [{"part": {}, "x": 1, "y": 1}]),
        ("keypoints", [{"part": "head", "x": [1], "y": 1}]),
        ("keypoints", [{"part": "head", "x": 10**400, "y": 1, "visible": False}]),
        ("keypoints", [{"part": "head", "x": 1, "y": -(2**53), "visible": False}]),
        ("keypoints", [{"part": "head", "x": 1, "y": 1, "instance": 10**30}]),
        ("keypoints", [{"part": "head", "x": 1, "y": 1, "instance": []}]),
        ("keypoints", [[["head", 1, 1]]]),
        ("keypoints", {"part": "head"}),
        ("keypoints", "head"),
        ("keypoints", None),
        ("boxes", [{"x": 10**400, "y": 0, "width": 1, "height": 1}]),
        ("boxes", [{"x": 0, "y": 0, "width": 1e300, "height": 1}]),
        ("boxes", [{"x": 0, "y": 0, "width": 1, "height": [[1]]}]),
        ("boxes", [{"x": 0, "y": 0, "width": 1, "height": 1, "label": "a"}]),
        ("boxes", [{"x": 0, "y": 0, "width": 1, "height": 1, "label": 10**400}]),
        ("boxes", [{"x": 0, "y": 0, "width": 1, "height": 1, "iscrowd": 0}]),
        ("boxes", 7),
    ],
)
def test_annotations_of_any_shape_cost_their_sample_alone(annotation: str, values: object) -> None:
    rules = replace(RULES, annotations=frozenset({"boxes", "keypoints"}))
    members = {**PICTURE, "json": json.dumps({annotation: values}).encode()}
    with pytest.raises(SampleError):
        decode_sample("a", members, rules)


def test_an_error_that_nobody_foresaw_is_the_samples_own() -> None:
    def fails(error: BaseException) -> Callable[[], None]:
        def job() -> None:
            raise error

        return job

    odd = attempt(fails(ZeroDivisionError("by\nnought \udce9")))
    assert isinstance(odd, SampleError)
    assert str(odd) == "ZeroDivisionError: by nought \\xe9"
    assert isinstance(odd.__cause__, ZeroDivisionError)
    assert str(attempt(fails(MemoryError()))) == "MemoryError: "
    assert str(attempt(fails(ShardError("broken image")))) == "broken image"
    for others in (RunError("disk full"), KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(others)):
            attempt(fails(others))


def test_what_a_view_raises_costs_its_sample_alone() -> None:
    work = [("a", lambda: 1), ("b", lambda: 1 // 0), ("c", lambda: 3)]
    outcomes = dict(in_order(work, threads=2))
    assert (outcomes["a"], outcomes["c"]) == (1, 3)
    assert isinstance(outcomes["b"], SampleError)


def test_an_account_tells_a_bounded_number_of_reasons_and_names_apart() -> None:
    audit = ShardAudit(shard="a.tar", expected=1000)
    for index in range(1000):
        audit.fail("k" * 10_000, f"reason {index}")
    assert audit.failed == 1000
    assert len(audit.reasons) <= 101
    assert len(audit.reasons["other reasons"]) == 101
    assert max(len(name) for names in audit.reasons.values() for name in names) <= 500


def test_a_detail_stands_beside_the_key_and_the_reason_is_one() -> None:
    audit = ShardAudit(shard="a.tar", expected=2)
    for key, size in (("a", "9 × 9"), ("b", "8 × 9")):
        audit.fail(key, SampleError(f"too large: {size}", reason="too large", detail=size))
    assert audit.reasons == {"too large": ["a (9 × 9)", "b (8 × 9)"]}


def test_the_manifests_range_and_bound_reach_the_decoders() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 16, (16, 1))
    members = {"png": tiny.encode(ramp, "PNG"), "json": b'{"label": 1}', "part.png": tiny.encode(np.zeros((160, 2560), np.uint8), "PNG")}
    with pytest.raises(SampleError, match=r"state `range: \[0, 4095\]`"):
        decode_sample("a", members, LABELS)
    assert decode_sample("a", members, replace(LABELS, value_range=(0, 4080))).image[0, :, 1].tolist() == list(range(256))
    with pytest.raises(SampleError, match=r"^too large: 16 × 256 pixels, at most 4,095;"):
        decode_sample("a", members, replace(LABELS, value_range=(0, 4080), max_pixels=4095))
    with pytest.raises(SampleError, match=r"^too large: 160 × 2,560 pixels, at most 4,096;"):
        decode_sample("a", members, replace(LABELS, annotations=frozenset({"part"}), value_range=(0, 4080), max_pixels=4096))


# --- members ------------------------------------------------------------------------------------------------------------


def test_records_without_what_is_read_say_what_they_have(tmp_path: Path) -> None:
    picture = tiny.encode(np.zeros((8, 8, 3), np.uint8), "JPEG")
    path = written(tmp_path / "a.tar", [[(f"{key}.jpg", picture), (f"{key}.cls", b"1")] for key in "abc"])
    assert account(path, 3).reasons == {"missing member: json; members are jpg, cls; label is read from json": ["a", "b", "c"]}
    rules = replace(LABELS, annotations=frozenset({"keypoints", "boxes", "part"}), parts=frozenset({"head"}))
    (reason,) = account(path, 3, rules).reasons
    assert reason == ("missing member: json, part.png; members are jpg, cls; boxes and keypoints are read from json; part is read from part.png")


def test_records_whose_file_names_have_dots_say_where_keys_end(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", [[("photo.v2.jpg", b""), ("photo.v2.json", b"{}")]])
    (reason,) = account(path, 1).reasons
    assert reason.startswith("missing member: image, json; a key ends at the first dot of a file's name; members are v2.jpg, v2.json; ")
    path = written(tmp_path / "a.tar", [[("photo.jpg", b""), ("photo.small.jpg", b"")]])  # not what is missing
    (reason,) = account(path, 1).reasons
    assert "first dot" not in reason


def test_records_without_an_image_say_where_images_are_read_from(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", [[("a.tif", b"II"), ("a.json", b"{}")], [(f"b.{index}{'x' * 99}", b"") for index in range(9)]])
    assert next(iter(account(path, 2).reasons)) == "missing member: image; members are tif, json; the image is read from jpg, jpeg, png or webp"
    assert max(map(len, account(path, 2).reasons)) < 400


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_compressed_tar_says_so_in_one_line(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{compression}") as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.json"))
    name = {"gz": "gzip", "bz2": "bzip2", "xz": "xz"}[compression]
    with pytest.raises(
        ShardError, match=rf"a\.tar: expected a plain tar, got one compressed with {name}; decompress it \({'gun' if compression == 'gz' else 'b?un'}"
    ):
        account(path, 1)


@pytest.mark.parametrize(
    ("start", "name"), [(b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip"), (b"7z\xbc\xaf\x27\x1c", "7-Zip"), (b"\x04\x22\x4d\x18", "lz4")]
)
def test_other_archives_say_what_they_are(tmp_path: Path, start: bytes, name: str) -> None:
    (tmp_path / "a.tar").write_bytes(start + bytes(2000))
    with pytest.raises(ShardError, match=f"expected a plain tar, got one compressed with {name}"):
        account(tmp_path / "a.tar", 1)


@pytest.mark.parametrize("key", ["BZhang", "BZh91", "PK"])
def test_a_tar_whose_first_name_looks_like_an_archives_start_is_read(tmp_path: Path, key: str) -> None:
    assert account(written(tmp_path / "a.tar", [record(key)]), 1).complete


def with_header(tmp_path: Path, edit: Callable[[tarfile.TarInfo], None], *, samples: int = 3) -> Path:
    """Three records, the header of the second one's image edited, whatever its body is."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key in "abc"[:samples]:
            for name, data in record(key):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if name == "b.png":
                    edit(info)
                tar.addfile(info, io.BytesIO(data) if info.size == len(data) else None)
    return path


def linked(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    def edit(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "a.png", 0

    return edit


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.LNKTYPE, "member that is a link; pack the file itself (tar --dereference --hard-dereference)"),
        (tarfile.SYMTYPE, "member that is a link; pack the file itself (tar --dereference --hard-dereference)"),
        (tarfile.CHRTYPE, "member that is no file"),
        (tarfile.BLKTYPE, "member that is no file"),
        (tarfile.FIFOTYPE, "member that is no file"),
    ],
)
def test_members_that_are_no_files_cost_their_sample_alone(tmp_path: Path, kind: bytes, reason: str) -> None:
    audit = account(with_header(tmp_path, linked(kind)), 3)
    assert audit.reasons == {reason: ["b"]}
    assert audit.seen == 2


def test_folders_and_members_that_nothing_reads_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [*record("folder/a"), ("__meta__", b"{}"), ("folder/a.__key__", b"x"), ("folder/a.__bad__", b"x")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("folder/a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert account(path, 1).complete


@pytest.mark.parametrize("size", [10**6, 10**9, 2**62])
def test_a_header_that_promises_more_than_its_shard_costs_no_memory_and_no_time(tmp_path: Path, size: int) -> None:
    def edit(info: tarfile.TarInfo) -> None:
        info.size = size

    path = with_header(tmp_path, edit)
    tracemalloc.start()
    audit = account(path, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert audit.seen == 1
    assert audit.reasons.keys() <= {"truncated", "absent", "missing member: json", "member larger than its shard should be"}


def test_a_member_larger_than_the_manifests_bytes_is_lost_alone(tmp_path: Path) -> None:
    big = ("b.png", bytes(50_000))
    path = written(tmp_path / "a.tar", [record("a"), [big, ("b.json", b'{"label": 0}')], record("c")])
    audit = account(path, 3, bytes=20_000)
    assert audit.reasons == {"member larger than its shard should be": ["b"]}
    assert audit.seen == 2


def test_a_sparse_member_is_not_unfolded(tmp_path: Path) -> None:
    def edit(info: tarfile.TarInfo) -> None:
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 0

    path = with_header(tmp_path, edit)
    data = bytearray(path.read_bytes())
    at = data.index(b"b.png")
    data[at + 483 : at + 495] = b"77777777777\0"  # the size that it has unfolded: 8 GiB of nothing
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    audit = account(path, 3)
    assert audit.reasons == {"sparse member; pack it without --sparse": ["b"]}
    assert audit.seen == 2


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_an_endless_extended_header_ends_the_shard_and_not_the_run(tmp_path: Path, kind: bytes) -> None:
    def edit(info: tarfile.TarInfo) -> None:
        info.type, info.size = kind, 2**40

    audit = account(with_header(tmp_path, edit), 3)
    assert audit.reasons == {
        "truncated": ["extended header of 1099511627776 bytes"],
        "missing member: image": ["b"],
        "absent": ["1 of 3 samples"],
    } or (audit.seen == 1 and audit.reasons.keys() == {"truncated", "absent"})


def test_headers_within_headers_end_the_shard_and_not_the_run(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tar", [record("a")])
    long = tarfile.TarInfo("././@LongLink")
    long.type = tarfile.GNUTYPE_LONGNAME
    path.write_bytes(path.read_bytes()[: 4 * 512] + long.tobuf(tarfile.GNU_FORMAT) * 5000 + bytes(1024))
    audit = account(path, 2)
    assert audit.seen == 1
    assert audit.reasons.keys() == {"truncated", "absent"}
