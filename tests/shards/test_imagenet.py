from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import imagenet, recipe
from tests.helpers import built
from tests.helpers.sources.imagenet import VAL, WNIDS, imagenet_source, into_folders, val_name

IDS = {"n01440764": 3, "n02012849": 1, "n03126707": 2}
"""As in the development kit, the ids do not follow the WordNet ids."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return imagenet_source(tmp_path)


def solution(source: Path) -> None:
    lines = [f"{val_name(number)},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for number, wnid in sorted(VAL.items(), reverse=True)]  # in any order
    built.write(source / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *lines]) + "\n")


def devkit(source: Path) -> Path:
    """The kit's ground truth and synsets, among them one that is no class but an ancestor of classes."""
    data = source / "ILSVRC2012_devkit_t12" / "data"
    truth = built.write(data / "ILSVRC2012_validation_ground_truth.txt", "".join(f"{IDS[VAL[number]]}\n" for number in sorted(VAL)))
    fields = [
        (name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")
    ]
    synsets = [*((IDS[wnid], wnid, f"word of {wnid}", "", 0, [], 0, 3) for wnid in WNIDS), (1001, "n00001740", "entity", "", 2, [1, 2], 1, 0)]
    scipy.io.savemat(data / "meta.mat", {"synsets": np.array(synsets, dtype=fields).reshape(-1, 1)})
    return truth


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official counts that the replica meets."""
    monkeypatch.setattr(imagenet, "COUNTS", {"train images": 9, "val images": 6, "classes": 3})
    monkeypatch.setattr(imagenet, "PER_CLASS", (3, 3))
    monkeypatch.setattr(imagenet, "VAL_PER_CLASS", 2)


def labels(root: Path, split: str, name: str = "imagenet1k") -> dict[str, int | None]:
    return {key: sample.label for key, sample in built.samples(root, name, split).items()}


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layout", [solution, devkit, into_folders])
def test_labels_follow_the_wordnet_ids_in_every_layout(source: Path, tmp_path: Path, layout: Any) -> None:
    layout(source)
    recipe.build(imagenet.describe(source), tmp_path / "imagenet1k")
    assert labels(tmp_path, "test") == {val_name(number): WNIDS.index(wnid) for number, wnid in VAL.items()}
    assert labels(tmp_path, "train") == {f"{wnid}_{7 * number}": label for label, wnid in enumerate(WNIDS) for number in range(3)}
    manifest = load_manifest(str(tmp_path), "imagenet1k")
    assert (manifest.version, manifest.classes, manifest.split("test").official) == ("ILSVRC2012", WNIDS, "val")


@pytest.mark.usefixtures("small")
def test_images_keep_their_bytes_and_are_called_what_they_are(source: Path, tmp_path: Path) -> None:
    solution(source)
    recipe.build(imagenet.describe(source), tmp_path / "imagenet1k")
    held = built.members(tmp_path, "imagenet1k")
    for file in (source / "train").glob("*/*.JPEG"):
        name = f"{file.stem}.png" if file.name == "n02012849_0.JPEG" else f"{file.stem}.jpg"
        assert held[name] == file.read_bytes()
    assert "n02012849_0.jpg" not in held
    for sample in built.samples(tmp_path, "imagenet1k", "train").values():
        assert sample.image.shape == (30, 40, 3)  # grey and CMYK, too


@pytest.mark.usefixtures("small")
def test_shards_mix_classes_and_do_not_depend_on_workers(source: Path, tmp_path: Path) -> None:
    solution(source)
    for workers in (1, 2):
        recipe.build(imagenet.describe(source), tmp_path / str(workers) / "imagenet1k", workers=workers)
    assert built.tree(tmp_path / "1") == built.tree(tmp_path / "2")
    assert len(set(list(labels(tmp_path / "1", "train").values())[:4])) > 1


# --- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_a_class_list_keeps_its_classes_alone(source: Path, tmp_path: Path) -> None:
    solution(source)
    listed = built.write(tmp_path / "list.txt", "# ours\nn03126707 crane\n\nn01440764\n")
    recipe.build(imagenet.describe(source, classes=listed), tmp_path / "imagenet2")
    assert set(labels(tmp_path, "train", "imagenet2")) == {f"{wnid}_{7 * number}" for wnid in (WNIDS[0], WNIDS[2]) for number in range(3)}
    assert labels(tmp_path, "test", "imagenet2") == {val_name(1): 1, val_name(6): 1, val_name(2): 0, val_name(4): 0}
    manifest = load_manifest(str(tmp_path), "imagenet2")
    assert manifest.classes == (WNIDS[0], WNIDS[2])
    assert manifest.version.startswith("ILSVRC2012, 2 classes (sha256 of the sorted list ")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["synset_words.txt", "LOC_synset_mapping.txt", "elsewhere.txt"])
def test_class_names_come_from_a_file_and_stay_apart(source: Path, name: str) -> None:
    solution(source)
    file = built.write(source / name, "n03126707 crane\nn01440764 tench, Tinca tinca\nn02012849 crane\nn00000000 other\n")
    described = imagenet.describe(source, names=file if name == "elsewhere.txt" else None)
    assert described.classes == ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\nn01440764\n", "each once, got 'n01440764' twice"),
        ("tench\n", "expected WordNet ids such as n01440764, each once, got 'tench'"),
        ("n01440764\nn09999999\n", "expected a folder for each of 2 classes, got none for n09999999"),
        (None, "expected a file of the data set, got none; name a text file"),
    ],
)
def test_a_class_list_that_does_not_fit_is_refused(source: Path, tmp_path: Path, text: str | None, message: str) -> None:
    solution(source)
    listed = tmp_path / "list.txt" if text is None else built.write(tmp_path / "list.txt", text)
    with pytest.raises(RequestError, match=message):
        imagenet.describe(source, classes=listed)


@pytest.mark.usefixtures("small")
def test_a_class_without_a_name_is_refused(source: Path, tmp_path: Path) -> None:
    solution(source)
    with pytest.raises(RequestError, match="expected a name for every class, got none for n02012849"):
        imagenet.describe(source, names=built.write(tmp_path / "names.txt", "n01440764 tench\n"))


# --- counts and broken sources ----------------------------------------------------------------------------------------


def test_the_official_counts_are_demanded_unless_told_otherwise(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert imagenet.COUNTS == {"train images": 1_281_167, "val images": 50_000, "classes": 1000}
    solution(source)
    command = ["--source", str(source), "--out", str(tmp_path / "imagenet1k"), "--workers", "1"]
    assert recipe.main(imagenet.describe, "", command, imagenet.options()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "expected 732 to 1300 images of each class, got 3 in train/n01440764, and 2 more classes; unpack" in lines[0]
    assert recipe.main(imagenet.describe, "", [*command, "--partial"], imagenet.options()) == 0
    assert "partial: 9 train images, 6 val images, 3 classes, of officially 1281167" in load_manifest(str(tmp_path), "imagenet1k").version


@pytest.mark.usefixtures("small")
def test_missing_images_are_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solution(source)
    (source / "val" / f"{val_name(3)}.JPEG").unlink()
    with pytest.raises(RequestError, match=r"val: expected 6 images, got 5: ILSVRC2012_val_00000003\.JPEG is the first that is missing"):
        imagenet.describe(source)
    recipe.build(imagenet.describe(source, partial=True), tmp_path / "imagenet1k")
    assert set(labels(tmp_path, "test")) == {val_name(number) for number in VAL if number != 3}
    (source / "train" / WNIDS[1] / f"{WNIDS[1]}_7.JPEG").unlink()
    with pytest.raises(RequestError, match="expected 3 to 3 images of each class, got 2 in train/n02012849; "):
        imagenet.describe(source)
    monkeypatch.setattr(imagenet, "PER_CLASS", (2, 3))
    built.write(source / "val" / f"{val_name(3)}.JPEG", built.picture(0))
    with pytest.raises(RequestError, match="ILSVRC2012: expected 9 train images, 6 val images, 3 classes, got 8 train images"):
        imagenet.describe(source)


@pytest.mark.usefixtures("small")
def test_a_flat_val_needs_its_ground_truth(source: Path) -> None:
    with pytest.raises(RequestError, match=r"expected folders named by WordNet ids, or LOC_val_solution\.csv or .*, got neither; say --val-labels"):
        imagenet.describe(source)
    solution(source)
    built.write(source / "val" / "ILSVRC2012_val_00000007.JPEG", built.picture(7))
    with pytest.raises(RequestError, match=r"val/ILSVRC2012_val_00000007\.JPEG: expected a label in the ground truth, got none"):
        imagenet.describe(source)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("text", "meta", "message"),
    [
        ("3\n", True, "expected a label in the ground truth, got none"),
        ("3\n1\n2\n1001\n1\n2\n", True, "expected ILSVRC2012_IDs of meta.mat, got '1001'"),
        ("3\none\n", True, "expected ILSVRC2012_IDs of meta.mat, got 'one'"),
        ("3\n", False, "meta.mat: expected synsets of ILSVRC2012, got"),
        ("3\n", None, "meta.mat: expected a file of the data set, got none; keep it beside the ground truth"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_refused(source: Path, text: str, meta: bool | None, message: str) -> None:
    truth = devkit(source)
    truth.write_text(text)
    if meta is False:
        truth.with_name("meta.mat").write_bytes(b"no mat file at all" * 20)
    elif meta is None:
        truth.with_name("meta.mat").unlink()
    with pytest.raises(RequestError, match=message):
        imagenet.describe(source, val_labels=truth)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("row", ["ILSVRC2012_val_00000001", "ILSVRC2012_val_00000001,", "ILSVRC2012_val_00000001,tench 1 2 3 4"])
def test_a_solution_that_is_none_is_refused(source: Path, row: str) -> None:
    built.write(source / "LOC_val_solution.csv", f"ImageId,PredictionString\n{row}\n")
    with pytest.raises(
        RequestError, match=r"LOC_val_solution\.csv: expected (lines <image>,<wnid> <box>|a WordNet id for ILSVRC2012_val_00000001), got"
    ):
        imagenet.describe(source)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="train: expected folders named by WordNet ids such as n01440764, got none"):
        imagenet.describe(tmp_path)
