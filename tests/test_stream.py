"""Every way in which a shard can be wrong is counted once, by name, and the account always adds up."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from harness.core import Sample
from harness.errors import ShardError
from harness.manifest import Rules, Shard
from harness.stream import ShardAudit, decode_sample, in_order, read_samples

Records = list[list[tuple[str, bytes]]]
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


def broken_image(made: Records) -> None:
    name, data = made[2][0]
    made[2][0] = (name, data[: len(data) // 2])


def not_an_image(made: Records) -> None:
    made[2][0] = (made[2][0][0], b"no image at all")


def broken_json(made: Records) -> None:
    made[2][1] = (made[2][1][0], b'{"label": 1')


def json_of_another_shape(made: Records) -> None:
    made[2][1] = (made[2][1][0], b'{"label": 1, "keypoints": [{"nose": 3}]}')


def broken_mask(made: Records) -> None:
    made[2][2] = (made[2][2][0], b"\x89PNG no")


def missing_json(made: Records) -> None:
    del made[2][1]


def missing_image(made: Records) -> None:
    del made[2][0]


def duplicate_key(made: Records) -> None:
    made.append(made[0])


def key_with_a_suffix(made: Records) -> None:
    made[2] = [(name.replace("-", "#"), data) for name, data in made[2]]


def duplicate_member(made: Records) -> None:
    made[2].append(made[2][1])


def not_adjacent(made: Records) -> None:
    made[3].append(made[2].pop())


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


def about(**more: object) -> Callable[[Records], None]:
    """Other values in the third record's JSON."""

    def spoil(made: Records) -> None:
        name, data = made[2][1]
        made[2][1] = (name, json.dumps({**json.loads(data), **more}).encode())

    return spoil


def point(**more: object) -> Callable[[Records], None]:
    return about(keypoints=[{"part": "head", "x": 3, "y": 4.5, "visible": True, **more}])


def mask(array: np.ndarray) -> Callable[[Records], None]:
    def spoil(made: Records) -> None:
        made[2][2] = (made[2][2][0], tiny.encode(array, "PNG"))

    return spoil


def with_value(value: int, dtype: type[np.unsignedinteger[Any]] = np.uint8) -> Callable[[Records], None]:
    found = np.zeros((tiny.SIZE, tiny.SIZE), dtype)
    found[3, 5] = value
    return mask(found)


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
    told = {
        "boxes": [{"x": -2, "y": 3.5, "width": 0, "height": 60, **box}],
        "keypoints": [{"part": "head", "x": 1, "y": 1, "instance": instance}],
    }
    members = {"png": tiny.encode(np.zeros((8, 8, 3), np.uint8), "PNG"), "json": json.dumps(told).encode()}
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
