"""The tasks of Zhu et al. on their data sets: parts, crops, readouts, and the patterns that match them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import load_sweep
from harness.core import EncoderInfo, Keypoint, Preprocessing, Rows, Sample, Task, Tokens
from harness.data.manifest import Manifest
from harness.errors import RequestError
from harness.features.readouts import parse_readout, read, unavailable
from harness.plan.plan import Plan, make_plan
from harness.probes import probe
from harness.probes.linear import LinearFields
from harness.probes.lowshot import LowShotFields, low_shot
from harness.probes.retrieval import GalleryFields
from harness.search import steps
from harness.search.state import StudyState
from harness.search.study import Study
from harness.tasks import select, templates
from harness.tasks.parts import PatchFields
from tests.helpers import tiny

CPU = torch.device("cpu")
CUB_PARTS = ("beak", "left eye", "left wing", "right eye", "right leg", "tail")
COCO_PARTS = ("nose", "left_eye", "right_wrist", "left_knee", "left_ankle")
"""Some names of parts in these data sets."""
HEAVY = ("object-attentive", "part-attentive", "object-logistic", "part-logistic", "object-lowshot")


DATA_SETS = {CUB_PARTS: "cub", COCO_PARTS: "coco_keypoints"}


def manifest(
    parts: tuple[str, ...] = CUB_PARTS, annotations: tuple[str, ...] = ("label", "keypoints"), dataset: str | None = None, **fields: Any
) -> Manifest:
    """The manifest of the data set with these parts, or of `dataset`."""
    return Manifest.model_validate(
        {
            "schema": 1,
            "dataset": dataset or DATA_SETS.get(parts, "any"),
            "version": "1",
            "license": "-",
            "source": "-",
            "classes": ("a", "b"),
            "parts": parts,
            "annotations": annotations,
            "splits": {"test": {"samples": 0, "shards": ()}},
            **fields,
        }
    )


def task(of: tuple[str, ...], name: str, protocol: str | None = None, **overrides: Any) -> Task:
    (chosen,) = templates(manifest(of))[name].tasks(manifest(of), protocol, overrides)
    return chosen


# --- parts and crops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (CUB_PARTS, ("right eye", "right leg", "left wing", "tail")),
        (COCO_PARTS, ("nose", "right_wrist", "left_ankle")),
        (("head", "tail", "eye"), ("head", "tail", "eye")),
    ],
)
def test_the_published_parts_are_the_classes_where_a_data_set_has_them(parts: tuple[str, ...], expected: tuple[str, ...]) -> None:
    for name in ("part-retrieval", "part-linear", "part-knn", "part-attentive", "part-logistic"):
        assert task(parts, name).classes == expected


@pytest.mark.parametrize("parts", [CUB_PARTS, COCO_PARTS, ("head", "body", "foot", "tail", "eye"), ("nose", "right_wrist", "left_ankle")])
def test_parts_that_are_merely_called_so_are_of_no_published_data_set(parts: tuple[str, ...]) -> None:
    renamed = tuple(f"its {part}" for part in parts)
    for dataset in ("mine", "cub2", "my_coco_keypoints", "CUB"):
        named, other = (templates(manifest(names, dataset=dataset)) for names in (parts, renamed))
        for name, template in named.items():
            for protocol, fields in template.protocols.items():
                if isinstance(fields, PatchFields):
                    assert fields.parts == parts, f"{dataset}: {name}@{protocol}"
                    fields = fields.replaced(parts=renamed)
                assert fields == other[name].protocols[protocol]


def test_a_data_set_of_a_published_name_with_other_parts_takes_all_of_its_own() -> None:
    for dataset in ("cub", "coco_keypoints", "stamps"):
        fields = templates(manifest(("wheel", "door"), dataset=dataset))["part-linear"].protocols["zhu2023"]
        assert (fields.parts, fields.min_parts, fields.train_fit) == (("wheel", "door"), 1, "resize")


def test_the_embedded_sample_leaves_the_eye_out_of_its_classes() -> None:
    parts = ("head", "body", "foot", "tail", "eye")
    assert templates(manifest(parts, dataset="stamps"))["part-knn"].protocols["dino"].parts == parts[:-1]


def test_levels_are_of_labels_even_where_parts_are_called_as_classes_are() -> None:
    same = manifest(("a", "b"), levels={"coarse": (0, 0)})
    named = {
        name: [metric.name for chosen in template.tasks(same, None, {}) for metric in chosen.metrics] for name, template in templates(same).items()
    }
    assert "accuracy@coarse" in named["object-linear"]
    assert not any("@" in metric for name, metrics in named.items() if name.startswith("part-") for metric in metrics)


@pytest.mark.parametrize(
    ("dataset", "crop"),
    [
        ("ade20k", 512),
        ("ade20k_object", 512),
        ("pascal_part", 480),
        ("pascal_parts", 480),
        ("pascal_object", 480),
        ("lip", 320),
        ("lipstick", 512),
        ("pascalized", 512),
        ("mine", 512),
    ],
)
def test_sizes_of_segmentation_go_by_the_whole_name(dataset: str, crop: int) -> None:
    segmented = manifest((), ("part",), dataset, mask_classes={"part": ("background", "a", "b")})
    fields = templates(segmented)["part-segmentation-streamed"].protocols["release"]
    assert fields.crop == crop
    assert fields.stride == (341 if crop == 512 else 161)


def sides(of: Task, *keypoints: tuple[str, float, float, int]) -> dict[str, int]:
    """Side in pixels of every patch of an image of 600 × 600."""
    points = tuple(Keypoint(part=part, x=x, y=y, instance=instance) for part, x, y, instance in keypoints)
    return {item.key: item.image.shape[0] for item in of.view(Sample(key="a", image=np.zeros((600, 600, 3), np.uint8), keypoints=points))}


BIRD = (("right eye", 100, 100, 0), ("beak", 88, 100, 0), ("tail", 300, 100, 0), ("left wing", 330, 100, 0))


def test_crops_of_birds() -> None:
    # the paper measures to the beak as well, 12 away; the release does not, takes half of it and leaves out what is 30 away
    assert sides(task(CUB_PARTS, "part-retrieval", "paper"), *BIRD) == {"a#0:right eye": 12, "a#1:tail": 30, "a#2:left wing": 30}
    assert sides(task(CUB_PARTS, "part-retrieval", "release"), *BIRD) == {"a#0:right eye": 100}
    both = task(CUB_PARTS, "part-retrieval", "release", min_distance=0.0)
    assert sides(both, *BIRD) == {"a#0:right eye": 100, "a#1:tail": 16, "a#2:left wing": 16}
    assert sides(task(CUB_PARTS, "part-retrieval", "paper", crop_neighbours="selected"), *BIRD)["a#0:right eye"] == 200


PERSONS = (("nose", 100, 100, 0), ("left_eye", 110, 90, 0), ("right_wrist", 100, 200, 0), ("nose", 100, 260, 1), ("left_knee", 100, 290, 1))


def test_crops_of_persons() -> None:
    # the second person shows one of the three parts and gives no patch; its knee and nose are neighbours in the paper, not in the release
    eye = round(200**0.5)
    assert sides(task(COCO_PARTS, "part-retrieval", "paper"), *PERSONS) == {"a#0:nose": eye, "a#1:right_wrist": 60}
    assert sides(task(COCO_PARTS, "part-retrieval", "release"), *PERSONS) == {"a#0:nose": 50, "a#1:right_wrist": 50}
    alone = task(COCO_PARTS, "part-retrieval", "paper", min_parts_within="image")
    assert set(sides(alone, *PERSONS)) == {"a#0:nose", "a#1:right_wrist", "a#2:nose"}


@pytest.mark.parametrize("parts", [CUB_PARTS, COCO_PARTS, tiny.PARTS])
def test_every_open_choice_is_a_field_of_every_protocol(parts: tuple[str, ...]) -> None:
    choices = {
        "parts",
        "crop_side",
        "crop_rounding",
        "crop_neighbours",
        "neighbours_within",
        "min_distance",
        "max_distance",
        "min_parts",
        "min_parts_within",
    }
    for name, template in templates(manifest(parts)).items():
        if not name.startswith("part-"):
            continue
        for fields in template.protocols.values():
            assert choices | {"readouts"} <= set(dict(fields))
            assert isinstance(fields, GalleryFields) == (name == "part-retrieval")


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_neighbours": "al"},
        {"neighbours_within": "person"},
        {"min_parts_within": "box"},
        {"crop_side": 0.0},
        {"crop_rounding": "quarter"},
        {"min_distance": -1.0},
        {"min_parts": 0},
        {"parts": ["nose", "nosee"]},
    ],
)
def test_crops_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(wrong))}.*got|nosee"):
        task(COCO_PARTS, "part-retrieval", **wrong)


# --- readouts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "name", "pool"),
    [(CUB_PARTS, "object-retrieval", "test"), (CUB_PARTS, "part-retrieval", "all"), (COCO_PARTS, "part-retrieval", "train")],
)
def test_every_gallery_has_each_readout_alone(parts: tuple[str, ...], name: str, pool: str) -> None:
    protocols = templates(manifest(parts))[name].protocols
    assert next(iter(protocols)) == "strict"
    for gallery, exclude in (("strict", "image"), ("paper", "query"), ("release", "none")):
        for readout in ("cls", "mean", "projection"):
            # where nothing is chosen, the published splits are scored; strict keeps to test
            scored = "test" if gallery == "strict" else pool
            assert protocols[f"{gallery}-{readout}"] == protocols[gallery].replaced(readouts=(readout,), pool=scored)
            assert (protocols[gallery].exclude, protocols[gallery].pool) == (exclude, "test")


def info(has_cls: bool = True) -> EncoderInfo:
    return EncoderInfo(
        name="any",
        family="any",
        architecture="any",
        source="-",
        weights_sha256="-",
        params=0,
        embed_dim=5,
        block_dims=(5, 5),
        grid=(2, 3),
        has_cls=has_cls,
        registers=2,
        projection_dim=None,
        positions="none",
        preprocessing=Preprocessing(size=(4, 6), resize=4),
    )


@pytest.mark.parametrize("has_cls", [True, False])
def test_all_tokens_are_the_cls_and_the_grid_row_by_row(has_cls: bool) -> None:
    def tokens() -> Tokens:
        patches = torch.randn(4, 2, 3, 5)
        return Tokens(cls=torch.randn(4, 5) if has_cls else None, patches=patches, registers=torch.randn(4, 2, 5))

    given, block = tokens(), tokens()
    given = Tokens(cls=given.cls, patches=given.patches, registers=given.registers, blocks={1: block})
    for text, source in (("all", given), ("all@-1", block)):
        readout = parse_readout(text)
        assert unavailable(readout, info(has_cls)) is None
        rows = read(given, readout, info(has_cls))
        assert rows.shape == (4, 6 + has_cls, 5)
        assert torch.equal(rows[:, has_cls:].view(4, 2, 3, 5), source.patches)
        if source.cls is not None:
            assert torch.equal(rows[:, 0], source.cls)
    assert parse_readout("all").is_dense, "kept in half precision, as all token grids are"
    assert not parse_readout("all").has_masks


# --- what patterns catch ------------------------------------------------------------------------------------------------------


def test_heavy_tasks_are_asked_for_by_their_own_word(tmp_path: Path) -> None:
    tiny.build(tmp_path, splits={"train": 3, "test": 3})

    def names(*patterns: str) -> set[str]:
        return {chosen.name.removeprefix("tiny/") for chosen in select([f"tiny/{pattern}" for pattern in patterns], str(tmp_path), {})[0]}

    assert not names("*", "object-*", "part-*") & set(HEAVY)
    assert names("*-attentive") == {"object-attentive", "part-attentive"}
    assert names("*logistic", "object-lowshot@5-shot") == {"object-logistic", "part-logistic", "object-lowshot"}


def test_data_sets_without_parts_or_labels_have_no_such_tasks() -> None:
    assert {"object-attentive", "object-logistic", "object-lowshot"} <= set(templates(manifest(annotations=("label",))))
    assert not any(name.startswith("part-") for name in templates(manifest(annotations=("label",))))
    assert not any(name.startswith("object-") for name in templates(manifest(COCO_PARTS, annotations=("boxes", "keypoints"))))


# --- numbers of the probes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["object-linear", "part-linear", "object-attentive", "part-attentive"])
def test_training_is_as_published(name: str) -> None:
    for protocol, fields in templates(manifest(CUB_PARTS))[name].protocols.items():
        published = {"epochs": 90, "batch_size": 1024, "momentum": 0.9, "weight_decay": 0.0, "init_std": 0.01}
        assert {key: value for key, value in fields if key in published} == published
        if "attentive" in name:
            assert (fields.readouts, fields.attention_heads) == (("all",), 12)
            statistics = ("batch", 256) if protocol in ("release", "release-statistics", "published-release") else ("running", fields.bn_batch)
            assert (fields.bn_eval, fields.bn_batch) == statistics
            how = ("epoch", 1e-5, "trunc-normal") if protocol in ("release", "published-release") else ("step", 1e-6, "xavier")
            assert (fields.anneal, fields.bn_eps, fields.init) == how
        else:
            assert fields.anneal == ("epoch" if protocol in ("release", "published-release") else "step")


@pytest.mark.parametrize(("name", "rate"), [("linear", 0.4), ("attentive", 0.04)])
def test_the_published_rate_is_a_protocol_of_its_own(name: str, rate: float) -> None:
    for level in ("object", "part"):
        protocols = templates(manifest(CUB_PARTS))[f"{level}-{name}"].protocols
        assert protocols["published"].lr_bounds == (rate, rate)
        assert len(protocols["published"].readouts) == 1
        assert protocols["zhu2023"].lr_bounds is None, "searched, within the sweep's bounds"
        assert protocols["zhu2023"].replaced(lr_bounds=[1e-3, 1.0]).lr_bounds == (1e-3, 1.0)
        for wrong in ([1.0, 1e-3], [0.0, 1.0], 0.4, [0.1, 0.2, 0.3]):
            with pytest.raises(RequestError, match="lr_bounds"):
                protocols["zhu2023"].replaced(lr_bounds=wrong)


def test_one_rate_is_tried_once(tmp_path: Path) -> None:
    study = Study(
        name="any",
        probe="linear",
        metrics=("accuracy",),
        classes=2,
        protocol=LinearFields(lr_bounds=(0.4, 0.4)),
        readouts=("cls", "mean"),
        train={},
        val={},
        holds_out=False,
        trials=4,
        stack=8,
        lr=(1e-3, 10.0),
        seed=0,
        contents="",
    )
    state = StudyState(study=study, test={})
    assert state.planned_rounds == 1
    step = state.next_step()
    assert isinstance(step, steps.Fit)
    assert (step.round, step.proposals) == (0, (("cls", pytest.approx(0.4)), ("mean", pytest.approx(0.4))))
    assert StudyState(study=replace(study, protocol=LinearFields()), test={}).planned_rounds == 4


@pytest.mark.parametrize("name", ["part-linear", "part-attentive"])
def test_published_classifiers_are_trained_on_the_centre_of_their_patches(name: str) -> None:
    trained = task(CUB_PARTS, name)
    assert trained.train_view is not None
    assert (trained.train_view.fit, trained.view.fit) == ("crop", "resize")
    assert trained.train_view.identity != trained.view.identity
    assert task(CUB_PARTS, name, train_fit="resize").train_view is None
    assert task(tiny.PARTS, name).train_view is None
    with pytest.raises(RequestError, match="train_fit: expected 'crop' or 'resize', got 'crops'; did you mean 'crop'"):
        task(CUB_PARTS, name, train_fit="crops")


# --- what is retrieved among ----------------------------------------------------------------------------------------------------


def planned(tmp_path: Path, *tasks: str, splits: dict[str, int], **protocol: Any) -> Plan:
    tiny.build(tmp_path, splits=splits)
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(tmp_path, tasks=list(tasks), protocol=protocol))
    return make_plan(load_sweep(str(tmp_path / "sweep.yaml"), []), tmp_path, "cpu", "float32")


@pytest.mark.parametrize(
    ("pool", "splits", "expected"),
    [
        ("test", ("train", "val", "test"), "test"),
        ("train", ("train", "val", "test"), "train"),
        ("all", ("train", "val", "test"), "test+train+val"),
        ("all", ("train", "test"), "test+train"),
    ],
)
def test_a_pool_reads_its_splits_and_nothing_else(tmp_path: Path, pool: str, splits: tuple[str, ...], expected: str) -> None:
    plan = planned(tmp_path, "tiny/part-retrieval@paper-cls", splits=dict.fromkeys(splits, 3), pool=pool)
    (study,) = plan.studies
    assert (study.split, study.selected_on) == (expected, "nothing")
    assert sorted(bank.split for bank in study.specs) == sorted(expected.split("+"))
    assert sorted(work.split for work in plan.shard_work) == sorted(expected.split("+"))


@pytest.mark.parametrize(("pool", "splits"), [("all", ("train", "test")), ("train", ("train", "test")), ("all", ("train", "val", "test"))])
def test_readouts_are_not_chosen_on_what_is_scored(tmp_path: Path, pool: str, splits: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match="expected one readout where the pool has the split that readouts are chosen on"):
        planned(tmp_path, "tiny/part-retrieval@paper", splits=dict.fromkeys(splits, 3), pool=pool)


def test_train_may_be_scored_where_readouts_are_chosen_on_val(tmp_path: Path) -> None:
    plan = planned(tmp_path, "tiny/object-retrieval", splits={"train": 3, "val": 3, "test": 3}, pool="train")
    assert (plan.studies[0].split, plan.studies[0].selected_on) == ("train", "val")


# --- low shot -----------------------------------------------------------------------------------------------------------------


def blobs(n: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 4, n)
    features = (rng.standard_normal((n, 6)) + 2 * np.eye(4, 6)[targets]).astype(np.float32)
    return Rows(keys=[f"k{i}" for i in range(n)], groups=[f"g{i}" for i in range(n)], targets=targets, features=features)


@pytest.mark.parametrize("protocol", ["1-percent", "10-percent", "1-shot", "5-shot", "10-shot"])
def test_low_shot_is_logistic_regression_on_the_few_rows(protocol: str) -> None:
    fields = templates(manifest())["object-lowshot"].protocols[protocol]
    train, test = blobs(400), blobs(200, seed=1)
    few = low_shot(train, share=fields.share, shots=fields.shots, seed=7)
    counts = np.bincount(train.targets)
    drawn = {"1-percent": np.maximum(1, (counts / 100).round()), "10-percent": (counts / 10).round(), "1-shot": 1, "5-shot": 5, "10-shot": 10}
    assert np.bincount(few.targets).tolist() == (np.ones(4) * drawn[protocol]).tolist()
    how: dict[str, Any] = {"classes": 4, "seed": 7, "device": CPU}
    stack = probe("lowshot").fit(train, [0.1, 1.0], protocol=fields, **how)
    expected = probe("logistic").fit(few, [0.1, 1.0], protocol=fields, **how)
    for head in range(2):
        np.testing.assert_array_equal(stack.predict(test, head).scores, expected.predict(test, head).scores)
        again = probe("lowshot").restore(stack.state(head), None, protocol=fields, **how)
        np.testing.assert_array_equal(again.predict(test, 0).predictions, stack.predict(test, head).predictions)


@pytest.mark.parametrize(
    "wrong", [{"share": 0.1, "shots": 3}, {"share": None, "shots": None}, {"share": 0.0}, {"share": 1.5}, {"share": None, "shots": 0}]
)
def test_low_shot_takes_a_share_or_shots(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"protocol(\.share|\.shots)?: expected"):
        LowShotFields().replaced(**wrong)
