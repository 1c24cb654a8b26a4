from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from harness.core import Box, Keypoint
from harness.data.manifest import load_manifest
from harness.errors import HarnessError, RequestError, RunError, ShardError
from shards import recipe, tars
from shards.counts import Counts, Unfit
from shards.recipe import DataSet
from shards.tars import Record
from tests.helpers import built
from tests.helpers.toy import counted, data_set, picture, sample


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def left_behind(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path != out]


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_a_data_set_is_published_with_a_manifest_that_tells_its_bytes(tmp_path: Path) -> None:
    manifest = recipe.build(data_set(), tmp_path / "toy")
    assert load_manifest(str(tmp_path), "toy") == manifest
    assert sorted(tree(tmp_path / "toy")) == [
        "LICENSE.md",
        "manifest.json",
        "test-00000.tar",
        "train-00000.tar",
        "train-00001.tar",
        "train-00002.tar",
    ]
    assert manifest.split("test").official == "val"
    assert [shard.samples for shard in manifest.split("train").shards] == [3, 3, 4]
    for split in manifest.splits.values():
        for shard in split.shards:
            content = (tmp_path / "toy" / shard.file).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
    assert left_behind(tmp_path / "toy") == []


def test_members_carry_nothing_of_this_machine_and_hold_what_the_record_said(tmp_path: Path) -> None:
    recipe.build(data_set(), tmp_path / "toy")
    with tarfile.open(tmp_path / "toy" / "train-00000.tar") as tar:
        infos = tar.getmembers()
        content = {info.name: tar.extractfile(info).read() for info in infos}  # type: ignore[union-attr]
    assert [info.name for info in infos[:4]] == ["s000.png", "s000.json", "s000.object.png", "s000.part.png"]
    assert {(info.mtime, info.uid, info.gid, info.mode, info.uname, info.gname) for info in infos} == {(0, 0, 0, 0o644, "", "")}
    assert content["s000.png"] == picture(0)
    assert json.loads(content["s000.json"]) == {
        "label": 0,
        "number": 0,
        "boxes": [{"x": 4, "y": 4, "width": 8, "height": 8, "label": 0}],
        "keypoints": [{"part": "head", "x": 5.5, "y": 6.0, "visible": True}],
    }
    for kind, values in (("object", {0, 1}), ("part", {0, 300})):
        mask = np.asarray(Image.open(io.BytesIO(content[f"s000.{kind}.png"])))
        assert set(np.unique(mask)) == values
        assert mask[4, 4] == max(values)
        assert mask[3, 4] == 0


def test_the_bytes_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 3):
        recipe.build(data_set(), tmp_path / str(workers) / "toy", workers=workers)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


@pytest.mark.parametrize(("extension", "format"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_images_are_stored_as_they_are_given(tmp_path: Path, extension: Any, format: str) -> None:
    def make(number: int) -> Record:
        return replace(sample(number), image=picture(number, format), extension=extension)

    recipe.build(data_set(make), tmp_path / "toy")
    with tarfile.open(tmp_path / "toy" / "test-00000.tar") as tar:
        assert tar.extractfile(f"s100.{extension}").read() == picture(100, format)  # type: ignore[union-attr]


@pytest.mark.parametrize("leave_out", [False, True])
def test_an_empty_split_is_refused_whatever_flags(tmp_path: Path, leave_out: bool) -> None:
    built.write(tmp_path / "source" / "deep" / "er" / "a.JPEG", b"")
    with pytest.raises(RequestError) as caught:
        recipe.build(data_set(splits={"train": (1,), "test": ()}), tmp_path / "out" / "toy", leave_out=leave_out, source=tmp_path / "source")
    assert str(caught.value) == (
        f"toy: expected samples in every split, from toys/*.png, got none in test (val); {tmp_path / 'source'} has one image, deep/er/a.JPEG"
    )
    assert not (tmp_path / "out").exists()


def test_a_split_of_which_everything_is_left_out_is_refused_with_the_reasons(tmp_path: Path) -> None:
    counts = Counts()
    counts.leave_out("train", "boxes without area", 3)
    toy = data_set(unfit, splits={"train": (5, 7), "test": (100,)}, counts=counts)
    with pytest.raises(RequestError, match=r"got none in train; left out of train: 3 boxes without area, 2 unfit samples \(map 5: "):
        recipe.build(toy, tmp_path / "toy", leave_out=True)
    assert list(tmp_path.iterdir()) == []


def test_what_fails_before_a_shard_is_whole_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="map 5"):
        recipe.build(data_set(unfit, splits={"train": (5,), "test": (100,)}), tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_looked_into_no_further_than_a_message_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe.images_of(tmp_path) == "no image"
    for number in range(6):
        built.write(tmp_path / f"d{number}" / "notes.txt", "")
    monkeypatch.setattr(recipe, "LOOKED_AT", 7)
    assert recipe.images_of(tmp_path) == "no image among its first 8 entries"
    built.write(tmp_path / "d0" / "b.png", "")
    assert recipe.images_of(tmp_path) == "images such as d0/b.png"


# --- what is caught before it is published ----------------------------------------------------------------------------


def changed(number: int, at: int, **changes: Any) -> Record:
    """The sample, with something wrong with the one numbered `at`."""
    return replace(sample(number), **changes) if number == at else sample(number)


def failing(number: int) -> Record:
    if number == 5:
        raise OSError("no such picture")
    return sample(number)


WRONG: dict[str, tuple[Callable[[int], Record], str]] = {
    "truncated image": (partial(changed, at=5, image=picture(5)[:200]), "train-00001.tar: s005: expected a readable PNG"),
    "empty image": (partial(changed, at=5, image=b""), "s005: expected a readable PNG"),
    "image of another format": (partial(changed, at=5, image=picture(5, "JPEG")), "s005: expected a readable PNG"),
    "duplicate key beside it": (partial(changed, at=5, key="s004"), "got 's004' twice"),
    "duplicate key, same shard": (partial(changed, at=5, key="s003"), "got 's003' twice"),
    "duplicate key, other shard": (partial(changed, at=5, key="s000"), "got 's000' twice"),
    "duplicate key, other split": (partial(changed, at=5, key="s100"), "got 's100' twice"),
    "key with a dot": (partial(changed, at=5, key="a.b"), "got 'a.b'"),
    "key with a slash": (partial(changed, at=5, key="../b"), "got '../b'"),
    "unknown extension": (partial(changed, at=5, extension="gif"), "got 'gif'"),
    "label out of range": (partial(changed, at=5, label=2), "expected a label from 0 to 1, got 2"),
    "no label": (partial(changed, at=5, label=None), "expected a label from 0 to 1, got None"),
    "unknown part": (partial(changed, at=5, keypoints=(Keypoint(part="wing", x=1, y=1),)), "got 'wing'"),
    "keypoint outside": (partial(changed, at=5, keypoints=(Keypoint(part="head", x=17, y=1),)), "got (17, 1)"),
    "no object mask": (partial(changed, at=5, object_mask=None), "expected object mask, as its data set says, got none"),
    "mask of another size": (partial(changed, at=5, part_mask=np.zeros((4, 4), np.uint8)), "expected the image's size 16×16, got 4×4"),
    "mask value out of range": (partial(changed, at=5, object_mask=np.full((16, 16), 2, np.uint8)), "expected values below 2, got 2"),
    "mask of floats": (partial(changed, at=5, object_mask=np.zeros((16, 16))), "got float64"),
    "a box of NaN": (partial(changed, at=5, boxes=(Box(x=float("nan"), y=4, width=8, height=8, label=1),)), "s005: expected finite numbers"),
    "unreadable source": (failing, "expected a record of 5, got OSError: no such picture"),
}


@pytest.mark.parametrize(("make", "complaint"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_sample_is_named_and_nothing_is_published(tmp_path: Path, make: Callable[[int], Record], complaint: str) -> None:
    with pytest.raises((RequestError, ShardError)) as caught:
        recipe.build(data_set(make), tmp_path / "toy")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "toy").exists()


def unfit(number: int) -> Record:
    if number in (5, 7):
        raise RequestError(f"map {number}: expected labels from 0 to 1, got 2")
    return sample(number)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_unfit_can_be_left_out_and_is_counted(tmp_path: Path, workers: int) -> None:
    with pytest.raises(RequestError, match="map 5"):
        recipe.build(data_set(unfit), tmp_path / "toy", workers=workers)
    counts = Counts()
    counts.keep("train", "boxes", 3)
    toy = data_set(unfit, counts=counts)
    manifest = recipe.build(toy, tmp_path / "toy", workers=workers, leave_out=True)
    assert manifest.version == "1, without 2 unfit train"
    assert manifest.split("train").samples == 8
    assert [shard.samples for shard in manifest.split("train").shards] == [3, 2, 3]
    assert manifest.split("test").samples == 3
    assert json.loads((tmp_path / "toy" / "counts.json").read_text()) == {"train": {"boxes": 3, "unfit samples left out": 2}}


def test_what_was_left_out_before_is_not_left_out_where_it_may_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stopped:
        stopped.setattr(recipe, "refuse_repeated_keys", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            recipe.build(data_set(unfit), tmp_path / "toy", leave_out=True)
    with pytest.raises(RequestError, match="map 5"):
        recipe.build(data_set(unfit), tmp_path / "toy")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_of_unfit_samples_alone_is_not_published(tmp_path: Path, workers: int) -> None:
    toy = data_set(unfit, splits={"train": (5, 7, 8, 9), "test": (100,)}, samples_per_shard=2)
    manifest = recipe.build(toy, tmp_path / "toy", leave_out=True, workers=workers)
    assert [(shard.file, shard.samples) for shard in manifest.split("train").shards] == [("train-00001.tar", 2)]
    assert sorted(tree(tmp_path / "toy")) == ["LICENSE.md", "counts.json", "manifest.json", "test-00000.tar", "train-00001.tar"]


def crossed(number: int) -> Record:
    if number in (5, 7):
        raise Unfit(f"{number} is crossed", "crossed numbers", lawful=number == 7)
    return sample(number)


def test_what_every_copy_of_a_data_set_lacks_is_left_out_without_being_asked(tmp_path: Path) -> None:
    for workers in (1, 2):
        with pytest.raises(RequestError, match=r"^5 is crossed$") as caught:
            recipe.build(data_set(crossed), tmp_path / "toy", workers=workers)
        assert type(caught.value) is RequestError
    manifest = recipe.build(data_set(crossed, splits={"train": (6, 7), "test": (100,)}), tmp_path / "toy")
    assert (manifest.version, manifest.split("train").samples) == ("1", 1)
    assert json.loads((tmp_path / "toy" / "counts.json").read_text()) == {"train": {"crossed numbers left out": 1}}
    manifest = recipe.build(data_set(crossed), tmp_path / "all" / "toy", leave_out=True)
    assert manifest.version == "1, without 1 unfit train"
    assert json.loads((tmp_path / "all" / "toy" / "counts.json").read_text()) == {"train": {"crossed numbers left out": 2}}


@pytest.mark.parametrize(
    "changes",
    [
        {"image": picture(5)[:200]},
        {"key": "no.key"},
        {"key": "k" * 200},
        {"label": 7},
        {"boxes": (Box(x=float("inf"), y=4, width=8, height=8, label=1),)},
        {"object_mask": np.zeros((3, 3), np.uint8)},
    ],
)
def test_a_sample_that_does_not_read_back_is_left_out_alone_where_it_may_be(tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest = recipe.build(data_set(partial(changed, at=5, **changes)), tmp_path / "toy", leave_out=True)
    assert (manifest.version, manifest.split("train").samples) == ("1, without 1 unfit train", 9)
    assert json.loads((tmp_path / "toy" / "counts.json").read_text()) == {"train": {"samples that do not read back left out": 1}}


def unfit_from_five(number: int) -> Record:
    if 5 <= number < 100:
        raise RequestError(f"map {number} is unfit")
    return sample(number)


def test_what_is_left_out_is_told_in_a_line_per_split_and_named_up_to_ten_times(tmp_path: Path) -> None:
    terminal = io.StringIO()
    recipe.build(data_set(unfit_from_five, count=30), tmp_path / "toy", leave_out=True, console=Console(file=terminal, width=200))
    lines = [line.strip() for line in terminal.getvalue().splitlines() if "left out" in line]
    assert lines[:2] == ["left out of train: map 5 is unfit", "left out of train: map 6 is unfit"]
    assert lines[10:] == ["left out of train: 15 more, which counts.json counts", "left out of train: 25 unfit samples"]


def test_a_source_that_cannot_be_read_is_an_error_whatever_may_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="OSError: no such picture"):
        recipe.build(data_set(failing), tmp_path / "toy", leave_out=True)  # no refusal by the recipe


def test_a_worker_tells_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="s005: expected a readable PNG"):
        recipe.build(data_set(partial(changed, at=5, image=b"")), tmp_path / "toy", workers=2)
    assert not (tmp_path / "toy").exists()


def test_what_the_data_set_does_not_declare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="expected no keypoints"):
        recipe.build(data_set(annotations=("label", "boxes", "object", "part")), tmp_path / "toy")
    with pytest.raises(ShardError, match="expected no part mask"):
        recipe.build(data_set(annotations=("label", "boxes", "keypoints", "object")), tmp_path / "toy")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"name": "a/b"}, "correct the recipe"),
        ({"license": ""}, "correct the recipe"),
        ({"part_of": {"wing": None}}, "correct the recipe"),
        ({"classes": ("even", "even")}, "expected classes that differ, got 'even' twice; the source gives these names: rename them there"),
        ({"classes": ("even", "")}, "the source gives these names: rename them there"),
        ({"parts": ("head", "tail", "head")}, "the source gives these names: rename them there"),
    ],
)
def test_a_manifest_that_nobody_could_read_is_not_written(tmp_path: Path, changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(RequestError, match=remedy):
        recipe.build(data_set(**changes), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()


def finished_but(tmp_path: Path, spoil: Callable[[Path], None]) -> Path:
    """A build that failed at its last shard, so that the others wait beside the place; then one of those is spoilt."""
    with pytest.raises(ShardError):
        recipe.build(data_set(partial(changed, at=101, image=b"")), tmp_path / "toy")
    tar = tmp_path / ".toy.building" / "data" / "train-00000.tar"
    spoil(tar)
    return tar


def cut_last_sample(tar: Path) -> None:
    """As a cut at a member's boundary leaves it: no exception in a tar reader, and samples gone."""
    with tarfile.open(tar) as source:
        boundary = source.getmember("s002.png").offset
    os.truncate(tar, boundary)


def test_a_spoilt_shard_of_an_earlier_try_is_made_again(tmp_path: Path) -> None:
    for spoil in (cut_last_sample, Path.unlink, lambda tar: tar.write_bytes(b"")):
        finished_but(tmp_path, spoil)
        recipe.build(data_set(), tmp_path / "toy")
        recipe.build(data_set(), tmp_path / "other" / "toy")
        assert tree(tmp_path / "toy") == tree(tmp_path / "other" / "toy")
        for folder in ("toy", "other/toy"):
            for path in (tmp_path / folder).iterdir():
                path.unlink()


def test_a_shard_that_does_not_hold_what_was_written_is_caught(tmp_path: Path) -> None:
    rules = recipe.build(data_set(), tmp_path / "toy").rules
    tar = tmp_path / "toy" / "train-00000.tar"
    tars.verify_shard(tar, ["s000", "s001", "s002"], rules)
    with pytest.raises(ShardError, match="expected 4 samples"):
        tars.verify_shard(tar, ["s000", "s001", "s002", "s003"], rules)
    with pytest.raises(ShardError, match="expected 3 samples with the keys"):
        tars.verify_shard(tar, ["s000", "s002", "s001"], rules)
    cut_last_sample(tar)
    with pytest.raises(ShardError, match="expected zeros at its end"):
        tars.verify_shard(tar, ["s000", "s001"], rules)


# --- going on, and replacing ------------------------------------------------------------------------------------------


def test_finished_shards_are_kept_and_others_made(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RequestError, match="stopped here"):
        recipe.build(data_set(partial(counted, log=log, fail=7)), tmp_path / "toy")
    assert log.read_text().split() == [str(number) for number in range(8)]
    log.unlink()
    recipe.build(data_set(partial(counted, log=log)), tmp_path / "toy")
    assert log.read_text().split() == [str(number) for number in (6, 7, 8, 9, 100, 101, 102)]


def test_nothing_is_kept_of_a_build_of_other_content(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RequestError, match="stopped here"):
        recipe.build(data_set(partial(counted, log=log, fail=102)), tmp_path / "toy")
    log.unlink()
    recipe.build(data_set(partial(counted, log=log), content="toy 2"), tmp_path / "toy")
    assert len(log.read_text().split()) == 13


KILLED = """
import multiprocessing, os, signal, sys
from functools import partial
from pathlib import Path
from tests.helpers.toy import counted, data_set
from shards import recipe, tars

def make(number):
    if number == 8:
        os.kill({victim}, signal.SIGKILL)
    return counted(number, Path({log!r}))

if __name__ == "__main__":
    recipe.build(data_set(make), Path({out!r}), workers={workers})
"""


def run_killed(tmp_path: Path, victim: str, workers: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "build.py"
    out, log = tmp_path / "toy", tmp_path / "log"
    script.write_text(KILLED.format(victim=victim, log=str(log), out=str(out), workers=workers))
    root = str(Path(__file__).parents[2])
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=120)


def test_a_build_killed_in_the_middle_goes_on_where_it_stopped(tmp_path: Path) -> None:
    killed = run_killed(tmp_path, "os.getpid()", workers=1)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "toy").exists()
    log = tmp_path / "log"
    assert log.read_text().split() == [str(number) for number in range(8)]
    log.unlink()
    recipe.build(data_set(partial(counted, log=log)), tmp_path / "toy")
    assert log.read_text().split()[:4] == ["6", "7", "8", "9"]
    recipe.build(data_set(), tmp_path / "other" / "toy")
    assert tree(tmp_path / "toy") == tree(tmp_path / "other" / "toy")
    assert sorted(left_behind(tmp_path / "toy")) == ["build.py", "log", "other"]


def test_a_worker_that_is_killed_is_told(tmp_path: Path) -> None:
    killed = run_killed(tmp_path, "os.getpid()", workers=2)
    assert killed.returncode == 1
    assert f"{RunError.__name__}: a worker process died" in killed.stderr
    assert not (tmp_path / "toy").exists()


def test_workers_do_not_outlive_a_build_that_is_killed(tmp_path: Path) -> None:
    # the call returns only when nobody holds the build's stderr any more: neither the build nor any worker of it
    killed = run_killed(tmp_path, "multiprocessing.parent_process().pid", workers=2)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "toy").exists()
    recipe.build(data_set(), tmp_path / "toy")
    recipe.build(data_set(), tmp_path / "other" / "toy")
    assert tree(tmp_path / "toy") == tree(tmp_path / "other" / "toy")


def test_two_builds_of_one_place_do_not_mix(tmp_path: Path) -> None:
    def meanwhile(number: int) -> Record:
        recipe.build(data_set(), tmp_path / "toy")
        return sample(number)

    with pytest.raises(RequestError, match="expected no other build"):
        recipe.build(data_set(meanwhile), tmp_path / "toy")


def test_the_same_data_set_again_changes_nothing(tmp_path: Path) -> None:
    recipe.build(data_set(), tmp_path / "toy")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").iterdir()}
    recipe.build(data_set(), tmp_path / "toy")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "toy").iterdir()} == before
    assert left_behind(tmp_path / "toy") == []


def test_another_version_replaces_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    recipe.build(data_set(), out)
    before = tree(out)
    with pytest.raises(RequestError, match="say --overwrite"):
        recipe.build(data_set(version="2"), out)
    assert tree(out) == before
    recipe.build(data_set(version="2", count=5), out, overwrite=True)
    assert load_manifest(str(tmp_path), "toy").version == "2"
    assert sorted(tree(out)) == ["LICENSE.md", "manifest.json", "test-00000.tar", "train-00000.tar", "train-00001.tar"]
    assert left_behind(out) == []


def test_a_failed_replacement_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    recipe.build(data_set(), out)
    before = tree(out)
    with pytest.raises(ShardError):
        recipe.build(data_set(partial(changed, at=5, image=b"")), out, overwrite=True)
    assert tree(out) == before


def test_a_replacement_that_died_between_its_renames_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    recipe.build(data_set(), out)
    before = tree(out)
    work = tmp_path / ".toy.building"
    work.mkdir()
    out.rename(work / "replaced")
    with pytest.raises(ShardError):
        recipe.build(data_set(partial(changed, at=5, image=b"")), out)
    assert tree(out) == before


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    for make in (sample, failing):
        with pytest.raises(RequestError, match="an empty folder or a data set"):
            recipe.build(data_set(make), out, overwrite=True)
    assert tree(out) == {"letter.txt": b"dear"}
    file = tmp_path / "file"
    file.write_text("dear")
    with pytest.raises(RequestError, match="a file or a link"):
        recipe.build(data_set(), file, overwrite=True)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def test_the_command_builds_and_says_so(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def describe(folder: Path) -> DataSet[int]:
        seen.append(folder)
        return data_set()

    status = recipe.main(describe, "Builds a toy.", ["--source", str(source), "--out", str(tmp_path / "toy"), "--workers", "1"])
    assert status == 0
    assert seen == [source]
    assert capsys.readouterr().out == f"{tmp_path / 'toy'}: toy 1, train 10, test 3\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--source"),
        (["--source", "SOURCE"], "--out"),
        (["--source", "SOURCE", "--out", "OUT", "--workers", "many"], "invalid int value: 'many'"),
        (["--source", "SOURCE", "--out", "OUT", "--workers", "0"], "expected at least 1, got 0"),
        (["--source", "SOURCE", "--out", "OUT", "--worker", "2"], "--worker"),
        (["--source", "NOWHERE", "--out", "OUT"], "expected a folder"),
        (["--source", "SOURCE", "--out", "SOURCE/file/out"], "a place where a folder can be made"),
        (["--source", "SOURCE", "--out", "SOURCE"], "an empty folder or a data set"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    (source / "file").write_text("")
    places = {"SOURCE": str(source), "OUT": str(tmp_path / "toy"), "NOWHERE": str(tmp_path / "nowhere")}
    given = [places.get(word, word.replace("SOURCE", str(source))) for word in arguments]
    try:
        status = recipe.main(lambda _: data_set(), "Builds a toy.", given)
    except SystemExit as stopped:
        status = int(str(stopped.code))
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert complaint in lines[-1]
    assert len([line for line in lines if "building" not in line]) == 1
    assert not (tmp_path / "toy").exists()


def test_errors_of_a_recipe_are_one_line_and_status_2(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def describe(folder: Path) -> DataSet[int]:
        raise HarnessError("expected a picture,\ngot none")

    assert recipe.main(describe, "Builds a toy.", ["--source", str(source), "--out", str(tmp_path / "toy")]) == 2
    assert capsys.readouterr().err == "HarnessError: expected a picture, got none\n"


def test_whatever_a_source_does_to_a_recipe_is_one_line_that_says_where(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no\ntext"), RecursionError("deep"), KeyError("x"), MemoryError()):

        def describe(folder: Path, error: Exception = error) -> DataSet[int]:
            raise error

        assert recipe.main(describe, "Builds a toy.", ["--source", str(source), "--out", str(tmp_path / "toy")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"RequestError: {source}: expected the data set as its makers publish it, got {type(error).__name__}")


def test_names_that_are_no_text_anywhere_are_one_line(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = data_set(classes=("even", "odd\ud800"))
    assert recipe.main(lambda _: toy, "Builds a toy.", ["--source", str(source), "--out", str(tmp_path / "toy"), "--workers", "1"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.strip() and "building" not in line]) == 1
    assert not (tmp_path / "toy").exists()


def test_the_command_says_what_was_left_out(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counts()
    counts.keep("val", "boxes", 7)
    counts.leave_out("val", "boxes without area", 2)
    arguments = ["--source", str(source), "--out", str(tmp_path / "toy"), "--workers", "1"]
    assert recipe.main(lambda _: data_set(counts=counts), "Builds a toy.", arguments) == 0
    assert "left out of val: 2 boxes without area\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "toy" / "counts.json").read_text()) == {"val": {"boxes": 7, "boxes without area left out": 2}}


def test_names_that_are_no_text_reach_the_json_and_the_terminal_as_text(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    out = tmp_path / os.fsdecode(b"t\xf6y")
    make = partial(changed, at=5, about={"file": name})
    assert recipe.main(lambda _: data_set(make, name="toy"), "Builds a toy.", ["--source", str(source), "--out", str(out), "--workers", "1"]) == 0
    assert "train 10" in capsys.readouterr().out
    with tarfile.open(out / "train-00001.tar") as tar:
        assert json.loads(tar.extractfile("s005.json").read())["file"] == "caf?.png"  # type: ignore[union-attr]
