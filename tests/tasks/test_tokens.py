"""Tasks on dropped, misplaced and shuffled tokens: their plans, and the values of encoders with a known answer.

A picture of the planted data is 24 × 24 pixels in 6 × 6 cells of one colour each: red encodes the cell's row, green its column, blue the class, in
cells whose layout is the class's too. An encoder's tokens are those cells.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness.config import load_sweep
from harness.core import Encoder, EncoderInfo, PositionKind, Preprocessing, Tokens
from harness.data.shards import ShardAudit
from harness.data.views.dropped_tokens import DroppedTokens
from harness.encoders import EncoderSpec, family_of, load
from harness.errors import RequestError
from harness.features.bank import BankStore, Receipt, ShardRows
from harness.plan.plan import make_plan
from harness.plan.roles import view_of
from harness.results.collect import receipts_of, records
from harness.results.tables import read_table
from harness.search.accounts import Accounts, Outcome
from harness.search.study import Score
from harness.tasks import select
from tests.helpers import here, tiny
from tests.helpers.runs import ROOT, Run

SIDE, CELL = 6, 4
CLASSES = tiny.CLASSES
SPLITS = {"train": 24, "val": 12, "test": 48}


def cells_picture(rng: np.random.Generator, label: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    layout = np.random.default_rng(label).permutation(SIDE * SIDE).reshape(SIDE, SIDE) < 6 + 6 * label
    blue = np.where(layout, 80, 0) + rng.integers(0, 40, (SIDE, SIDE))
    return np.stack([40 * rows, 40 * columns, blue], axis=2).astype(np.uint8).repeat(CELL, axis=0).repeat(CELL, axis=1)


def noise_picture(rng: np.random.Generator, label: int) -> np.ndarray:
    return rng.integers(0, 256, (SIDE * CELL, SIDE * CELL, 3), dtype=np.uint8)


def build(root: Path, name: str, picture: Callable[[np.random.Generator, int], np.ndarray], annotations: Sequence[str] = ("label",)) -> None:
    """A data set of such pictures below `root`, its labels in turn."""
    rng, splits = np.random.default_rng(0), {}
    for split, count in SPLITS.items():
        records = []
        for index in range(count):
            about = json.dumps({"label": index % len(CLASSES)}).encode()
            image = tiny.encode(picture(rng, index % len(CLASSES)), "PNG")
            records.append([(f"{split}-{index:03d}.png", image), (f"{split}-{index:03d}.json", about)])
        splits[split] = {"samples": count, "shards": [tiny.write_tar(root / name / f"{split}.tar", records)]}
    manifest = {"schema": 1, "dataset": name, "version": "1", "license": "CC0-1.0", "source": "drawn by the tests", "classes": CLASSES}
    (root / name / "manifest.json").write_text(json.dumps({**manifest, "parts": [], "annotations": list(annotations), "splits": splits}))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens") / "shards"
    build(root, "cells", cells_picture)
    build(root, "noise", noise_picture)
    build(root, "unlabelled", noise_picture, annotations=())
    return root


# --- encoders that know one thing -------------------------------------------------------------------------------------------

Knows = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Mean colours of cells, float [B, n, 3] from 0 to 255, and the cells of their given positions, int64 [B, n] → tokens [B, n, D]."""


def displacement(colours: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Distance between the place in the content and the place given to the token, in cells."""
    given = torch.stack([cells // SIDE, cells % SIDE], dim=-1)
    return (colours[..., :2] / 40 - given).norm(dim=-1, keepdim=True)


def given_place(colours: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(cells, SIDE * SIDE).float()


def content(colours: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Seven waves of each colour: features of the patch alone."""
    return torch.sin(colours[..., :, None] / 40 * torch.arange(1, 8)).flatten(2)


def layout(colours: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The blue value, at the place of its cell: shape alone."""
    return nn.functional.one_hot(cells, SIDE * SIDE) * (colours[..., 2:] - 60)


class Planted:
    """Tokens with the values that `knows` reads from the kept cells; the cls is their mean."""

    def __init__(self, name: str, knows: Knows, positions: PositionKind) -> None:
        self._knows, self.module = knows, nn.Module()
        width = knows(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64)).shape[-1]
        self.info = EncoderInfo(
            name=name,
            family="planted",
            architecture=name,
            source="nothing learned",
            weights_sha256=name,
            params=0,
            embed_dim=width,
            block_dims=(width,),
            grid=(SIDE, SIDE),
            has_cls=True,
            registers=0,
            projection_dim=None,
            positions=positions,
            chooses_tokens=positions == "absolute",
            preprocessing=Preprocessing(size=(SIDE * CELL,) * 2, resize=SIDE * CELL, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
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
        colours = nn.functional.avg_pool2d(images * 255, CELL).flatten(2).transpose(1, 2)
        every = torch.arange(SIDE * SIDE).expand(len(images), -1)
        places = every if keep is None else keep
        colours = colours.gather(1, places[:, :, None].expand(-1, -1, 3))
        tokens = self._knows(colours, places if positions is None else positions)
        shape = (SIDE, SIDE) if keep is None else (1, places.shape[1])
        patches = tokens.unflatten(1, shape)
        outputs = {block: Tokens(cls=tokens.mean(dim=1), patches=patches) for block in blocks}
        return Tokens(cls=tokens.mean(dim=1), patches=patches, blocks=outputs)


@functools.cache
def encoders() -> dict[str, Encoder]:
    small = {"architecture": "test_vit", "random": True, "preprocessing": {"size": 32}}
    return {
        "displacement": Planted("displacement", displacement, "absolute"),
        "given_place": Planted("given_place", given_place, "absolute"),
        "content": Planted("content", content, "absolute"),
        "bag_of_words": Planted("bag_of_words", content, "none"),
        "layout": Planted("layout", layout, "none"),
        "vit": load(EncoderSpec.parse({"name": "vit", **small})),
    }


class World(here.World):
    """From tars to values, without a cluster."""

    def points(self, encoder: str, task: str, lr: tuple[float, float] = (0.3, 3.0), stack: int = 2, **overrides: Any) -> list[Score]:
        """The scores of every point of `<data set>/<task>[@<protocol>]` for an encoder."""
        return [score for _, score in self.scores(encoders()[encoder], task, lr=lr, stack=stack, **overrides)]


@pytest.fixture(scope="module")
def world(shards: Path) -> World:
    return World(shards=shards, cache=shards.parent / "cache")


def values(score: Score) -> Mapping[str, float | None]:
    return {value.metric: value.value for value in score.values}


# --- misplaced ----------------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"epochs": 40, "batch_size": 8}


@pytest.mark.parametrize("kept_share", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("theta", [0.2, 0.5])
def test_who_compares_content_with_place_detects_every_misplaced_token(world: World, kept_share: float, theta: float) -> None:
    (score,) = world.points("displacement", "cells/misplaced-tokens", blocks=[None], kept_shares=[kept_share], thetas=[theta], **QUICK)
    by_metric = values(score)
    assert by_metric["AUROC"] == 1.0
    assert by_metric["balanced_accuracy"] == 1.0
    assert by_metric["bce"] is not None
    assert by_metric["bce_chance"] is not None
    assert by_metric["bce"] < 0.2 * by_metric["bce_chance"]
    assert score.n == SPLITS["test"] * int(kept_share * SIDE * SIDE)


@pytest.mark.parametrize("theta", [0.2, 0.5])
@pytest.mark.parametrize(("encoder", "pictures"), [("given_place", "cells"), ("content", "noise")])
def test_who_knows_the_place_or_the_content_alone_is_at_chance(world: World, encoder: str, pictures: str, theta: float) -> None:
    searched: dict[str, Any] = {"lr": (1e-3, 10.0), "stack": 8}
    (score,) = world.points(encoder, f"{pictures}/misplaced-tokens", **searched, blocks=[None], thetas=[theta], kept_shares=[0.5], **QUICK)
    for value in score.values:
        if value.metric in ("AUROC", "balanced_accuracy"):
            assert value.low is not None
            assert value.high is not None
            assert value.low <= 0.5 <= value.high
    by_metric = values(score)
    assert by_metric["bce"] is not None
    assert by_metric["bce_chance"] is not None
    assert 0.98 < by_metric["bce"] / by_metric["bce_chance"] < 1.05


def test_the_base_rate_is_theta_and_its_entropy_is_told_beside(world: World) -> None:
    (score,) = world.points("given_place", "cells/misplaced-tokens", blocks=[None], thetas=[0.2], kept_shares=[1.0], **QUICK)
    wrong = np.array(score.predictions["target"])
    assert abs(wrong.mean() - 0.2) < 3 * (0.2 * 0.8 / len(wrong)) ** 0.5
    (chance,) = [value for value in score.values if value.metric == "bce_chance"]
    assert chance.low is not None
    assert chance.high is not None
    assert chance.low < 0.5004 < chance.high


def test_a_wrong_token_that_had_nowhere_to_go_is_told_and_not_counted(world: World) -> None:
    (score,) = world.points("given_place", "cells/misplaced-tokens", blocks=[None], thetas=[0.02], kept_shares=[1.0], **QUICK)
    targets = score.predictions["target"]
    assert len(targets) == SPLITS["test"] * SIDE * SIDE
    assert targets.count(-1) > 5
    assert score.n == len(targets) - targets.count(-1)


def test_predictions_are_one_a_token_grouped_by_image(world: World) -> None:
    (score,) = world.points("displacement", "cells/misplaced-tokens", blocks=[-1], **QUICK)
    assert score.head is not None
    assert score.head.readout == "tokens@-1"
    keys, groups = score.predictions["key"], score.predictions["group"]
    assert keys[:10] == [f"test-000#{place}" for place in range(9)] + ["test-001#0"]
    assert [key.rpartition("#")[0] for key in keys] == groups


def test_every_combination_of_theta_share_and_block_is_a_task_and_blocks_share_a_pass(shards: Path) -> None:
    tasks, _ = select(["cells/misplaced-tokens"], str(shards), {"thetas": [0.1, 0.4], "kept_shares": [0.25, 1], "blocks": [None, -1, 3]})
    assert len(tasks) == 12
    assert [task.protocol.name for task in tasks[:3]] == [
        "dilemma[theta=0.1,kept_share=0.25]",
        "dilemma[theta=0.1,kept_share=0.25,block=-1]",
        "dilemma[theta=0.1,kept_share=0.25,block=3]",
    ]
    assert [task.readouts for task in tasks[:3]] == [("tokens",), ("tokens@-1",), ("tokens@3",)]
    assert len({task.view.identity for task in tasks}) == 4
    for task in tasks:
        assert (task.level, task.probe.name, task.protocol.fields.mask) == ("part", "detector", "misplaced")
        assert task.protocol.fields.readouts == task.readouts
        assert task.train_view is None, "the detector is trained on misplaced tokens too"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"thetas": [0.0]}, "theta"),
        ({"thetas": [1.0]}, "theta"),
        ({"kept_shares": [0.0]}, "kept_share above 0"),
        ({"kept_shares": [1.5]}, "at most 1"),
        ({"blocks": ["last"]}, "blocks.0: expected a valid integer, got 'last'"),
        ({"optimizer": "lion"}, "optimizer"),
    ],
)
def test_points_that_cannot_be_are_refused(shards: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        select(["cells/misplaced-tokens"], str(shards), overrides)


# --- dropped and shuffled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["drop", "drop-centre", "drop-block", "grey", "grey-centre", "grey-block"])
@pytest.mark.parametrize("encoder", ["vit", "displacement"])
def test_with_every_token_kept_the_value_is_that_of_the_intact_images(world: World, encoder: str, protocol: str) -> None:
    # labels have nothing to do with these pictures: predictions are accidents that only equal features repeat
    (plain,) = world.points(encoder, "noise/object-knn", k=3)
    (dropped,) = world.points(encoder, f"noise/dropped-tokens@{protocol}", kept_shares=[1.0], k=3)
    accuracies = ("accuracy", "mean_class_accuracy")
    assert [value for value in dropped.values if value.metric in accuracies] == [value for value in plain.values if value.metric in accuracies]
    assert dropped.predictions["prediction"] == plain.predictions["prediction"]
    assert dropped.head == plain.head
    assert values(dropped)["cosine_to_intact"] == pytest.approx(1.0, abs=1e-6)


def test_the_less_is_kept_the_further_features_go(world: World) -> None:
    points = world.points("vit", "noise/dropped-tokens", kept_shares=[1.0, 0.75, 0.5, 0.25])
    cosines = [values(point)["cosine_to_intact"] for point in points]
    assert all(value is not None for value in cosines)
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[-1] < 0.999


def test_the_bank_of_intact_images_is_one_for_all_points(shards: Path) -> None:
    tasks, _ = select(["cells/object-knn", "cells/dropped-tokens", "cells/shuffled-patches"], str(shards), {})
    plain, *altered = tasks
    assert len(altered) == 3 + 5
    for task in altered:
        assert {view_of(task, role).identity for role in ("train", "val", "reference")} == {plain.view.identity}
        assert task.readouts == plain.readouts
    assert len({task.view.identity for task in altered}) == len(altered)


def test_what_cannot_drop_tokens_sees_grey_in_the_same_cells(shards: Path) -> None:
    for protocol in ("drop", "drop-centre", "drop-block"):
        for task in select([f"cells/dropped-tokens@{protocol}"], str(shards), {})[0]:
            other = task.instead
            assert other is not None
            assert other.protocol.name == task.protocol.name.replace("drop", "grey")
            assert other.protocol.fields.replaced(how="drop") == task.protocol.fields
            assert other.instead is None


def test_a_bag_of_words_is_blind_to_shuffled_tokens(world: World) -> None:
    points = world.scores(encoders()["bag_of_words"], "cells/shuffled-patches", grids=[1, 2, 6, 0])
    assert len(points) == 4
    scores, store = [score for _, score in points], BankStore(str(world.cache))
    plain = store.rows(points[0][0].banks["reference"]["cls"]).features
    for study, score in points:
        # 2 × 2 cells of the image hold whole tokens too
        np.testing.assert_allclose(store.rows(study.banks["test"]["cls"]).features, plain, rtol=0, atol=1e-6)
        assert score.predictions["prediction"] == scores[0].predictions["prediction"]
        assert values(score)["accuracy"] == values(scores[0])["accuracy"]
        assert values(score)["cosine_to_intact"] == pytest.approx(1.0, abs=1e-6)
    accuracy = values(scores[0])["accuracy"]
    assert accuracy is not None
    assert accuracy > 0.9, "blind to their order, and not to what is there"


def test_who_knows_the_layout_alone_loses_it_when_patches_are_shuffled(world: World) -> None:
    plain, shuffled = world.points("layout", "cells/shuffled-patches", grids=[1, 0])
    assert values(plain)["accuracy"] == 1.0
    value = next(value for value in shuffled.values if value.metric == "accuracy")
    assert value.high is not None
    assert value.high < 0.9
    assert values(shuffled)["cosine_to_intact"] == pytest.approx(0.0, abs=0.5)


# --- which data sets, which encoders --------------------------------------------------------------------------------------------


def test_without_labels_misplaced_tokens_are_all_there_is(shards: Path) -> None:
    (task, *_), _ = select(["unlabelled/*-tokens"], str(shards), {})
    assert task.name == "unlabelled/misplaced-tokens"
    with pytest.raises(RequestError, match="no task 'dropped-tokens'"):
        select(["unlabelled/dropped-tokens"], str(shards), {})


def test_no_pattern_but_one_with_their_last_word_asks_for_them(shards: Path) -> None:
    by_pattern = {
        pattern: {task.name.partition("/")[2] for task in select([f"cells/{pattern}"], str(shards), {})[0]} for pattern in ("*", "*-tokens")
    }
    assert not {"misplaced-tokens", "dropped-tokens", "shuffled-patches"} & by_pattern["*"]
    assert by_pattern["*-tokens"] == {"misplaced-tokens", "dropped-tokens"}


def test_the_speed_of_a_point_is_that_of_its_altered_test_images_alone(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards")
    (tmp_path / "sweep.yaml").write_text(
        tiny.sweep_text(tmp_path / "shards", tasks=["tiny/dropped-tokens"], protocol={"kept_shares": [1.0, 0.25], "readouts": ["cls", "mean"]})
    )
    plan, store = make_plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path, "cpu", "float32"), BankStore(str(tmp_path / "cache"))
    took = {None: 64.0, 1.0: 8.0, 0.25: 2.0}
    for work in plan.shard_work:
        for view_pass in work.passes:
            seconds = took[view_pass.view.alteration.kept_share if isinstance(view_pass.view.alteration, DroppedTokens) else None]
            for job in view_pass.banks:
                rows = ShardRows(keys=["a"], groups=["a"], targets=[0], features=[np.zeros(2, np.float32)])
                audit = ShardAudit(shard=work.shard.file, expected=work.shard.samples, seen=work.shard.samples)
                receipt = Receipt.of(audit, bank_key=job.bank.key, attempts=1, node="here", rows=1, seconds=seconds, images=16)
                store.write_part(job.bank, rows, receipt)
    accounts = Accounts(plan, store, {})
    speeds = {}
    for study in plan.studies:
        for readout in ("cls", None):
            timed = receipts_of(study, accounts, readout, own_view=True)
            assert {receipt.bank_key for receipt in timed} <= {bank.key for bank in study.banks["test"].values()}
            assert len({receipt.bank_key for receipt in timed}) == (1 if readout else 2)
        assert {bank.split for role in ("train", "val", "reference") for bank in study.banks[role].values()} == {"train", "val", "test"}
        rows_of_it = list(records(plan, Outcome(plan=study, state=None), accounts, "run"))
        (speeds[study.task.protocol.fields.kept_share],) = {row["images_per_second"] for row in rows_of_it}
    assert speeds == {1.0: 2.0, 0.25: 8.0}


@pytest.mark.slow
def test_the_command_says_why_an_encoder_has_no_misplaced_tokens_and_ends_well(tmp_path: Path) -> None:
    tiny.build(tmp_path / "shards")
    small = {"random": True, "preprocessing": {"size": 64}}
    text = tiny.sweep_text(
        tmp_path / "shards",
        encoders=[{"name": "vit", "architecture": "test_vit", **small}, {"name": "resnet", "architecture": "test_resnet", **small}],
        tasks=["tiny/object-knn", "tiny/*-tokens", "tiny/shuffled-patches"],
        protocol={"epochs": 2, "blocks": [None, -2], "kept_shares": [1.0, 0.5], "grids": [1, 4]},
    )
    (tmp_path / "sweep.yaml").write_text(text)
    run = Run(sweep=tmp_path / "sweep.yaml", out=tmp_path / "out", cache=tmp_path / "cache")
    assert run.run() == 0, run.log
    rows = read_table(tmp_path / "out" / "results.parquet")
    by_task = {name: [row for row in rows if row["task"] == f"tiny/{name}"] for name in ("misplaced-tokens", "dropped-tokens", "shuffled-patches")}
    for row in by_task["misplaced-tokens"]:
        if row["encoder"] == "resnet":
            assert (row["status"], row["value"]) == ("undefined", None)
            assert row["error"] == "test_resnet has no position embeddings: tokens can be misplaced where each is given an absolute position"
        else:
            assert row["status"] == "ok", row
    assert len(by_task["misplaced-tokens"]) == 2 * 4 * 4
    trials = read_table(tmp_path / "out" / "trials.parquet")
    for row in by_task["misplaced-tokens"][:16:4]:
        mine = [trial for trial in trials if (trial["encoder"], trial["task"], trial["protocol"]) == (row["encoder"], row["task"], row["protocol"])]
        assert {trial["metric"] for trial in mine} == {"bce"}
        assert min(mine, key=lambda trial: trial["val_value"])["lr"] == json.loads(row["hyperparameters"])["lr"]
        assert all(trial["val_value"] > 0 for trial in mine)
    for encoder, how in (("vit", "drop"), ("resnet", "grey")):
        mine = [row for row in by_task["dropped-tokens"] if row["encoder"] == encoder]
        assert {row["protocol"] for row in mine} == {f"{how}[kept_share=1]", f"{how}[kept_share=0.5]"}
        (intact,) = [row for row in rows if row["encoder"] == encoder and row["task"] == "tiny/object-knn" and row["metric"] == "accuracy"]
        unchanged = [row for row in mine if row["protocol"].endswith("=1]") and row["metric"] == "accuracy"]
        unchanged += [
            row
            for row in by_task["shuffled-patches"]
            if row["encoder"] == encoder and row["protocol"] == "shuffle[grid=1]" and row["metric"] == "accuracy"
        ]
        assert len(unchanged) == 2
        for row in unchanged:
            assert (row["value"], row["ci_low"], row["ci_high"], row["readout"]) == tuple(
                intact[name] for name in ("value", "ci_low", "ci_high", "readout")
            )
    speeds = {row["protocol"]: (row["images_per_second"], set(row["bank_keys"])) for row in by_task["dropped-tokens"] if row["encoder"] == "vit"}
    (full_speed, full_keys), (half_speed, half_keys) = (speeds[f"drop[kept_share={share}]"] for share in ("1", "0.5"))
    assert full_speed > 0
    assert half_speed > 0
    assert len(full_keys & half_keys) == 3, "train, val and the intact test images"
    assert len(full_keys ^ half_keys) == 2


# --- the sweeps -----------------------------------------------------------------------------------------------------------------

SWEEPS = sorted((ROOT / "sweeps" / "dilemma").glob("*.yaml"))
EXPANDED = {"finetune": 2, "finetune_objectnet": 1, "linear": 3, "misplaced": 3 * 4 * 3, "shuffled": 1 + 2 * 6, "sparsity": 1 + 6 * 7}
"""Sweep → number of its tasks; every point of a curve is a task."""


@pytest.fixture(scope="module")
def published_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets with the names and annotations of those in the sweeps."""
    root = tmp_path_factory.mktemp("published")
    for name in ("cub", "imagenet100", "imagenet1k", "yoga82", "objectnet"):
        build(root, name, noise_picture)
    path = root / "objectnet" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "counterparts": {"imagenet1k": [[0], [1, 2], []]}}))
    return root


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_asks_for_tasks_that_there_are(path: Path, published_data: Path) -> None:
    sweep = load_sweep(path)
    assert Path(sweep.shards).resolve() == ROOT / "shards" / "data"
    tasks, _ = select(sweep.tasks, str(published_data), sweep.protocol)
    assert len(tasks) == EXPANDED[path.stem]
    for entry in sweep.encoders:
        assert entry == "timm:resnet50.a1_in1k" or family_of(EncoderSpec.parse(entry, base=path.parent))


def test_the_demo_has_a_curve_of_dropped_tokens_and_what_their_time_is_told_by() -> None:
    sweep = load_sweep(ROOT / "sweeps" / "demo.yaml")
    tasks, _ = select(["stamps/dropped-tokens"], sweep.shards, sweep.protocol)
    assert [task.protocol.fields.kept_share for task in tasks] == [1.0, 0.5, 0.25]
