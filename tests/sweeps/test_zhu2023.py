"""The sweeps of Zhu et al.'s tables: they load, plan against data sets of the official sizes, and together repeat every published figure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness import sweep as command
from harness.config import Sweep, load_sweep
from harness.core import EncoderInfo, Preprocessing
from harness.encoders import EncoderSpec, describe, family_of
from harness.encoders.preprocessing import decide
from harness.plan.plan import Plan, StudyPlan, make_plan
from harness.probes.fields import lr_bounds_of
from harness.report.published import Apart, Beside, Published, compare_published, table
from harness.results.tables import read_table
from harness.search.propose import first_rates
from shards import cifar, coco, cub, imagenet, lip, pascal_parts, recipe
from tests.helpers import built
from tests.helpers.sources.cifar import cifar_ten
from tests.helpers.sources.coco import coco_source
from tests.helpers.sources.cub import cub_source
from tests.helpers.sources.imagenet import imagenet_source, into_folders
from tests.helpers.sources.lip import lip_source

FOLDER = Path(__file__).parents[2] / "sweeps" / "zhu2023"
FILES = sorted(FOLDER.glob("*.yaml"))
ENCODERS = ("DeiT", "MoCo v3", "DINO", "BEiT", "MAE", "CAE", "iBOT")
LIP_RATES = (1e-5, 2e-4, 3e-4, 4e-4, 5e-4, 1e-3)
WITH_HEAD = ("vit-b-300ep.pth.tar", "dino_vitbase16_pretrain_full_checkpoint.pth", "ibot_checkpoint.pth")
"""Files that hold a pretraining head beside the encoder."""
HALF = (0.5, 0.5, 0.5)
IMAGENET = Preprocessing(size=(224, 224), resize=256)
OWN = {"BEiT": replace(IMAGENET, mean=HALF, std=HALF), "MoCo v3": replace(IMAGENET, interpolation="bilinear")}
"""How the encoders' authors prepare images, where that is not as for the others."""
PREPARED = "as prepared by Zhu et al., TMLR 2023"
DATA_SETS: Mapping[str, Mapping[str, Any]] = {
    "imagenet1k": {"version": "ILSVRC2012", "classes": 1000, "train": 1_281_167, "test": 50_000},
    "cifar10": {"version": "cifar-10-python.tar.gz", "classes": 10, "train": 50_000, "test": 10_000},
    "coco_objects": {"version": "COCO 2017", "classes": 80, "train": 849_949, "test": 36_335},
    "coco_keypoints": {"version": "COCO 2017", "parts": ("nose", "right_wrist", "left_ankle", "left_wrist"), "train": 56_599, "test": 2_346},
    "cub": {
        "version": "CUB-200-2011",
        "classes": 200,
        "parts": ("beak", "left wing", "right eye", "right leg", "tail"),
        "train": 5_994,
        "test": 5_794,
    },
    "ade20k": {"version": "ADEChallengeData2016", "object": 150, "train": 20_210, "test": 2_000},
    "ade20k_object": {"version": PREPARED, "object": 59, "train": 20_210, "test": 2_000},
    "ade20k_part": {"version": PREPARED, "part": 209, "train": 20_210, "test": 2_000},
    "pascal_object": {"version": PREPARED, "object": 16, "train": 4_998, "test": 5_105},
    "pascal_part": {"version": PREPARED, "part": 193, "train": 4_998, "test": 5_105},
    "lip": {"version": "LIP", "part": 19, "train": 30_462, "test": 10_000},
}
"""Numbers of samples where the recipes check them; elsewhere round about that many, which decides nothing here."""


def manifest(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of the kind that the data set's recipe writes, with one shard a split."""
    masks = {kind: ["background", *map(str, range(1, facts[kind] + 1))] for kind in ("object", "part") if kind in facts}
    return {
        "schema": 1,
        "dataset": name,
        "version": facts["version"],
        "license": "-",
        "source": "-",
        "classes": [f"class {number}" for number in range(facts.get("classes", 0))],
        "parts": list(facts.get("parts", ())),
        "part_of": {},
        "annotations": [*(["label"] if "classes" in facts else []), *(["keypoints"] if "parts" in facts else []), *masks],
        "mask_classes": masks,
        "splits": {
            split: {
                "samples": facts[split],
                "official": None,
                "shards": [{"file": f"{split}.tar", "samples": facts[split], "bytes": 1, "sha256": hashlib.sha256(split.encode()).hexdigest()}],
            }
            for split in ("train", "test")
        },
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for name, facts in DATA_SETS.items():
        built.write(root / name / "manifest.json", json.dumps(manifest(name, facts)))
    return root


def small(sweep: Sweep, shards: Path) -> Sweep:
    """The sweep over `shards`, with small random encoders of the same names, of as many blocks."""
    encoders = [
        {"name": name, "architecture": "test_vit", "options": {"depth": 12}, "random": True, "seed": place} for place, name in enumerate(ENCODERS)
    ]
    return sweep.model_copy(update={"encoders": encoders, "shards": str(shards)})


def files(sweep: Sweep) -> dict[str, str]:
    """Encoder to the name of its checkpoint."""
    return {spec.name: Path(spec.checkpoint or "").name for spec in (EncoderSpec.parse(entry, base=FOLDER) for entry in sweep.encoders)}


@pytest.fixture(scope="module")
def plans(shards: Path) -> dict[str, Plan]:
    """Each encoder has a pretraining head where the file that its sweep names has one."""
    plans = {}
    for path in FILES:
        sweep = load_sweep(path)
        with_head = [name for name, file in files(sweep).items() if file in WITH_HEAD]

        def described(spec: EncoderSpec, with_head: Sequence[str] = with_head) -> EncoderInfo:
            return replace(describe(spec), projection_dim=8 if spec.name in with_head else None)

        plans[path.stem] = make_plan(small(sweep, shards), FOLDER, "cpu", "float32", info_of=described)
    return plans


# --- the files --------------------------------------------------------------------------------------------------------


def test_there_is_a_file_for_every_table() -> None:
    assert [path.stem for path in FILES] == [
        "lip_lr",
        "object_classification",
        "object_classification_streamed",
        "object_retrieval",
        "object_segmentation",
        "part_classification",
        "part_retrieval",
        "part_segmentation",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_names_the_papers_encoders_and_the_files_that_the_figures_are_of(path: Path) -> None:
    sweep = load_sweep(path)
    specs = [EncoderSpec.parse(entry, base=FOLDER) for entry in sweep.encoders]
    assert tuple(spec.name for spec in specs) == ENCODERS
    for spec in specs:
        (published,) = {(figure.family, figure.checkpoints) for figure in table() if figure.encoder == spec.name and figure.protocols}
        assert published[0] == family_of(spec).FAMILY
        assert Path(spec.checkpoint or "").name in published[1]
        assert Path(spec.checkpoint or "").parent == FOLDER.parent.parent / "checkpoints"
    assert sweep.name == f"zhu2023_{path.stem}"
    assert sweep.shards == str(FOLDER.parent.parent / "shards" / "data")


@pytest.mark.slow
def test_the_encoders_are_of_the_architectures_that_the_figures_are_of_and_prepare_images_in_their_own_way() -> None:
    for entry in load_sweep(FILES[0]).encoders:
        assert isinstance(entry, dict)
        info = describe(EncoderSpec.parse({"name": entry["name"], "encoder": entry["encoder"], "random": True}))
        published = {(figure.family, figure.architecture) for figure in table() if figure.encoder == entry["name"] and figure.protocols}
        assert published == {(info.family, info.architecture)}
        assert info.preprocessing == OWN.get(entry["name"], IMAGENET)


# --- the plans --------------------------------------------------------------------------------------------------------


def records(plans: Mapping[str, Plan]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(sweep, a row of the results as that sweep would write it), were every checkpoint there and every readout chosen once."""
    for name, plan in plans.items():
        for study in (study for study in plan.studies if study.undefined is None):
            for metric in study.task.metrics:
                for readout in study.task.readouts:
                    yield name, record(plan, study, metric.name, readout)


def record(plan: Plan, study: StudyPlan, metric: str, readout: str) -> dict[str, Any]:
    return {
        "encoder": study.encoder.name,
        "task": study.task.name,
        "protocol": study.task.protocol.name,
        "protocol_fields": study.task.protocol.fields.to_json(),
        "metric": metric,
        "dataset_version": plan.manifests[study.task.dataset].version,
        "readout": readout,
        "value": 0.5,
        "ci_low": 0.4,
        "ci_high": 0.6,
        "hyperparameters": json.dumps({"lr": rate(plan, study)}),
        "selected_on": study.selected_on,
        "status": "ok",
        "error": None,
    }


def rate(plan: Plan, study: StudyPlan) -> float | None:
    """The learning rate, where the sweep or the protocol leaves but one."""
    low, *_, high = lr_bounds_of(study.task.protocol.fields) or plan.sweep.search.lr
    return first_rates(low, high, 1)[0] if study.task.probe.has_learning_rate and low == high else None


def paper_encoders(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """What encoders.json says of the paper's encoders, called as `sweep` calls them."""
    figure_of = {figure.encoder: figure for figure in table() if figure.protocols}
    specs = [EncoderSpec.parse(entry, base=FOLDER) for entry in sweep.encoders]
    chosen = {spec.name: decide(spec, OWN.get(spec.name, IMAGENET), "as its authors evaluate") for spec in specs}
    return {
        spec.name: {
            "preprocessing": json.loads(json.dumps(asdict(chosen[spec.name].values))),
            "preprocessing_source": chosen[spec.name].source,
            "preprocessing_replaced": list(chosen[spec.name].replaced),
            "family": figure_of[spec.name].family,
            "architecture": figure_of[spec.name].architecture,
            "random": False,
            "notes": [],
            "load_report": {"file": Path(spec.checkpoint or "").name},
        }
        for spec in specs
    }


def compared(plans: Mapping[str, Plan]) -> tuple[list[Beside], list[Apart]]:
    """What each sweep's report sets beside the published figures, and apart from them."""
    comparisons = [
        compare_published([row for name, row in records(plans) if name == path.stem], paper_encoders(load_sweep(path)))
        for path in FILES
        if path.stem in plans
    ]
    return [match for comparison in comparisons for match in comparison.beside], [match for comparison in comparisons for match in comparison.apart]


def key(figure: Published, task: str) -> tuple[Any, ...]:
    return figure.encoder, task, figure.readouts, figure.metric


def test_together_the_sweeps_repeat_every_published_figure_by_every_task_that_can(plans: Mapping[str, Plan]) -> None:
    beside, _ = compared(plans)
    expected = {key(figure, task) for figure in table() if figure.status == "published" and figure.protocols for task in figure.tasks}
    assert {key(match.figure, match.record["task"]) for match in beside} == expected


def test_no_record_of_a_papers_protocol_stands_apart(plans: Mapping[str, Plan]) -> None:
    _, apart = compared(plans)
    assert {
        (mismatch.record["task"], mismatch.record["protocol"], mismatch.reasons)
        for mismatch in apart
        if mismatch.record["readout"] in mismatch.figure.readouts
    } == set()


def test_learning_rates_are_the_papers_but_where_they_are_studied(plans: Mapping[str, Plan]) -> None:
    beside, _ = compared({name: plan for name, plan in plans.items() if name != "lip_lr"})
    for match in beside:
        lr = json.loads(match.record["hyperparameters"])["lr"]
        assert (lr is None) == (match.figure.lr is None)
        assert lr == pytest.approx(match.figure.lr)


def test_the_study_of_lips_rates_tries_the_papers() -> None:
    assert load_sweep(FOLDER / "lip_lr.yaml").search.lr == LIP_RATES


def test_projected_retrieval_is_undefined_without_a_pretraining_head_and_says_so(plans: Mapping[str, Plan]) -> None:
    for name in ("object_retrieval", "part_retrieval"):
        projected = [study for study in plans[name].studies if study.task.readouts == ("projection",)]
        assert {study.encoder.name for study in projected if study.undefined is None} == {"MoCo v3", "DINO", "iBOT"}
        assert {study.undefined for study in projected if study.undefined} == {"projection: the checkpoint has no pretraining head"}


# --- from archives to plans and figures -------------------------------------------------------------------------------


def prepared(root: Path, labels: int) -> Path:
    """Maps as the authors prepared them: img/ and ann/ of train and val."""
    for split in ("train", "val"):
        for number in range(2):
            built.write(root / "img" / split / f"{split}_{number}.jpg", built.picture(number))
            path = root / "ann" / split / f"{split}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, labels + 1, (30, 40), np.uint8)).save(path)
    return root


def test_data_sets_built_by_their_recipes_are_what_the_sweeps_ask_for(tmp_path: Path) -> None:
    """Replicas in the exact layout of the archives: every task of the sweeps is one of theirs, and their versions begin as the published table's."""
    root = tmp_path / "built"
    archives = {name: tmp_path / "archives" / name for name in ("cub", "lip", "cifar", "imagenet", "coco")}
    ilsvrc, coco_archives = imagenet_source(archives["imagenet"]), coco_source(archives["coco"])
    into_folders(ilsvrc)
    recipe.build(cub.describe(cub_source(archives["cub"]), partial=True), root / "cub")
    recipe.build(lip.describe(lip_source(archives["lip"]), partial=True), root / "lip")
    recipe.build(cifar.describe(cifar_ten(archives["cifar"]), partial=True), root / "cifar10")
    recipe.build(imagenet.describe(ilsvrc, partial=True), root / "imagenet1k")
    for name in ("coco_objects", "coco_keypoints"):
        recipe.build(coco.describe(coco_archives, data_set=name, partial=True), root / name)
    for kind, labels in (("part", 193), ("object", 16)):
        folder = prepared(tmp_path / "pascal" / kind, labels)
        recipe.build(pascal_parts.describe(folder, prepared=kind), root / f"pascal_{kind}")
    for path in FILES:
        sweep = small(load_sweep(path), root)
        tasks = [task for task in sweep.tasks if (root / task.partition("/")[0]).exists()]
        plan = make_plan(sweep.model_copy(update={"tasks": tasks}), FOLDER, "cpu", "float32")
        for manifest in plan.manifests.values():
            assert manifest.version.partition(", partial:")[0] == DATA_SETS[manifest.dataset]["version"]
        assert len(plan.studies) == len(ENCODERS) * len(tasks)


@pytest.mark.slow
def test_the_study_of_lips_rates_ends_in_a_plot_of_a_line_for_every_encoder(tmp_path: Path) -> None:
    recipe.build(lip.describe(lip_source(tmp_path / "archives"), partial=True), tmp_path / "shards" / "lip")
    encoders = [{"name": name, "architecture": "test_vit", "options": {"depth": 12}, "random": True} for name in ("DINO", "MAE")]
    settings = {
        "shards": str(tmp_path / "shards"),
        "encoders": json.dumps(encoders),
        "resources": json.dumps({"batch_size": 4, "precision": "float32", "actors": 1}),
        "protocol": json.dumps(
            {"iterations": 4, "batch_size": 2, "crop": 32, "train_scale": [64, 32], "test_scale": [64, 32], "stride": 16, "warmup_steps": 1}
        ),
    }
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    out = tmp_path / "out"
    assert command.main([str(FOLDER / "lip_lr.yaml"), "--out", str(out), "--cache", str(tmp_path / "cache"), *options]) == 0
    trials = read_table(out / "trials.parquet")
    for name in ("DINO", "MAE"):
        rates = [trial["lr"] for trial in trials if trial["encoder"] == name and trial["val_value"] is not None]
        assert sorted(rates) == list(LIP_RATES)
        assert {trial["metric"] for trial in trials} == {"mIoU"}
    assert (out / "figures" / "learning_rates.png").stat().st_size > 10_000
