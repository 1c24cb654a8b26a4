"""Tasks on bags of patches, from tars to values, with known answers: a bag of words whose convergence is 1, a bag that is the whole image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness.cluster.ledger import longest_first
from harness.config import load_sweep
from harness.core import Encoder, EncoderInfo, Preprocessing, Task, Tokens
from harness.data.manifest import Manifest
from harness.data.views.bag import Bag
from harness.data.views.keypoint_patch import KeypointPatch
from harness.data.views.whole import Whole
from harness.errors import RequestError
from harness.features.bank import BankStore
from harness.plan.plan import Plan, make_plan
from harness.probes.lib.bags import BagProbeFields
from harness.results.tables import read_table
from harness.search.accounts import Accounts
from harness.search.study import Score
from harness.sweep import main
from harness.tasks import select, templates
from tests.helpers import here, tiny

ROOT = Path(__file__).parents[2]
BAG_TASKS = ("bag-knn", "bag-linear", "bag-convergence")
CELLS, CELL = 4, 8
SMALL: dict[str, Any] = {"patches": 4, "draws": 2, "bag_sizes": [0, 1, 4]}


def manifest(*annotations: str) -> Manifest:
    return Manifest.model_validate(
        {
            "schema": 1,
            "dataset": "any",
            "version": "1",
            "license": "-",
            "source": "-",
            "classes": ("a", "b"),
            "parts": ("head", "tail"),
            "annotations": annotations,
            "splits": {"test": {"samples": 0, "shards": ()}},
        }
    )


def tasks(name: str, protocol: str | None = None, of: Manifest | None = None, **overrides: Any) -> list[Task]:
    of = of or manifest("label", "keypoints")
    return templates(of)[name].tasks(of, protocol, overrides)


# --- which tasks there are, and what they read --------------------------------------------------------------------------


def test_bags_need_labels_and_locality_labels_or_keypoints() -> None:
    def names(*annotations: str) -> set[str]:
        return {name for name in templates(manifest(*annotations)) if name in (*BAG_TASKS, "patch-locality")}

    assert names("label") == names("label", "keypoints") == {*BAG_TASKS, "patch-locality"}
    assert names("keypoints") == {"patch-locality"}
    assert not names("object")


@pytest.mark.parametrize("name", BAG_TASKS)
def test_a_curve_is_a_task_a_point_the_whole_image_first(name: str) -> None:
    points = tasks(name)
    assert [point.protocol.name for point in points] == [f"embedding[bag_size={size}]" for size in (0, 1, 4, 16)]
    assert isinstance(points[0].view, Whole)
    assert [point.protocol.fields.bag_size for point in points] == [0, 1, 4, 16]
    assert not any("bag_sizes" in point.protocol.fields.to_json() for point in points)
    sized = tasks(name, "projection", patch_sides=[32, 112.0], bag_sizes=[2])
    assert [point.protocol.name for point in sized] == ["projection[bag_size=2,patch_side=32]", "projection[bag_size=2,patch_side=112]"]
    assert [point.view.side for point in sized if isinstance(point.view, Bag)] == [32, 112]
    assert {point.readouts for point in sized} == {("projection",)}


def test_all_tasks_on_bags_read_one_bank() -> None:
    views = {point.view.identity for name in BAG_TASKS for point in tasks(name) if point.protocol.fields.bag_size}
    assert views == {"bag(patches=16;side=112;placement=random;seed=0;draws=3;frame=0.875)"}
    assert {point.view.identity for name in BAG_TASKS for point in tasks(name, patch_sides=[112], bag_sizes=[4])} == views


def test_every_choice_is_a_field() -> None:
    choices = {"patches", "patch_area", "patch_side", "frame", "patch_seed", "draws", "placement", "bag_size", "normalize", "readouts"}
    for name in BAG_TASKS:
        for point in tasks(name):
            assert choices <= set(json.loads(point.protocol.fields.to_json()))
            assert isinstance(point.protocol.fields, BagProbeFields) == (name != "bag-convergence")


def test_a_patch_as_large_as_the_usual_frame_is_the_whole_image_and_of_another_frame_that_frame() -> None:
    for overrides in ({"patch_area": 1.0}, {"patch_sides": [224]}):
        for name in BAG_TASKS:
            assert {point.view.identity for point in tasks(name, **overrides)} == {"whole"}
            for frame in (0.5, 1.0):
                views = [point.view for point in tasks(name, **overrides, frame=frame) if point.protocol.fields.bag_size]
                assert {(view.side, view.frame) for view in views if isinstance(view, Bag)} == {(224, frame)}
                assert all(isinstance(view, Bag) for view in views), "what the record says of the frame is so"


def test_a_gallery_of_whole_images_is_trained_on_them() -> None:
    for name in ("bag-knn", "bag-linear"):
        assert {point.train_view for point in tasks(name)} == {None}
        assert {type(point.train_view) for point in tasks(name, gallery="whole")} == {Whole}


def test_locality_reads_the_patches_that_part_retrieval_reads() -> None:
    (locality,) = tasks("patch-locality")
    (retrieval,) = tasks("part-retrieval")
    assert locality.view.identity == retrieval.view.identity
    assert isinstance(locality.view, KeypointPatch)
    assert isinstance(locality.reference_view, Whole)
    assert locality.level == "part"
    (locality,) = tasks("patch-locality", of=manifest("label"), grid=2)
    assert locality.view.identity == Bag(patches=4, side=112, placement="grid").identity
    assert locality.reference_view is None


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("bag-knn", {"bag_sizes": [0, 17]}, "bag_size: .*at most the 16 patches.*got 17"),
        ("bag-linear", {"placement": "grid"}, "placement: .*one draw"),
        ("bag-convergence", {"patch_sides": [0]}, "patch_side.*got 0"),
        ("bag-convergence", {"patch_sides": ["small"]}, "patch_side.*got 'small'"),
        ("bag-knn", {"gallery": "bags"}, "gallery: .*got 'bags'"),
        ("patch-locality", {"grid": 0}, "grid: .*got 0"),
        ("patch-locality", {"exclude": "class"}, "exclude: .*got 'class'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=rf"protocol\.{message}"):
        tasks(name, of=manifest("label"), **overrides)


def test_only_the_last_word_asks_for_a_bag(tmp_path: Path) -> None:
    tiny.build(tmp_path, splits={"train": 3, "test": 3})

    def names(pattern: str) -> set[str]:
        return {task.name.removeprefix("tiny/") for task in select([f"tiny/{pattern}"], str(tmp_path), {})[0]}

    assert not names("*") & {*BAG_TASKS, "patch-locality"}
    assert names("bag-knn") == {"bag-knn"}
    assert names("*-convergence") == {"bag-convergence"}


def test_the_sweeps_ask_for_what_there_is(tmp_path: Path) -> None:
    files = sorted((ROOT / "sweeps" / "bagssl").glob("*.yaml"))
    assert files
    for file in files:
        sweep = load_sweep(file)
        for dataset in {pattern.split("/")[0] for pattern in sweep.tasks}:
            tiny.build(tmp_path, splits={"train": 3, "test": 3}, name=dataset)
        chosen, _ = select(sweep.tasks, str(tmp_path), sweep.protocol)
        sides = {task.view.side for task in chosen if isinstance(task.view, Bag)}
        assert {32, 64, 112} <= sides
        for task in chosen:
            if task.name.endswith("/bag-knn"):
                beside = [other for other in chosen if other.name == task.name and other.protocol.fields.bag_size == 0]
                assert {other.view.identity for other in beside} == {"whole"}
        assert {task.name.split("/")[1] for task in chosen} <= {*BAG_TASKS, "patch-locality"}


def test_up_to_256_patches_accuracy_and_convergence_read_the_same_bags(tmp_path: Path) -> None:
    views = []
    for name in ("convergence", "many_patches"):
        sweep = load_sweep(ROOT / "sweeps" / "bagssl" / f"{name}.yaml")
        for dataset in {pattern.split("/")[0] for pattern in sweep.tasks}:
            tiny.build(tmp_path, splits={"train": 3, "test": 3}, name=dataset)
        chosen = [task for task in select(sweep.tasks, str(tmp_path), sweep.protocol)[0] if task.dataset == "cifar10"]
        assert {1, 256} <= {task.protocol.fields.bag_size for task in chosen}
        views.append({(task.view.identity, task.readouts) for task in chosen if isinstance(task.view, Bag)})
    assert views[0] == views[1]


def test_shards_that_are_cut_in_patches_are_encoded_first(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards")
    text = tiny.sweep_text(
        tmp_path / "shards", tasks=["tiny/object-knn", "tiny/bag-knn"], protocol={"patches": 4, "bag_sizes": [0, 4], "gallery": "whole"}
    )
    (tmp_path / "sweep.yaml").write_text(text)
    plan = make_plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path, "cpu", "float32")
    ordered = longest_first(plan.shard_work)
    assert {work.name for work in ordered} == {work.name for work in plan.shard_work}
    tests = [work.split == "test" for work in ordered]
    assert tests == sorted(tests, reverse=True)
    for work in ordered:
        assert work.items == work.shard.samples * (1 + 4 * 3 if work.split == "test" else 1)
    same = longest_first([work for work in plan.shard_work if work.split == "train"])
    assert [work.name for work in same if work.items == same[0].items] == [
        work.name for work in plan.shard_work if work.split == "train" and work.items == same[0].items
    ]


# --- an encoder that knows patches alone --------------------------------------------------------------------------------


class BagOfWords:
    """The token of a patch of 8 × 8 pixels depends on its pixels alone, not on its surroundings or place; the image is the mean of the tokens."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 12, CELL, stride=CELL), nn.GELU(), nn.Conv2d(12, 6, 1)).eval()
        self.info = EncoderInfo(
            name="bag of words",
            family="planted",
            architecture="bag of words",
            source="drawn at random",
            weights_sha256="-",
            params=0,
            embed_dim=6,
            block_dims=(6,),
            grid=(CELLS, CELLS),
            has_cls=False,
            registers=0,
            projection_dim=None,
            positions="none",
            preprocessing=Preprocessing(size=(CELLS * CELL, CELLS * CELL), resize=CELLS * CELL),
        )

    def encode(
        self,
        images: torch.Tensor,
        *,
        blocks: Sequence[int] = (),
        projection: bool = False,
        keep: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> Tokens:
        return Tokens(cls=None, patches=self.module(images).permute(0, 2, 3, 1))


class Neighbourly(BagOfWords):
    """The same, but every patch also contains the mean of all patches."""

    def encode(self, images: torch.Tensor, **how: Any) -> Tokens:  # type: ignore[override]
        patches = super().encode(images, **how).patches
        return Tokens(cls=None, patches=patches * torch.cos(5 * patches.std(dim=(1, 2), keepdim=True)))


def tiled(rng: np.random.Generator, key: str, index: int) -> list[tuple[str, bytes]]:
    """An image of 4 × 4 cells of one colour each: no cell changes when it is enlarged."""
    colours = rng.integers(0, 256, (CELLS, CELLS, 3)).astype(np.uint8)
    colours[..., index % 2] //= 2  # the class, faintly
    image = colours.repeat(CELL, axis=0).repeat(CELL, axis=1)
    return [(f"{key}.png", tiny.encode(image, "PNG")), (f"{key}.json", json.dumps({"label": index % 2}).encode())]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set `tiles`: labels and no parts."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    splits = {
        split: {
            "samples": count,
            "shards": [tiny.write_tar(root / "tiles" / f"{split}.tar", [tiled(rng, f"{split}-{index:03d}", index) for index in range(count)])],
        }
        for split, count in {"train": 40, "val": 12, "test": 20}.items()
    }
    about = {"schema": 1, "dataset": "tiles", "version": "1", "license": "CC0-1.0", "source": "drawn by the tests", "classes": ["a", "b"]}
    (root / "tiles" / "manifest.json").write_text(json.dumps({**about, "parts": [], "annotations": ["label"], "splits": splits}))
    return root


class Walk(here.World):
    """From tars to the score of one task, in one process."""

    def __init__(self, shards: Path, cache: Path, encoder: Encoder) -> None:
        super().__init__(shards=shards, cache=cache)
        self.encoder = encoder
        self.encoded: list[str] = []
        """The encoded views of the test split."""

    def points(self, name: str, **overrides: Any) -> dict[int, Score]:
        """Bag size → score (0 for tasks without bags)."""
        return {
            dict(study.task.protocol.fields).get("bag_size", 0): score for study, score in self.scores(self.encoder, f"tiles/{name}", **overrides)
        }

    def encode(self, encoder: Encoder, plan: Plan) -> Accounts:
        missing = plan.missing(BankStore(str(self.cache)))
        self.encoded += [view_pass.view.identity for work in missing if work.split == "test" for view_pass in work.passes]
        return super().encode(encoder, plan)


def values(score: Score) -> Mapping[str, float | None]:
    return {value.metric: value.value for value in score.values}


@pytest.fixture(scope="module")
def walk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(shards, tmp_path_factory.mktemp("words"), BagOfWords())


GRID: dict[str, Any] = {"patches": CELLS**2, "patch_sides": [224 / CELLS], "placement": "grid", "draws": 1, "frame": 1.0, "bag_sizes": [1, 4, 16]}


def test_a_bag_of_words_converges_to_the_whole_image_at_the_full_grid(walk: Walk) -> None:
    scores = walk.points("bag-convergence", **GRID)
    full = values(scores[16])
    assert full["cosine"] == pytest.approx(1, abs=1e-6)
    assert full["relative_distance"] == pytest.approx(0, abs=1e-6)
    assert full["relative_distance_floor"] > 0.05  # type: ignore[operator]
    distances = [values(scores[size])["relative_distance"] for size in (1, 4, 16)]
    assert distances == sorted(distances, reverse=True)  # type: ignore[type-var]
    assert distances[1] > 0.05  # type: ignore[operator]


def test_an_encoder_whose_patches_know_of_each_other_does_not(shards: Path, tmp_path: Path) -> None:
    scores = Walk(shards, tmp_path, Neighbourly()).points("bag-convergence", **GRID)
    assert values(scores[16])["relative_distance"] > 1e-2  # type: ignore[operator]


@pytest.mark.parametrize("name", ["bag-knn", "bag-linear"])
def test_the_whole_image_in_place_of_a_bag_is_the_whole_image_exactly(walk: Walk, name: str) -> None:
    object_task = name.replace("bag", "object")
    same = {"epochs": 5, "batch_size": 16, "weight_decay": 0.0} if name == "bag-linear" else {}
    ((_, whole),) = walk.points(object_task, readouts=("mean",), **same).items()
    before = list(walk.encoded)
    none = walk.points(name, bag_sizes=[0], **same)
    full = walk.points(name, patch_area=1.0, bag_sizes=[1], patches=1, **same)
    for score in (none[0], full[1]):
        assert score.predictions == whole.predictions
        for value, expected in zip(score.values[:2], whole.values, strict=True):
            assert value == expected
        assert score.values[2].reason == "the spread over draws needs at least two of them"
    assert walk.encoded == before, "the bank is that of the whole images"


def test_draws_are_rows_and_their_spread_is_told(walk: Walk) -> None:
    for score in walk.points("bag-knn", **{**SMALL, "bag_sizes": [1, 4]}).values():
        table = score.predictions
        assert len(table["key"]) == 2 * 20 == score.n
        assert set(table["key"]) == {f"test-{index:03d}#{draw}" for index in range(20) for draw in range(2)}
        assert len(set(table["group"])) == 20
        right = np.array(table["prediction"]) == np.array(table["target"])
        assert values(score)["accuracy"] == pytest.approx(right.mean())
        assert values(score)["accuracy_sd"] == pytest.approx(np.std([right[:20].mean(), right[20:].mean()], ddof=1))


def test_one_pass_gives_every_bag_size(shards: Path, tmp_path: Path) -> None:
    once = Walk(shards, tmp_path, BagOfWords())
    for name in BAG_TASKS:
        once.points(name, epochs=2, **SMALL)
    assert sorted(once.encoded) == sorted({Whole().identity, Bag(patches=4, side=112, draws=2).identity})


def test_neighbours_of_tiles_are_kept_for_the_gallery(walk: Walk) -> None:
    (score,) = walk.points("patch-locality", grid=2, frame=1.0).values()
    by_metric = values(score)
    assert by_metric["same_image_chance"] == pytest.approx(3 / 79)
    assert by_metric["same_part"] is None
    assert 0 <= by_metric["same_class"] <= 1  # type: ignore[operator]
    assert score.n == 80
    assert len(score.neighbours) == 64 * 10
    assert {row["rank"] for row in score.neighbours} == set(range(1, 11))
    assert not [row for row in score.neighbours if row["query"] == row["neighbour"]]


# --- by command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_over_bags_and_locality(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards")
    tasks = [f"tiny/{name}" for name in ("object-knn", *BAG_TASKS, "patch-locality")]
    overrides = {"epochs": 5, "gallery": "whole", "readouts": ["cls"], **SMALL}
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(tmp_path / "shards", tasks=tasks, protocol=overrides))
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 0
    rows = read_table(tmp_path / "out" / "results.parquet")
    by_result = {(row["task"], row["protocol"], row["metric"]): row for row in rows}
    whole = by_result["tiny/object-knn", "dino", "accuracy"]
    bag = by_result["tiny/bag-knn", "embedding[bag_size=0]", "accuracy"]
    assert [bag[column] for column in ("value", "ci_low", "ci_high", "n")] == [whole[column] for column in ("value", "ci_low", "ci_high", "n")]
    for size in (1, 4):
        assert 0 <= by_result["tiny/bag-linear", f"embedding[bag_size={size}]", "accuracy_sd"]["value"] < 1
        row = by_result["tiny/bag-convergence", f"embedding[bag_size={size}]", "cosine"]
        assert (row["status"], row["selected_on"]) == ("ok", "nothing")
        assert row["ci_low"] < row["value"] < row["ci_high"] <= 1
    assert {row["status"] for row in rows if row["task"] == "tiny/patch-locality"} == {"ok"}
    assert by_result["tiny/bag-knn", "embedding[bag_size=0]", "accuracy_sd"]["status"] == "undefined"
    spread = sum(row["task"] == "tiny/bag-knn" and row["protocol"] == "embedding[bag_size=4]" for row in rows)
    assert spread == 3
