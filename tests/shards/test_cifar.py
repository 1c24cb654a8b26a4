from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.data.manifest import load_manifest
from harness.errors import RequestError
from shards import cifar, official, recipe
from tests.helpers import built
from tests.helpers.sources.cifar import array, batch, cifar_hundred, cifar_ten, listing, number, pixels, text

FILE_OF_TROUBLE = "trouble"


# --- pickles as Python 2 wrote them -----------------------------------------------------------------------------------


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return cifar_ten(tmp_path)


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    return cifar_hundred(tmp_path)


def as_image(row: np.ndarray) -> np.ndarray:
    """The archive's own description: 1024 values of red, then of green, then of blue, each row by row."""
    return np.stack([row[channel * 1024 : (channel + 1) * 1024].reshape(32, 32) for channel in range(3)], axis=-1)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_every_pixel_and_label_of_cifar_10_comes_back(ten: Path, tmp_path: Path) -> None:
    recipe.build(cifar.describe(ten, partial=True), tmp_path / "cifar10")
    train, test = (built.samples(tmp_path, "cifar10", split) for split in ("train", "test"))
    assert len(train) == 20
    assert len(test) == 3
    for seed in range(1, 6):
        for row, flat in enumerate(pixels(4, seed)):
            sample = train[f"train-data_batch_{seed}-{row:05d}"]
            assert np.array_equal(sample.image, as_image(flat))
            assert sample.label == (seed + row) % 3
    assert np.array_equal(test["test-test_batch-00002"].image, as_image(pixels(3, 6)[2]))
    assert load_manifest(str(tmp_path), "cifar10").classes == ("airplane", "automobile", "bird")


def test_cifar_100_has_its_fine_labels_and_tells_the_superclass(hundred: Path, tmp_path: Path) -> None:
    recipe.build(cifar.describe(hundred.parent, partial=True), tmp_path / "cifar100")
    train = built.samples(tmp_path, "cifar100", "train")
    assert [sample.label for sample in train.values()] == [(1 + row) % 2 for row in range(6)]
    about = built.members(tmp_path, "cifar100")["train-train-00001.json"]
    assert b'"coarse": "coarse_1", "file": "picture_s_000001.png"' in about
    assert load_manifest(str(tmp_path), "cifar100").classes == tuple(f"fine_{index}" for index in range(5))


def test_pictures_are_stored_without_loss(ten: Path, tmp_path: Path) -> None:
    recipe.build(cifar.describe(ten, partial=True), tmp_path / "cifar10")
    with Image.open(io.BytesIO(built.members(tmp_path, "cifar10")["train-data_batch_1-00000.png"])) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), as_image(pixels(4, 1)[0]))


def test_any_number_of_workers_writes_the_same_bytes(ten: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        recipe.build(cifar.describe(ten, partial=True), tmp_path / str(workers), workers=workers)
    assert built.tree(tmp_path / "1") == built.tree(tmp_path / "2")


def test_the_stand_ins_read_what_pickle_itself_reads(ten: Path) -> None:
    ours = cifar.load(ten / "data_batch_1", "")
    with warnings.catch_warnings(action="ignore"):  # NumPy has moved what the pickle names
        theirs = {key.decode(): value for key, value in pickle.loads((ten / "data_batch_1").read_bytes(), encoding="bytes").items()}
    assert theirs.keys() == ours.keys()
    assert np.array_equal(theirs.pop("data"), np.frombuffer(ours["data"].data, np.uint8).reshape(ours.pop("data").shape))
    assert theirs == ours


# --- counts -----------------------------------------------------------------------------------------------------------


def test_the_official_counts_are_demanded_unless_told_otherwise(ten: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [edition.counts for edition in cifar.EDITIONS] == [
        {"train images": 50_000, "test images": 10_000, "classes": classes} for classes in (10, 100)
    ]
    command = ["--source", str(ten), "--out", str(tmp_path / "cifar10"), "--workers", "1"]
    assert recipe.main(cifar.describe, "", command, official.options()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [
        "RequestError: cifar-10-python.tar.gz: expected 50000 train images, 10000 test images, 10 classes, got 20 train images, "
        "3 test images, 3 classes; unpack cifar-10-python.tar.gz whole, or say --partial"
    ]
    assert recipe.main(cifar.describe, "", [*command, "--partial"], official.options()) == 0
    assert "partial: 20 train images, 3 test images" in load_manifest(str(tmp_path), "cifar10").version


def test_a_missing_batch_is_named_or_left_out(ten: Path, tmp_path: Path) -> None:
    (ten / "data_batch_3").unlink()
    with pytest.raises(RequestError, match=r"data_batch_3: expected a file of the data set, got none; unpack cifar-10-python\.tar\.gz whole"):
        cifar.describe(ten)
    recipe.build(cifar.describe(ten, partial=True), tmp_path / "cifar10")
    assert len(built.samples(tmp_path, "cifar10", "train")) == 16


def test_a_folder_with_both_or_neither_is_refused(ten: Path, hundred: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="got cifar-10-batches-py and cifar-100-python; name the unpacked folder of one of them"):
        cifar.describe(tmp_path)
    with pytest.raises(RequestError, match="got neither"):
        cifar.describe(tmp_path / "elsewhere")


# --- pickles that are something else ----------------------------------------------------------------------------------


class Trouble:
    def __init__(self, call: Any, *given: Any) -> None:
        self.call, self.given = call, given

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.given


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(
    ten: Path, tmp_path: Path, name: str, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (ten / name).write_bytes(pickle.dumps({"labels": Trouble(exec, f"open({FILE_OF_TROUBLE!r}, 'w')")}, protocol))
    with pytest.raises(
        RequestError, match=rf"{name}: expected a batch of CIFAR, .*it asks for \w+\.exec, which no batch needs: nothing of it was run"
    ):
        cifar.describe(ten, partial=True)
    assert not (tmp_path / FILE_OF_TROUBLE).exists()
    pickle.loads((ten / name).read_bytes())
    assert (tmp_path / FILE_OF_TROUBLE).exists()  # so it was a pickle that runs something


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cnumpy\nload\n(U\x01xtR.", "it asks for numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "it asks for numpy.core.multiarray.fromfile"),
        (b"cnumpy\nndarray\n(M\xff\xffM\xff\xff\x86tR.", "an array that is made directly"),
        (b"ios\nsystem\n(U\x02lsi.", "expected a batch of CIFAR"),
        (b"(U\x02lsios\nsystem\n.", "it asks for os.system"),
        (b"\x80\x02U\x01xQ.", "expected a batch of CIFAR"),
        (b"\x80\x02]q\x00.", "expected a dictionary, got list"),
        (b"", "EOFError"),
        (b"\x80\x02}(U\x06labels", "expected a batch of CIFAR"),
        (b"\x89PNG\r\n\x1a\n", "expected a batch of CIFAR"),
        (batch(4, 1, 3, data=array(pixels(4, 1), kind=b"O8")), "the type b'O8'"),
        (batch(4, 1, 3, data=array(pixels(4, 1), fortran=True)), "an array of something else than bytes in rows"),
        (batch(4, 1, 3, data=array(pixels(4, 1)[:, :3000])), r"expected data as bytes of \[N, 3072\], got array of bytes \[4, 3000\]"),
        (batch(4, 1, 3, data=text(b"none")), r"expected data as bytes of \[N, 3072\], got b'none'"),
        (batch(4, 1, 3, labels=listing([number(1)])), "expected 4 labels, as there are pictures, got 1"),
        (batch(4, 1, 3, labels=listing([number(7)] * 4)), "expected labels from 0 to 2, got 7"),
        (batch(4, 1, 3, labels=listing([text(b"1")] * 4)), "expected labels from 0 to 2, got b'1'"),
    ],
)
def test_files_that_are_no_batches_are_refused_in_one_line(ten: Path, content: bytes, message: str) -> None:
    (ten / "data_batch_1").write_bytes(content)
    with pytest.raises(RequestError, match=f"data_batch_1: .*{message}") as refused:
        cifar.describe(ten, partial=True)
    assert "\n" not in str(refused.value)
