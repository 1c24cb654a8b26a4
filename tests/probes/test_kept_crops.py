"""Banks that keep random crops of every train image: which crops, which of them an epoch trains on, and the images that heads are chosen on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import load_sweep
from harness.core import Preprocessing, Rows, Sample
from harness.data.augment import CropAndFlip, draw
from harness.data.preprocess import prepare
from harness.data.views.augmented import RandomCrops
from harness.data.views.whole import Whole
from harness.encoders import load
from harness.errors import ProbeError, RequestError
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type
from harness.features.extract import Extractor
from harness.features.rows import hold_out
from harness.plan.plan import Plan, make_plan
from harness.plan.roles import HELD_OUT, view_of
from harness.probes import attentive, linear, mlp
from harness.probes.lib.features import batch_order
from harness.results.tables import read_table
from harness.search import build
from harness.search.accounts import Accounts
from harness.search.bank_feed import BankFeed
from harness.search.runner import Runner
from harness.search.state import StudyState
from harness.sweep import main
from harness.tasks import select
from harness.tasks.attentive import ObjectAttentive
from harness.tasks.mlp import ObjectMLP
from harness.tasks.objects import ObjectLinear
from tests.helpers import tiny

torch.set_num_threads(1)
CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(size=(32, 32), resize=36)


def sample(key: str = "a", seed: int = 0, **fields: Any) -> Sample:
    small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = small.repeat(10, axis=0).repeat(10, axis=1)
    return Sample(key=key, image=image, label=1, object_mask=np.ones((60, 90), np.uint8), **fields)


# --- the view ---------------------------------------------------------------------------------------------------------


def test_a_kept_crop_is_the_crop_of_that_epoch_of_a_stream() -> None:
    augment, flips = CropAndFlip(scale=(0.2, 0.9)), 0
    for index, item in enumerate(RandomCrops(count=12, augment=augment, seed=3)(sample())):
        streamed = augment(sample().image, PREPROCESSING, draw(3, index, "a"))
        crop = prepare(item.image, PREPROCESSING, "resize")
        _, flipped = augment.drawn(60, 90, draw(3, index, "a"))
        flips += flipped
        # resizing rounds to 8 bits, and a mirrored image's rounding is not the mirrored rounding
        level = 1.01 / 255 / min(PREPROCESSING.std)
        assert torch.equal(crop, streamed) if not flipped else (crop - streamed).abs().max() <= level
    assert 0 < flips < 12


def test_crops_are_a_function_of_seed_key_and_number_alone() -> None:
    def images(view: RandomCrops, key: str = "a") -> list[bytes]:
        return [item.image.tobytes() for item in view(sample(key))]

    first = images(RandomCrops(count=3))
    assert images(RandomCrops(count=5))[:3] == first == images(RandomCrops(count=3))
    assert len(set(first)) == 3
    assert not set(first) & set(images(RandomCrops(count=3, seed=1)))
    assert not set(first) & set(images(RandomCrops(count=3), key="b"))


def test_crops_carry_label_and_group_and_no_label_maps() -> None:
    items = RandomCrops(count=2)(sample(group="photograph"))
    assert [(item.key, item.group, item.target, dict(item.masks)) for item in items] == [(f"a#{v}", "photograph", 1, {}) for v in (0, 1)]


def test_every_parameter_is_in_the_identity() -> None:
    views = [
        RandomCrops(count=2),
        RandomCrops(count=3),
        RandomCrops(count=2, seed=1),
        RandomCrops(count=2, augment=CropAndFlip(scale=(0.1, 1.0))),
        RandomCrops(count=2, augment=CropAndFlip(flip=0.0)),
        RandomCrops(count=2, augment=CropAndFlip(ratio=(1.0, 1.0))),
    ]
    assert len({view.identity for view in views}) == len(views)


def test_no_crop_at_all_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one, got 0"):
        RandomCrops(count=0)


# --- the probes -------------------------------------------------------------------------------------------------------


def rows_of(images: int, views: int, *, width: Sequence[int] = (8,), same: bool = False) -> Rows:
    """`views` crops of each image; `same` makes them equal. Without views, the uncropped images."""
    generator = np.random.default_rng(0)
    plain = generator.standard_normal((images, *width), dtype=np.float32)
    crops = np.repeat(plain, max(views, 1), axis=0)
    if not same:
        crops = crops + generator.standard_normal(crops.shape, dtype=np.float32) / 4
    groups = [f"{index:03d}" for index in range(images) for _ in range(max(views, 1))]
    keys = [f"{group}#{place % views}" if views else group for place, group in enumerate(groups)]
    return Rows(keys=keys, groups=groups, targets=np.repeat(np.arange(images) % 3, max(views, 1)), features=crops)


PROTOCOLS: dict[str, Any] = {"linear": ObjectLinear, "attentive": ObjectAttentive, "mlp": ObjectMLP}


def how(probe: str, **protocol: Any) -> dict[str, Any]:
    heads = {"attention_heads": 2} if probe == "attentive" else {}
    fields = PROTOCOLS[probe](epochs=5, batch_size=8, **heads, **protocol)
    return {"classes": 3, "protocol": fields, "seed": 0, "device": CPU}


PROBES = [(linear, (8,)), (attentive, (5, 8)), (mlp, (8,))]


@pytest.mark.parametrize(("module", "width"), PROBES)
def test_crops_that_are_all_alike_train_the_probe_of_the_images_to_the_bit(module: Any, width: Sequence[int]) -> None:
    plain = module.PROBE.fit(rows_of(20, 0, width=width, same=True), [0.1, 1.0], **how(module.PROBE.name))
    cropped = module.PROBE.fit(rows_of(20, 3, width=width, same=True), [0.1, 1.0], **how(module.PROBE.name, train_views=3))
    for head in (0, 1):
        assert all(torch.equal(tensor, plain.state(head)[name]) for name, tensor in cropped.state(head).items())


@pytest.mark.parametrize(("module", "width"), PROBES)
def test_a_head_on_crops_is_as_it_would_have_been_alone(module: Any, width: Sequence[int]) -> None:
    rows, rates = rows_of(20, 2, width=width), [0.01, 0.1, 1.0]
    stack = module.PROBE.fit(rows, rates, **how(module.PROBE.name, train_views=2))
    for number, rate in enumerate(rates):
        alone = module.PROBE.fit(rows, [rate], **how(module.PROBE.name, train_views=2))
        assert all(torch.equal(tensor, stack.state(number)[name]) for name, tensor in alone.state(0).items())


def test_an_epoch_takes_one_crop_of_every_image_and_the_next_epoch_its_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, batches, step = rows_of(20, 3), list[torch.Tensor](), linear.LinearHead.step

    def noting(self: linear.LinearHead, batch: torch.Tensor, target: torch.Tensor, lr: float, seeds: tuple[int, int]) -> None:
        batches.append(batch)
        step(self, batch, target, lr, seeds)

    monkeypatch.setattr(linear.LinearHead, "step", noting)
    linear.PROBE.fit(rows, [0.1], **how("linear", train_views=3))
    assert len(batches) == 5 * 3  # an epoch has as many steps as there are images to fill
    places = {feature.tobytes(): place for place, feature in enumerate(rows.features)}
    generator = torch.Generator().manual_seed(0)
    torch.empty(3, 8).normal_(0, 0.01, generator=generator)
    for epoch in range(5):
        seen = [places[feature.numpy().tobytes()] for batch in batches[3 * epoch : 3 * epoch + 3] for feature in batch]
        order = torch.cat(list(batch_order(20, 8, generator))).tolist()
        assert seen == [3 * image + epoch % 3 for image in order]


@pytest.mark.parametrize("module", [linear, attentive, mlp])
def test_rows_that_are_not_that_many_crops_of_each_image_are_refused(module: Any) -> None:
    width = dict(PROBES)[module]
    for rows, views in ((rows_of(6, 2, width=width), 3), (rows_of(6, 4, width=width), 2), (rows_of(6, 0, width=width), 1)):
        with pytest.raises(ProbeError, match=f"expected {views} crops of each image"):
            module.PROBE.fit(rows, [0.1], **how(module.PROBE.name, train_views=views))
    cut = rows_of(6, 3, width=width)
    cut = Rows(keys=cut.keys[:-1], groups=cut.groups[:-1], targets=cut.targets[:-1], features=cut.features[:-1])
    with pytest.raises(ProbeError, match="from row 17 on"):
        module.PROBE.fit(cut, [0.1], **how(module.PROBE.name, train_views=3))


def test_what_is_held_out_are_whole_images_the_same_whether_cropped_or_not() -> None:
    train, held = hold_out(rows_of(40, 3), seed=5)
    _, plain = hold_out(rows_of(40, 0), seed=5)
    assert list(dict.fromkeys(held.groups)) == list(plain.groups)
    assert len(held) == 3 * len(plain)
    linear.PROBE.fit(train, [0.1], **how("linear", train_views=3))  # what is left is still three crops of each image


# --- the task ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kept")
    tiny.build(root)
    tiny.build(root, name="noval", splits={"train": 40, "test": 12})
    return root


def text_of(root: Path, tasks: Sequence[str], **protocol: Any) -> str:
    return tiny.sweep_text(root, tasks=list(tasks), protocol={"epochs": 20, "batch_size": 12, "attention_heads": 4, **protocol})


def plan_of(root: Path, folder: Path, tasks: Sequence[str], **protocol: Any) -> Plan:
    (folder / "sweep.yaml").write_text(text_of(root, tasks, **protocol))
    return make_plan(load_sweep(folder / "sweep.yaml"), folder, device_type(False), "float32")


def state_of(plan: Plan, cache: Path) -> StudyState:
    """The plan's only study, with its banks encoded."""
    store = BankStore(str(cache))
    encoders = {name: load(spec) for name, spec in plan.encoders.items()}
    extractor = Extractor(Compute("float32", False, 1), encoders.__getitem__, batch_size=8, decode_threads=1)
    for work in plan.missing(store):
        for bank, rows, receipt in extractor.run(work, node="here", attempts=1):
            store.write_part(bank, rows, receipt)
    state = build.state_of(plan, plan.studies[0], Accounts(plan, store, {}))
    assert state is not None
    return state


@pytest.mark.parametrize("task", ["object-linear", "object-attentive", "object-mlp"])
def test_only_train_is_cropped(data: Path, tmp_path: Path, task: str) -> None:
    (study,) = plan_of(data, tmp_path, [f"tiny/{task}"], train_views=2).studies
    assert set(study.banks) == {"train", "val", "test"}
    assert view_of(study.task, "train") == RandomCrops(count=2)
    assert view_of(study.task, "val") == view_of(study.task, "test") == Whole()
    (other,) = plan_of(data, tmp_path, [f"tiny/{task}"], train_views=2, crop_scale=[0.5, 1.0], flip=0.0, seed=4).studies
    assert view_of(other.task, "train") == RandomCrops(count=2, augment=CropAndFlip(scale=(0.5, 1.0), flip=0.0), seed=4)


@pytest.mark.parametrize("dataset", ["tiny", "noval"])
def test_without_crops_all_is_read_as_other_tasks_read_it(data: Path, tmp_path: Path, dataset: str) -> None:
    crops, neighbours = plan_of(data, tmp_path, [f"{dataset}/object-linear", f"{dataset}/object-knn"]).studies
    assert (crops.task.train_view, crops.task.val_view) == (None, None)
    assert set(crops.banks) == ({"train", "val", "test"} if dataset == "tiny" else {"train", "test"})
    assert {role: banks["cls"].key for role, banks in crops.banks.items()} == {role: banks["cls"].key for role, banks in neighbours.banks.items()}


@pytest.mark.parametrize(
    ("override", "message"), [({"train_views": -1}, "train_views"), ({"flip": 1.5}, "flip"), ({"crop_scale": [0.9, 0.1]}, "in order")]
)
def test_fields_that_cannot_be_are_refused(data: Path, override: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        select(["tiny/object-linear"], str(data), override)


@pytest.mark.parametrize(("task", "dataset"), [("object-linear", "tiny"), ("object-linear", "noval"), ("object-mlp", "tiny")])
def test_heads_are_trained_on_crops_and_chosen_on_other_images_as_they_are(data: Path, tmp_path: Path, task: str, dataset: str) -> None:
    best = {"epoch": "best"} if task == "object-mlp" else {}
    plan = plan_of(data, tmp_path, [f"{dataset}/{task}"], train_views=3, crop_scale=[0.5, 1.0], **best)
    state = state_of(plan, tmp_path / "cache")
    study, runner = state.study, Runner(str(tmp_path / "cache"), gpu=False, threads=1)
    feed = BankFeed(BankStore(str(tmp_path / "cache")), CPU)
    assert study.holds_out == (dataset == "noval") == (HELD_OUT in plan.studies[0].banks)
    trained, selection = feed.training_rows(study, "cls"), feed.selection_rows(study, "cls")
    assert trained is not None
    held = 0 if dataset == "tiny" else 3
    assert (len(trained), len(selection)) == ((36 * 3, 18) if dataset == "tiny" else ((40 - held) * 3, held))
    assert not set(trained.groups) & set(selection.groups)
    assert not any("#" in key for key in selection.keys)
    result = runner.run_round(study, 0, [("cls", 0.1), ("cls", 1.0)])
    assert [head.error for head in result.heads] == [None, None]
    assert all((head.epochs is not None) == bool(best) for head in result.heads)
    score = runner.score(study, max(result.heads, key=lambda head: head.value or 0.0), state.test["cls"])
    assert score.n == (24 if dataset == "tiny" else 12)
    value = score.values[0].value
    assert value is not None
    assert value > 0.6, "the classes are colours; chance is a third"


def test_the_same_study_without_crops_is_another_one(data: Path, tmp_path: Path) -> None:
    ids = {state_of(plan_of(data, tmp_path, ["tiny/object-linear"], train_views=views), tmp_path / "cache").study.id for views in (0, 1, 2)}
    assert len(ids) == 3


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["tiny", "noval"])
def test_the_command_on_a_data_set_whose_train_images_are_cropped_twice(data: Path, tmp_path: Path, dataset: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text_of(data, [f"{dataset}/object-linear", f"{dataset}/object-attentive"]))
    command = [str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--set", "protocol.train_views=2"]
    assert main([*command, "--dry-run"]) == 0
    assert main(command) == 0
    results = read_table(tmp_path / "out" / "results.parquet")
    assert {row["task"] for row in results} == {f"{dataset}/object-linear", f"{dataset}/object-attentive"}
    assert {row["status"] for row in results} == {"ok"}
    assert {json.loads(row["protocol_fields"])["train_views"] for row in results} == {2}
    assert {row["selected_on"] for row in results} == ({"val"} if dataset == "tiny" else {"train/10"})
    assert {row["view"] for row in results} == {"whole"}
    store = BankStore(str(tmp_path / "cache"))
    for study in plan_of(data, tmp_path, [f"{dataset}/object-linear", f"{dataset}/object-attentive"], train_views=2).studies:
        for role, banks in study.banks.items():
            for bank in banks.values():
                images = sum(samples for _, _, samples in bank.shards)
                keys = store.rows(bank).keys
                assert len(keys) == len(set(keys)) == images * (2 if role == "train" else 1)
