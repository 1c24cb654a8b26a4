from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import ValidationError

from harness.data import manifest as module
from harness.data.images import MAX_PIXELS
from harness.data.manifest import Manifest, load_manifest, shard_url
from harness.errors import ManifestError, RequestError

SHA = "0" * 64
PLAIN: dict[str, Any] = {
    "schema": 1,
    "dataset": "toy",
    "version": "1",
    "license": "CC0-1.0",
    "source": "made for a test",
    "classes": ["cat", "dog"],
    "parts": ["head", "tail"],
    "part_of": {"head": None, "tail": "dog"},
    "annotations": ["label", "keypoints", "object"],
    "mask_classes": {"object": ["background", "figure"]},
    "splits": {
        "train": {
            "samples": 5,
            "shards": [
                {"file": "train-00000.tar", "samples": 3, "bytes": 10240, "sha256": SHA},
                {"file": "train-00001.tar", "samples": 2, "bytes": 10240, "sha256": SHA},
            ],
        },
        "test": {"samples": 1, "official": "val", "shards": [{"file": "deep/test-00000.tar", "samples": 1, "bytes": 10240, "sha256": SHA}]},
    },
}


def write(root: Path, content: object, dataset: str = "toy") -> str:
    folder = root / dataset
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(root)


def edited(edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content = copy.deepcopy(PLAIN)
    edit(content)
    return content


def test_a_manifest_is_read_whole(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, PLAIN), "toy")
    assert manifest.schema_version == 1
    assert manifest.classes == ("cat", "dog")
    assert manifest.part_of == {"head": None, "tail": "dog"}
    assert manifest.mask_classes == {"object": ("background", "figure")}
    assert manifest.split("test").official == "val"
    assert manifest.split("train").official is None
    assert [shard.samples for shard in manifest.split("train").shards] == [3, 2]
    assert shard_url(str(tmp_path), "toy", manifest.split("test").shards[0]) == f"{tmp_path}/toy/deep/test-00000.tar"


def test_a_manifest_may_leave_out_what_it_does_not_have(tmp_path: Path) -> None:
    content = edited(lambda m: [m.pop(key) for key in ("parts", "part_of", "mask_classes")])
    content["annotations"] = ["label"]
    manifest = load_manifest(write(tmp_path, content), "toy")
    assert (manifest.parts, manifest.part_of, manifest.mask_classes) == ((), {}, {})


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path / "a", PLAIN), "toy")
    again = load_manifest(write(tmp_path / "b", manifest.to_json()), "toy")
    assert again == manifest
    assert again.to_json() == manifest.to_json()


def test_the_manifest_of_the_docs_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    shown = text.split("## Shards of your own")[1].split("```json")[1].split("```")[0]
    manifest = load_manifest(write(tmp_path, shown.replace("what sha256sum prints: 64 digits", SHA), "birds"), "birds")
    assert manifest.rules.annotations == {"label"}


def test_what_a_manifest_does_not_state_is_not_in_its_text(tmp_path: Path) -> None:
    plain = load_manifest(write(tmp_path / "a", PLAIN), "toy")
    assert list(json.loads(plain.to_json())) == [
        *("schema", "dataset", "version", "license", "source", "classes", "parts", "part_of"),
        *("annotations", "mask_classes", "levels", "counterparts", "splits"),
    ]
    assert json.loads(plain.to_json())["splits"]["train"]["official"] is None
    assert plain.decoding == {}
    assert (plain.rules.value_range, plain.rules.max_pixels) == (None, MAX_PIXELS)


def test_a_stated_range_and_bound_are_kept_and_tell_banks_apart(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path / "a", {**PLAIN, "range": [0, 4095], "max_pixels": 10**9}), "toy")
    assert (manifest.rules.value_range, manifest.rules.max_pixels) == ((0, 4095), 10**9)
    assert manifest.decoding == {"decoded_range": [0, 4095], "decoded_max_pixels": 10**9}
    assert load_manifest(write(tmp_path / "b", manifest.to_json()), "toy") == manifest
    assert load_manifest(write(tmp_path / "c", {**PLAIN, "range": [-1.5, 2]}), "toy").decoding == {"decoded_range": [-1.5, 2]}


def test_a_manifest_cannot_be_changed(tmp_path: Path) -> None:
    manifest = load_manifest(write(tmp_path, PLAIN), "toy")
    with pytest.raises(ValidationError):
        manifest.version = "2"  # type: ignore[misc]


def test_a_manifest_of_an_editor_that_writes_a_byte_order_mark_is_one(tmp_path: Path) -> None:
    root = write(tmp_path, edited(lambda m: None))
    file = tmp_path / "toy" / "manifest.json"
    plain = load_manifest(root, "toy")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_manifest(root, "toy") == plain


def test_a_url_is_read_like_a_folder() -> None:
    with fsspec.open("memory://manifests/toy/manifest.json", "w") as file:
        file.write(json.dumps(PLAIN))
    assert load_manifest("memory://manifests", "toy") == load_manifest("memory://manifests/", "toy")


def _shard(content: dict[str, Any], **changes: object) -> None:
    content["splits"]["train"]["shards"][0].update(changes)


WRONG: dict[str, tuple[object, str]] = {
    "empty file": ("", "expected JSON"),
    "not JSON": ("{", "expected JSON"),
    "NaN": (json.dumps(PLAIN).replace('"samples": 5', '"samples": NaN'), "samples"),
    "binary": ("\x00\x01", "expected JSON"),
    "deeply nested": ("[" * 100_000, "expected JSON"),
    "a list": ([PLAIN], "expected a JSON object, got list"),
    "a key given twice": (json.dumps(PLAIN)[:-1] + ', "dataset": "toy"}', "got 'dataset' twice"),
    "another schema": (edited(lambda m: m.update(schema=2)), "expected manifest schema 1, got 2"),
    "schema as text": (edited(lambda m: m.update(schema="1")), "expected manifest schema 1, got '1'"),
    "schema as truth": (edited(lambda m: m.update(schema=True)), "expected manifest schema 1, got True"),
    "no schema": (edited(lambda m: m.pop("schema")), "expected manifest schema 1, got 'none'"),
    "missing key": (edited(lambda m: m.pop("license")), "license: expected this key"),
    "unknown key": (edited(lambda m: m.update(clases=[])), "did you mean 'classes'"),
    "unknown shard key": (edited(lambda m: _shard(m, sha512=SHA)), "did you mean 'sha256'"),
    "another data set": (edited(lambda m: m.update(dataset="other")), "expected the manifest of 'toy', got that of 'other'"),
    "a class twice": (edited(lambda m: m.update(classes=["cat", "cat"])), "got 'cat' twice"),
    "a part twice": (edited(lambda m: m.update(parts=["head", "tail", "head"])), "got 'head' twice"),
    "labels without classes": (edited(lambda m: m.update(classes=[])), "at least one of classes"),
    "keypoints without parts": (edited(lambda m: m.update(parts=[], part_of={})), "at least one of parts"),
    "unknown annotation": (edited(lambda m: m.update(annotations=["label", "mask"])), "annotations.1"),
    "part_of an unknown part": (edited(lambda m: m["part_of"].update(heads=None)), "did you mean 'head'"),
    "mask names without masks": (edited(lambda m: m["mask_classes"].update(part=["a"])), "not one of annotations"),
    "no splits": (edited(lambda m: m.update(splits={})), "at least one split"),
    "split of a wrong name": (edited(lambda m: m["splits"].update({"../x": m["splits"]["test"]})), "splits"),
    "too few samples": (edited(lambda m: m["splits"]["train"].update(samples=6)), "expected shards of 6 samples in all, got 5"),
    "negative samples": (edited(lambda m: _shard(m, samples=-3)), "greater than or equal to 0"),
    "samples as a float": (edited(lambda m: _shard(m, samples=3.0)), "got 3.0"),
    "samples as text": (edited(lambda m: _shard(m, samples="3")), "got '3'"),
    "samples as truth": (edited(lambda m: _shard(m, samples=True)), "got True"),
    "short digest": (edited(lambda m: _shard(m, sha256="abc")), "got 'abc'"),
    "upper-case digest": (edited(lambda m: _shard(m, sha256="A" * 64)), "sha256"),
    "shard twice": (edited(lambda m: _shard(m, file="train-00001.tar")), "got 'train-00001.tar' twice"),
    "shard in two splits": (edited(lambda m: _shard(m, file="deep/test-00000.tar")), "got 'deep/test-00000.tar' twice"),
    "shard above the folder": (edited(lambda m: _shard(m, file="../train.tar")), "got '../train.tar'"),
    "shard above, inside": (edited(lambda m: _shard(m, file="a/../../train.tar")), "below the data set's folder"),
    "absolute shard": (edited(lambda m: _shard(m, file="/etc/train.tar")), "got '/etc/train.tar'"),
    "shard as a URL": (edited(lambda m: _shard(m, file="http://host/train.tar")), "below the data set's folder"),
    "shard with a backslash": (edited(lambda m: _shard(m, file="..\\train.tar")), "below the data set's folder"),
    "shard with a newline": (edited(lambda m: _shard(m, file="train.tar\n")), "below the data set's folder"),
    "shard that is no tar": (edited(lambda m: _shard(m, file="train.zip")), "expected a .tar"),
    "compressed shard": (edited(lambda m: _shard(m, file="train.tar.gz")), "expected a plain .tar, got the compressed 'train.tar.gz'; decompress it"),
    "compressed shard, short": (edited(lambda m: _shard(m, file="train.tgz")), "expected a plain .tar, got the compressed 'train.tgz'"),
    "range of one value": (edited(lambda m: m.update(range=[0])), "range"),
    "range upside down": (edited(lambda m: m.update(range=[4095, 0])), "expected range to be [low, high], low below high, got [4095.0, 0.0]"),
    "range without width": (edited(lambda m: m.update(range=[7, 7])), "low below high"),
    "range without end": (json.dumps(edited(lambda m: m.update(range=[0, "E"]))).replace('"E"', "1e999"), "range.1"),
    "range too wide for numbers": (edited(lambda m: m.update(range=[-1.7e308, 1.7e308])), "low below high"),
    "range of text": (edited(lambda m: m.update(range=["0", "1"])), "range.0"),
    "a key of two lines": (edited(lambda m: m.update({"a\nb": 1})), "a b: unknown key"),
    "no pixels": (edited(lambda m: m.update(max_pixels=0)), "max_pixels"),
    "pixels as a float": (edited(lambda m: m.update(max_pixels=1e6)), "max_pixels"),
}


@pytest.mark.parametrize(("content", "complaint"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_manifest_is_told_in_one_line(tmp_path: Path, content: object, complaint: str) -> None:
    root = write(tmp_path, content)
    with pytest.raises(ManifestError) as caught:
        load_manifest(root, "toy")
    message = str(caught.value)
    assert complaint in message
    assert message.startswith(f"{root}/toy/manifest.json: ")
    assert "\n" not in message
    assert len(message) < 1000
    assert "recipe" not in message or "correct this file, or" in message  # whoever wrote it by hand has no recipe


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["splits"]["train"]["shards"][0].pop("sha256"), "shards.0.sha256: expected this key, got none (what `sha256sum FILE` prints)"),
        (
            lambda m: m["splits"]["train"]["shards"][0].pop("bytes"),
            "shards.0.bytes: expected this key, got none (the file's size: `stat -c %s FILE`)",
        ),
        (lambda m: m.pop("annotations"), "annotations: expected this key, got none (a list of label, boxes, keypoints, object, part,"),
        (lambda m: m.pop("schema"), "expected manifest schema 1, got 'none'; write \"schema\": 1 into it"),
    ],
)
def test_who_writes_a_manifest_by_hand_is_told_what_to_write(tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(tmp_path, edited(edit)), "toy")
    assert message in str(caught.value)


@pytest.mark.parametrize("dataset", ["", "..", ".", "../toy", "/toy", "toy/..", "a b", "toy\n", "x" * 200])
def test_a_data_set_name_stays_below_the_root(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(ManifestError, match="data set: expected a name"):
        load_manifest(write(tmp_path, PLAIN), dataset)


def test_a_missing_data_set_names_its_neighbours(tmp_path: Path) -> None:
    root = write(tmp_path, PLAIN)
    with pytest.raises(ManifestError, match=r"no such file.*holds toy; did you mean 'toy'"):
        load_manifest(root, "toys")
    with pytest.raises(ManifestError, match=r"no such file.*holds no data set"):
        load_manifest(str(tmp_path / "nowhere"), "toy")


@pytest.mark.parametrize("root", ["nosuchprotocol://bucket", "s3://bucket"])
def test_a_file_system_that_cannot_be_had_is_a_request_error(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RequestError, match="expected a readable manifest"):
        load_manifest(root, "toy")


def test_a_folder_in_the_manifests_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "toy" / "manifest.json").mkdir(parents=True)
    with pytest.raises(ManifestError, match="expected a readable manifest, got IsADirectoryError"):
        load_manifest(str(tmp_path), "toy")


def test_an_endless_manifest_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(ManifestError, match="expected at most 100 bytes"):
        load_manifest(write(tmp_path, PLAIN), "toy")


def test_an_unknown_split_names_the_nearest() -> None:
    manifest = Manifest.model_validate_json(json.dumps(PLAIN))
    with pytest.raises(ManifestError, match="one of the splits train, test, got 'tests'; did you mean 'test'"):
        manifest.split("tests")
