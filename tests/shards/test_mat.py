from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from harness.errors import RequestError
from shards import mat, recipe
from tests.helpers import built
from tests.helpers.layouts import LAYOUTS


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reader that dies of a file that says `deadly`, as SciPy's does of some."""
    death = "open(path, 'rb').read() == b'deadly' and __import__('os').abort() or loadmat(path"
    monkeypatch.setattr(mat, "READER", mat.READER.replace("loadmat(path", death))
    mat.reader_of.cache_clear()
    yield
    mat.end(mat.reader_of(os.getpid()))
    mat.reader_of.cache_clear()


def test_variables_are_those_that_scipy_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    savemat(path, {"x": np.arange(6).reshape(2, 3), "s": {"names": np.array(["a", "bc"], dtype=object), "n": 3}})
    np.testing.assert_array_equal(mat.load(path, "x", "x", "get it again"), loadmat(path)["x"])
    names = mat.load(path, "s", "s", "get it again", field="names")
    assert [str(name.item()) for name in names.ravel()] == ["a", "bc"]
    assert mat.load(path, "s", "s", "get it again", squeeze=True)["n"] == 3
    with pytest.raises(RequestError, match=r"a\.mat: expected y, got KeyError: 'y'; get it again"):
        mat.load(path, "y", "y", "get it again")


@pytest.mark.usefixtures("mortal")
def test_a_file_that_ends_its_reader_is_named_and_the_next_is_read(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"x": 3})
    built.write(tmp_path / "b.mat", "deadly")
    for _ in range(2):
        with pytest.raises(RequestError, match=r"b\.mat: expected x, got a file so damaged that its reader dies of it; get it again"):
            mat.load(tmp_path / "b.mat", "x", "x", "get it again")
        assert mat.load(tmp_path / "a.mat", "x", "x", "get it again") == 3


@pytest.mark.usefixtures("mortal")
@pytest.mark.parametrize(
    ("name", "file"), [("imagenet, flat", "ILSVRC2012_devkit_t12/data/meta.mat"), ("pascal_parts", "Annotations_Part/train.mat")]
)
def test_recipes_outlive_such_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str) -> None:
    layout, source = LAYOUTS[name], tmp_path / "source"
    layout.write(source)
    built.write(source / file, "deadly")
    arguments = [argument.replace("SOURCE", str(source)) for argument in layout.arguments]
    command = ["--source", str(source), "--out", str(tmp_path / layout.name), "--workers", "1", "--partial", *arguments]
    assert recipe.main(layout.module.describe, "", command, layout.options) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{Path(file).name}: expected " in error
    assert "got a file so damaged that its reader dies of it" in error
