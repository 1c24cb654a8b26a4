"""The keys of items: written and read in one place, for every view and every sample's key."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from harness.core import Keypoint, Rows, Sample, View
from harness.data.augment import CropAndFlip
from harness.data.item_key import ItemKey, sample_of
from harness.data.views.augmented import RandomCrops
from harness.data.views.bag import Bag
from harness.data.views.keypoint_patch import KeypointPatch
from harness.data.views.whole import Whole
from harness.probes.lib.augmented import KeptFields, KeptRows
from harness.probes.lib.bags import bags
from harness.probes.locality import labels

PLAIN = ("a", "", "n01440764_10026", "写真 1", "a/b.c:d", "0.1", "1:head", "a.0", " ", "a\nb")
"""Keys as a reader lets them through, and some that it refuses for another reason."""
MARKED = ("a#b", "a#", "#", "a#1#2", "a#00", "a#1.2.3", "a#-1", "a#x:y#", "#0x1")
"""Keys that every reader refuses, for their `#`."""
PARTS = ("head", "left wing", "wing #2", "1", "0.1", "a:b", "", "x#1.2", "ナ")

VIEWS: dict[str, View] = {
    "whole": Whole(),
    "kept crops": RandomCrops(count=12, augment=CropAndFlip()),
    "bag": Bag(patches=3, side=32, draws=11),
    "keypoint patch": KeypointPatch(parts=PARTS),
}


def sample(key: str) -> Sample:
    keypoints = tuple(Keypoint(part=part, x=4.0 * index, y=4.0, visible=True) for index, part in enumerate(PARTS))
    return Sample(key=key, image=np.zeros((40, 40, 3), np.uint8), label=1, keypoints=keypoints)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_what_a_view_writes_is_read_back(view: View) -> None:
    for key in (*PLAIN, *MARKED):
        items = view(sample(key))
        assert items
        assert [str(ItemKey.parse(item.key)) for item in items] == [item.key for item in items]
        assert len({item.key for item in items}) == len(items)
        if not isinstance(view, Whole):
            assert {sample_of(item.key) for item in items} == {key}
    for key in PLAIN:
        assert {sample_of(item.key) for item in view(sample(key))} == {key}


def test_every_form_is_a_value_and_a_text() -> None:
    forms = {
        "a": ItemKey("a"),
        "a#3": ItemKey("a", 3),
        "a#10.0": ItemKey("a", 10, patch=0),
        "a#0:left wing": ItemKey("a", 0, part="left wing"),
        "a#0:": ItemKey("a", 0, part=""),
        "a#head": ItemKey("a", part="head"),
        "a#": ItemKey("a", part=""),
        "a#007": ItemKey("a", part="007"),
        "a#b#1.2": ItemKey("a#b", 1, patch=2),
        "a#0:wing #2": ItemKey("a", 0, part="wing #2"),
    }
    for text, key in forms.items():
        assert ItemKey.parse(text) == key
        assert str(key) == text
        assert sample_of(text) == key.sample


def test_any_text_is_a_key_and_stays_as_it_is() -> None:
    texts = ["".join(letters) for length in range(6) for letters in product("a#0.:", repeat=length)] + ["a#" + "9" * 5000, "a#1\n"]
    for text in texts:
        assert str(ItemKey.parse(text)) == text
        assert sample_of(text) == ItemKey.parse(text).sample


def test_only_a_number_alone_is_a_draw() -> None:
    assert [ItemKey.parse(text).draw for text in ("a", "a#2", "a#2.0", "a#2:head", "a#head", "a#b#2")] == [None, 2, None, None, None, 2]


def rows(keys: list[str]) -> Rows:
    return Rows(keys=keys, groups=keys, targets=np.arange(len(keys)), features=np.arange(2.0 * len(keys), dtype=np.float32).reshape(-1, 2))


@pytest.mark.parametrize("key", [*PLAIN, *MARKED])
def test_probes_find_the_sample_of_their_rows_whatever_its_key(key: str) -> None:
    patches = [item.key for item in Bag(patches=2, side=32, draws=2)(sample(key))]
    means = bags("test", rows(patches), 2, "none")
    assert [list(mean.keys) for mean in means.values()] == [[f"{key}#0"], [f"{key}#1"]]
    crops = [item.key for item in RandomCrops(count=2)(sample(key))]
    assert KeptRows.of("linear", rows(crops), KeptFields(train_views=2)) == KeptRows(images=1, views=2)
    assert labels(rows(patches), rows([key])).tolist() == [0] * 4
