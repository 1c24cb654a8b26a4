"""Keypoints of several things in one image: whose distances count, and whose parts; and samples that were cut from one photograph."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from harness.core import Keypoint, Sample
from harness.data.manifest import Rules
from harness.data.shards import decode_sample
from harness.data.views.keypoint_patch import KeypointPatch
from harness.data.views.whole import Whole

IMAGE = np.zeros((100, 100, 3), np.uint8)
PARTS = ("nose", "wrist", "ankle")


def sample(*keypoints: tuple[str, float, float, int | None], **fields: str) -> Sample:
    return Sample(key="a", image=IMAGE, keypoints=tuple(Keypoint(part=p, x=x, y=y, instance=i) for p, x, y, i in keypoints), **fields)


TWO = sample(
    ("nose", 20, 20, 0),
    ("wrist", 50, 20, 0),  # 30 from its own nose, 5 from the other person's
    ("nose", 55, 20, 1),
    ("elbow", 55, 32, 1),  # 12 from its nose; not selected
)


def sides(view: KeypointPatch, of: Sample = TWO) -> dict[str, int]:
    return {item.key: item.image.shape[0] for item in view(of)}


def test_distances_are_the_images_unless_told_to_stay_in_the_instance() -> None:
    assert sides(KeypointPatch(parts=PARTS)) == {"a#0:nose": 30, "a#1:wrist": 5, "a#2:nose": 5}
    assert sides(KeypointPatch(parts=PARTS, neighbours_within="instance")) == {"a#0:nose": 30, "a#1:wrist": 30, "a#2:nose": 12}
    # the other person's only selected keypoint has no neighbour of its own
    assert sides(KeypointPatch(parts=PARTS, neighbours="selected", neighbours_within="instance")) == {"a#0:nose": 30, "a#1:wrist": 30}


def test_parts_are_counted_in_the_image_unless_told_to_count_in_the_instance() -> None:
    assert len(sides(KeypointPatch(parts=PARTS, min_parts=2))) == 3
    assert sides(KeypointPatch(parts=PARTS, min_parts=2, min_parts_within="instance")) == {"a#0:nose": 30, "a#1:wrist": 5}
    assert sides(KeypointPatch(parts=PARTS, min_parts=2, min_parts_within="instance", neighbours="selected")) == {"a#0:nose": 30, "a#1:wrist": 30}
    assert sides(KeypointPatch(parts=PARTS, min_parts=3)) == {}


def test_two_noses_are_one_part() -> None:
    noses = sample(("nose", 20, 20, 0), ("nose", 50, 20, 1))
    assert sides(KeypointPatch(parts=PARTS, min_parts=2), noses) == {}


def test_keypoints_that_tell_no_instance_are_one_instance() -> None:
    alone = sample(("nose", 20, 20, None), ("wrist", 50, 20, None))
    for view in (
        KeypointPatch(parts=PARTS, min_parts=2),
        KeypointPatch(parts=PARTS, min_parts=2, neighbours_within="instance", min_parts_within="instance"),
    ):
        assert sides(view, alone) == {"a#0:nose": 30, "a#1:wrist": 30}


def test_each_choice_has_a_bank_of_its_own_and_the_old_ones_keep_theirs() -> None:
    views = [KeypointPatch(parts=PARTS, neighbours_within=n, min_parts_within=m) for n in ("image", "instance") for m in ("image", "instance")]  # type: ignore[arg-type]
    assert len({view.identity for view in views}) == 4
    assert views[0].identity == "keypoint-patch(parts=nose,wrist,ankle;side=1;neighbours=all;d=0..inf;min=1)"


@pytest.mark.parametrize(("fields", "group"), [({}, "a"), ({"group": "photo"}, "photo")])
def test_samples_of_one_photograph_are_one_group(fields: dict[str, str], group: str) -> None:
    cut = sample(("nose", 20, 20, None), ("wrist", 50, 20, None), **fields)
    assert {item.group for view in (Whole(), KeypointPatch(parts=PARTS)) for item in view(cut)} == {group}
    assert [item.key for item in Whole()(cut)] == ["a"]


def test_instance_and_group_come_out_of_a_shard() -> None:
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "PNG")
    points = [{"part": "nose", "x": 1, "y": 2, "visible": True, "instance": 3}, {"part": "nose", "x": 1, "y": 2}]
    rules = Rules(annotations=frozenset({"keypoints"}), classes=0, parts=frozenset(PARTS), mask_values={})
    read = decode_sample("a", {"png": file.getvalue(), "json": json.dumps({"group": "photo", "keypoints": points}).encode()}, rules)
    assert (read.group, [keypoint.instance for keypoint in read.keypoints]) == ("photo", [3, None])
    plain = decode_sample("a", {"png": file.getvalue(), "json": b"{}"}, rules)
    assert plain.group is None
