"""The harness's own calibration: encoders that know the object, the part, the position or nothing, and the values that must come out.

Everything between is real: tars, views, extraction, banks, probes, the choice on val, the score on test. tests/helpers/planted.py has the pictures;
the test split has 48 of them, 12 of each of 4 classes, and 3 parts on each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness.errors import BankError
from harness.features.bank import BankStore
from harness.features.readouts import parse_readout, unavailable
from harness.tasks import select
from tests.helpers import planted
from tests.helpers.planted import CLASSES, PARTS, World, values

C, P = len(CLASSES), len(PARTS)
IMAGES = planted.SPLITS["test"]
PATCHES = IMAGES * P
OF_A_CLASS = IMAGES // C
QUICK = {"epochs": 10, "batch_size": 32}
FITTED = {
    "object-linear": QUICK,
    "object-knn": {},
    "object-logistic": {},
    "object-lowshot@1-shot": {},
    "object-lowshot@10-percent": {},
    "object-attentive": {**QUICK, "attention_heads": 1},
    "object-attentive@release": {**QUICK, "attention_heads": 1},
    "object-linear-streamed": QUICK,
    "object-attentive-streamed": {**QUICK, "attention_heads": 1},
    "part-linear": QUICK,
    "part-linear@release": {**QUICK, "min_distance": 0.0},
    "part-knn": {},
    "part-logistic": {},
    "part-attentive": {**QUICK, "attention_heads": 1},
    "part-attentive@release-statistics": {**QUICK, "attention_heads": 1},
}
"""Classification tasks, and the protocol fields that make them small. The pictures are smaller than the 40 pixels that the release asks of a crop."""
OBJECT_TASKS = [name for name in FITTED if name.startswith("object")]
PART_TASKS = [name for name in FITTED if name.startswith("part")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("planted")
    planted.build(root / "shards")
    return World(shards=root / "shards", cache=root / "cache")


def accuracy(world: World, encoder: str, task: str) -> float:
    scores = values(world.score(encoder, task, **FITTED[task]))
    value = scores["accuracy"]
    assert value is not None
    if encoder != "noise":
        # every class is as often in the test split
        assert scores["mean_class_accuracy"] == pytest.approx(value)
    return value


def ap(world: World, encoder: str, task: str, **overrides: Any) -> float:
    scores = values(world.score(encoder, task, **overrides))
    assert scores["AP"] is not None
    assert scores["mAP"] == pytest.approx(scores["AP"], abs=0.02 if encoder == "noise" else 1e-9)
    return scores["AP"]


# --- who knows the answer gets 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", OBJECT_TASKS)
def test_who_knows_the_object_tells_objects(world: World, task: str) -> None:
    assert accuracy(world, "objects", task) == 1.0


@pytest.mark.parametrize("task", PART_TASKS)
def test_who_knows_the_part_tells_parts(world: World, task: str) -> None:
    assert accuracy(world, "parts", task) == 1.0


@pytest.mark.parametrize("protocol", ["strict", "paper", "release"])
def test_who_knows_finds_all_there_are(world: World, protocol: str) -> None:
    assert ap(world, "objects", f"object-retrieval@{protocol}") == 1.0
    assert ap(world, "parts", f"part-retrieval@{protocol}", **({"min_distance": 0.0} if protocol == "release" else {})) == 1.0


def test_a_value_of_1_has_no_interval_of_1(world: World) -> None:
    for value in world.score("parts", "part-retrieval").values:
        assert (value.value, value.low, value.high) == (1.0, None, None)
        assert value.notes == ("no interval: every resample has the same value",)
    accuracy, *_ = world.score("parts", "part-knn").values
    assert (accuracy.value, accuracy.high) == (1.0, 1.0)
    assert accuracy.low is not None
    assert 0.5 < accuracy.low < 1.0


# --- who knows something else gets chance, or what can be counted ------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["parts", "positions"])
@pytest.mark.parametrize("task", OBJECT_TASKS)
def test_whole_pictures_look_alike_to_who_knows_no_object(world: World, encoder: str, task: str) -> None:
    # the same features for every picture, so one class is always told
    assert accuracy(world, encoder, task) == pytest.approx(1 / C)


@pytest.mark.parametrize("encoder", ["objects", "positions"])
@pytest.mark.parametrize("task", PART_TASKS)
def test_parts_of_an_object_look_alike_to_who_knows_no_part(world: World, encoder: str, task: str) -> None:
    assert accuracy(world, encoder, task) == pytest.approx(1 / P)


@pytest.mark.parametrize("encoder", ["parts", "positions"])
def test_when_all_pictures_are_equally_near_precision_is_their_share(world: World, encoder: str) -> None:
    # all of the gallery comes at once; each picture is a photograph of its own, so strict and paper leave out the same
    for protocol in ("strict", "paper"):
        assert ap(world, encoder, f"object-retrieval@{protocol}") == pytest.approx((OF_A_CLASS - 1) / (IMAGES - 1))
    assert ap(world, encoder, "object-retrieval@release") == pytest.approx(1 / C)


def test_when_all_patches_are_equally_near_precision_is_their_share(world: World) -> None:
    assert ap(world, "positions", "part-retrieval@strict") == pytest.approx(1 / P)  # whole pictures are left out, one patch of each part
    assert ap(world, "positions", "part-retrieval@paper") == pytest.approx((IMAGES - 1) / (PATCHES - 1))
    assert ap(world, "positions", "part-retrieval@release", min_distance=0.0) == pytest.approx(1 / P)


def test_who_knows_the_object_retrieves_the_parts_of_its_class_first(world: World) -> None:
    # two steps: the patches of the query's class, all at similarity 1, then those of the others, all at 0; each has a third of every part
    assert ap(world, "objects", "part-retrieval@strict") == pytest.approx(1 / P)
    assert ap(world, "objects", "part-retrieval@release", min_distance=0.0) == pytest.approx(1 / P)
    # without the query alone, its class lacks one of the relevant patches
    near, first, both = OF_A_CLASS - 1, (OF_A_CLASS - 1) / (OF_A_CLASS * P - 1), (IMAGES - 1) / (PATCHES - 1)
    expected = (near * first + (IMAGES - OF_A_CLASS) * both) / (IMAGES - 1)
    assert ap(world, "objects", "part-retrieval@paper") == pytest.approx(expected)


def test_a_pool_of_all_splits_is_one_gallery(world: World) -> None:
    # 96 pictures instead of 48, and every one of them a query
    everything = sum(planted.SPLITS.values())
    score = world.score("positions", "part-retrieval@paper-cls", pool="all")
    assert score.n == everything * P
    assert values(score)["AP"] == pytest.approx((everything - 1) / (everything * P - 1))
    train = world.score("positions", "part-retrieval@paper-cls", pool="train")
    assert values(train)["AP"] == pytest.approx((planted.SPLITS["train"] - 1) / (planted.SPLITS["train"] * P - 1))


# --- who knows nothing gets chance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "share", "n"), [(task, 1 / C, IMAGES) for task in OBJECT_TASKS] + [(task, 1 / P, PATCHES) for task in PART_TASKS])
def test_noise_tells_nothing(world: World, task: str, share: float, n: int) -> None:
    assert accuracy(world, "noise", task) == pytest.approx(share, abs=3 * (share * (1 - share) / n) ** 0.5)


def chance(relevant: int, gallery: int) -> float:
    """Expected average precision of a random order: at rank n the precision is (1 + (R - 1)(n - 1) / (N - 1)) / n, and all ranks are as likely."""
    ranks = np.arange(1, gallery + 1)
    return float(np.mean((1 + (relevant - 1) * (ranks - 1) / (gallery - 1)) / ranks))


def test_noise_retrieves_at_random(world: World) -> None:
    assert ap(world, "noise", "part-retrieval@strict") == pytest.approx(chance(IMAGES - 1, PATCHES - P), abs=0.02)
    assert ap(world, "noise", "part-retrieval@paper") == pytest.approx(chance(IMAGES - 1, PATCHES - 1), abs=0.02)
    assert ap(world, "noise", "object-retrieval@strict") == pytest.approx(chance(OF_A_CLASS - 1, IMAGES - 1), abs=0.03)


def test_a_query_in_its_own_gallery_flatters_noise(world: World) -> None:
    # it comes first, with precision 1; the other relevant ones come at random behind it
    rest, gallery = IMAGES - 1, PATCHES - 1
    ranks = np.arange(1, gallery + 1)
    behind = float(np.mean((2 + (rest - 1) * (ranks - 1) / (gallery - 1)) / (ranks + 1)))
    assert ap(world, "noise", "part-retrieval@release", min_distance=0.0) == pytest.approx((1 + rest * behind) / IMAGES, abs=0.02)


# --- encoded beside projected -----------------------------------------------------------------------------------------------


def test_encoded_and_projected_stand_side_by_side(world: World) -> None:
    # this encoder knows parts, and its head keeps the object alone
    assert ap(world, "parts", "part-retrieval@strict-cls") == ap(world, "parts", "part-retrieval@strict-mean") == 1.0
    assert ap(world, "parts", "part-retrieval@strict-projection") == pytest.approx(1 / P)
    assert ap(world, "parts", "object-retrieval@strict-projection") == 1.0


def test_without_a_head_the_projection_is_undefined_with_its_reason(world: World) -> None:
    (task,) = select(["planted/object-retrieval@strict-projection"], str(world.shards), {})[0]
    reasons = [unavailable(parse_readout(readout), planted.ENCODERS["objects"].info) for readout in task.readouts]
    assert reasons == ["the checkpoint has no pretraining head"]


def test_a_bank_of_all_tokens_carries_no_label_maps(world: World) -> None:
    store = BankStore(str(world.cache))
    rows = store.rows(world.bank("objects", "object-attentive", "all", "test"))
    assert rows.features.shape == (IMAGES, 1 + planted.HEIGHT * planted.WIDTH, 1 + C)
    with pytest.raises(BankError, match="label maps"):
        store.rows(world.bank("objects", "object-attentive", "all", "test"), mask="object")


# --- segmentation -----------------------------------------------------------------------------------------------------------

SEGMENTATION = ["object-segmentation", "object-segmentation-streamed@paper", "object-segmentation-streamed@release"]
PART_SEGMENTATION = ["part-segmentation-streamed@paper", "part-segmentation-streamed@release"]
STREAMED = {
    "iterations": 30,
    "warmup_steps": 5,
    "augment": False,
    "blocks": (),  # these encoders have but one
    "train_scale": (planted.HEIGHT, planted.WIDTH),
    "test_scale": (planted.HEIGHT, planted.WIDTH),
    "crop": planted.WIDTH,
    "stride": 10,
}
"""Pictures as they are, seen through windows of their width: two of them, that overlap."""


def segmentation(world: World, encoder: str, task: str, **overrides: Any) -> list[float | None]:
    """mIoU, mAcc and aAcc of label maps of the figure, or of its parts."""
    settings = {**STREAMED, **overrides} if "streamed" in task else {"epochs": 15}
    scores = values(world.score(encoder, task, lr=(0.03, 0.3), batch_size=8, **settings))
    return [scores[name] for name in ("mIoU", "mAcc", "aAcc")]


@pytest.mark.parametrize(
    ("encoder", "task"),
    [(encoder, task) for encoder in ("objects", "parts") for task in SEGMENTATION] + [("parts", task) for task in PART_SEGMENTATION],
)
def test_who_knows_draws_every_pixel(world: World, encoder: str, task: str) -> None:
    # every part is a part of the figure, so who knows parts knows figures
    assert segmentation(world, encoder, task) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("task", PART_SEGMENTATION)
@pytest.mark.parametrize("encoder", ["objects", "noise"])
def test_who_cannot_tell_parts_takes_the_largest_for_the_whole_figure(world: World, encoder: str, task: str) -> None:
    # of the figure's 28 rows 12 are the foot, the largest: right 12 of 28, and neither head nor body is ever told; the background does not count
    scores = segmentation(world, encoder, task, crop=planted.HEIGHT)  # windows of the width would show the middle more often than the ends
    assert scores == pytest.approx([12 / 28 / 3, 1 / 3, 12 / 28], abs=1e-3 if encoder == "noise" else 1e-9)


@pytest.mark.parametrize("task", SEGMENTATION)
def test_who_knows_the_position_draws_what_is_there_most_often(world: World, task: str) -> None:
    # of figure and background 3/4 lies where it is drawn and 1/4 elsewhere: intersection 3/4, union 1 + 1/4
    assert segmentation(world, "positions", task, crop=planted.HEIGHT) == pytest.approx([0.75 / 1.25, 0.75, 0.75])


@pytest.mark.parametrize("task", PART_SEGMENTATION)
def test_on_the_figure_the_row_tells_the_part(world: World, task: str) -> None:
    assert segmentation(world, "positions", task, crop=planted.HEIGHT) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("task", SEGMENTATION)
def test_noise_draws_figures_at_random(world: World, task: str) -> None:
    # drawing a share q at random gives IoUs of q / (1 + q) and (1 - q) / (2 - q): their mean is 1/4 at q = 0 or 1 and 1/3 at q = 1/2
    miou, macc, aacc = segmentation(world, "noise", task)
    assert miou is not None
    assert 1 / 4 <= miou <= 1 / 3 + 0.01
    assert [macc, aacc] == pytest.approx([1 / 2, 1 / 2], abs=0.02)
