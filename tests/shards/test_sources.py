"""Every recipe over sources that are empty, laid out otherwise or damaged: a data set whose every split has samples, or one line and nothing left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness.data.manifest import load_manifest
from shards import recipe
from tests.helpers import built
from tests.helpers.layouts import LAYOUTS, Layout


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def run(layout: Layout, source: Path, out: Path) -> int:
    arguments = [argument.replace("SOURCE", str(source)) for argument in layout.arguments]
    command = ["--source", str(source), "--out", str(out), "--workers", "1", "--partial", *arguments]
    return recipe.main(layout.module.describe, "", command, layout.options)


def refusal(error: str) -> str:
    """The one line of a refusal, beside those that tell of progress and of what was left out."""
    (line,) = [line for line in error.splitlines() if line.strip() and not line.lstrip().startswith(("left out of ", "building "))]
    assert "Traceback" not in line
    assert len(line) < 1500
    return line


@pytest.fixture
def source(layout: Layout, tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    layout.write(root)
    return root


def test_the_smallest_source_is_published(layout: Layout, source: Path, tmp_path: Path) -> None:
    assert run(layout, source, tmp_path / layout.name) == 0
    manifest = load_manifest(str(tmp_path), layout.name)
    assert all(split.samples for split in manifest.splits.values())
    assert layout.module.describe.__doc__


def tiny_imagenet(root: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01443537", "n01629819"):
            built.write(root / split / wnid / "images" / f"{split}_{wnid}_0.JPEG", built.picture(1))


def imagefolder(root: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            built.write(root / split / name / "1.jpg", built.picture(1))


def flat(root: Path) -> None:
    for number in range(3):
        built.write(root / f"{number}.jpg", built.picture(number))


UNEXPECTED: dict[str, Callable[[Path], None]] = {"nothing": lambda root: None, "Tiny-ImageNet": tiny_imagenet, "folders": imagefolder, "images": flat}


@pytest.mark.parametrize("other", UNEXPECTED)
def test_another_layout_is_refused_in_a_line_and_leaves_nothing(
    layout: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    root = tmp_path / "source"
    root.mkdir()
    UNEXPECTED[other](root)
    built.write(root / "list.txt", "car\n")
    assert run(layout, root, tmp_path / "out" / layout.name) == 2
    assert "expected" in refusal(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_split_without_an_image_is_refused_with_the_layout_and_what_there_is(
    layout: Layout, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pattern in layout.images:
        for path in list(source.glob(pattern)):
            path.unlink()
    assert run(layout, source, tmp_path / "out" / layout.name) == 2
    line = refusal(capsys.readouterr().err)
    assert f"{layout.name}: expected samples in every split, from " in line
    assert "got none in" in line
    assert f"{source} has " in line
    assert not (tmp_path / "out").exists()


def test_images_of_a_split_that_are_none_are_left_out_and_the_split_is_refused(
    layout: Layout, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pattern in layout.images:
        for path in list(source.glob(pattern)):
            path.write_bytes(b"\xff\xd8\xff\xe0 no image")
    assert run(layout, source, tmp_path / "out" / layout.name) == 2
    refusal(capsys.readouterr().err)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut at its end": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(500)),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe1 a\n\x80\x00"),
    "a number": lambda path: path.write_bytes(b"1\n"),
    "a list": lambda path: path.write_bytes(b"[[[1]]]\n"),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "a folder": to_folder,
    "a dangling link": to_dangling_link,
}


QUICK = ("cut", "noise", "no UTF-8", "a folder")
"""The others are of the same kinds, and are tried with the slow tests."""


@pytest.mark.parametrize("damage", [pytest.param(damage, marks=() if damage in QUICK else pytest.mark.slow) for damage in DAMAGES])
def test_any_damaged_file_is_a_counted_loss_or_a_line(
    layout: Layout, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    sound = tmp_path / "sound"
    shutil.copytree(source, sound)
    for path in sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file()):
        DAMAGES[damage](source / path)
        out = tmp_path / "out" / layout.name
        status = run(layout, source, out)
        printed = capsys.readouterr()
        assert status in (0, 2), path
        if status == 0:
            assert all(split.samples for split in load_manifest(str(out.parent), layout.name).splits.values())
        else:
            refusal(printed.err)
            assert not out.exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(source)
        shutil.copytree(sound, source)


def test_a_file_in_a_folders_place_is_a_line(layout: Layout, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = tmp_path / "sound"
    shutil.copytree(source, sound)
    for path in sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_dir()):
        shutil.rmtree(source / path)
        (source / path).write_bytes(b"")
        status = run(layout, source, tmp_path / "out" / layout.name)
        printed = capsys.readouterr()
        assert status in (0, 2), path
        if status == 2:
            refusal(printed.err)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(source)
        shutil.copytree(sound, source)


def test_names_that_are_no_utf_8_are_a_sample_or_a_line(layout: Layout, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in layout.images:
        for path in list(source.glob(pattern)):
            shutil.copy(path, os.path.join(os.fsencode(path.parent), b"caf\xe9" + os.fsencode(path.name)))
    status = run(layout, source, tmp_path / layout.name)
    printed = capsys.readouterr()
    if layout is LAYOUTS["imagenet, flat"]:
        assert status == 2
        assert r"caf\udce9ILSVRC2012_val_00000001.JPEG: expected a label in the ground truth, got none" in refusal(printed.err)
    else:
        assert status == 0, printed.err
        built.samples(tmp_path, layout.name, "test")


def without_a_class(source: Path) -> None:
    shutil.rmtree(source / "train" / "n01443537")


LOSSES: dict[str, tuple[str, Callable[[Path], object], str, dict[str, int]]] = {
    "a class of val alone": (
        "imagenet",
        without_a_class,
        "val",
        {"images": 1, "classes that are not among those of train/ or of the list left out": 1},
    ),
    "a class of the ground truth alone": (
        "imagenet, flat",
        lambda source: built.write(source / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt", "1\n2\n"),
        "val",
        {"images": 1, "classes that are not among those of train/ or of the list left out": 1},
    ),
    "a note among the images": (
        "imagenet",
        lambda source: built.write(source / "train" / "n01443537" / "note.txt", ""),
        "train",
        {"images": 2, "files that are no JPEG or PNG by their names left out": 1},
    ),
    "a batch": ("cifar", lambda source: (source / "data_batch_2").unlink(), "train", {"images": 8, "batches without a file left out": 1}),
    "a file that is no PNG": (
        "objectnet",
        lambda source: built.write(source / "images" / "chair" / "b.jpg", b""),
        "test",
        {"images": 1, "files that are no PNG left out": 1},
    ),
    "a link that died": (
        "yoga82",
        lambda source: built.write(source / "yoga_train.txt", "Tree/train.jpg,0,0,0\nTree/gone.jpg,0,0,0\n"),
        "train",
        {"images": 1, "images without their files left out": 1},
    ),
    "a map without its image": (
        "ade20k_parts, prepared",
        lambda source: built.write(source / "ann" / "train" / "b.png", b""),
        "train",
        {"images": 1, "images without their files left out": 1},
    ),
    "an image of the list": (
        "lip",
        lambda source: built.write(source / "train_id.txt", "train\ngone\n"),
        "train",
        {"images": 1, "images without their files left out": 1},
    ),
    "an annotation of the list": (
        "pascal_parts",
        lambda source: built.write(source / "ImageSets" / "Main" / "train.txt", "train\ngone\n"),
        "train",
        {"images": 1, "images without their files left out": 1},
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_left_out_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str) -> None:
    name, lose, split, counts = LOSSES[loss]
    layout = LAYOUTS[name]
    source = tmp_path / "source"
    layout.write(source)
    lose(source)
    assert run(layout, source, tmp_path / layout.name) == 0
    assert json.loads((tmp_path / layout.name / "counts.json").read_text())[split] == counts
    reason = next(reason.removesuffix(" left out") for reason in counts if reason.endswith(" left out"))
    assert f"left out of {split}: 1 {reason}\n" in capsys.readouterr().err
