from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

import built
from harness.errors import RequestError
from layouts import LAYOUTS
from shards import mat, recipe


def test_a_file_that_ends_its_reader_is_named_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat(tmp_path / "a.mat", {"x": np.arange(3)})
    built.write(tmp_path / "b.mat", "no MATLAB file")
    mat.survive([tmp_path / "a.mat", tmp_path / "b.mat", tmp_path / "none.mat"], "x", "get it again")
    with monkeypatch.context() as deadly_reader:
        deadly_reader.setattr(mat, "_TRY", mat._TRY.replace("loadmat(path", "b'b.mat' in path and __import__('os').abort() or loadmat(path"))
        mat._reader.cache_clear()
        with pytest.raises(RequestError, match=r"b\.mat: expected a MATLAB file, got one so damaged that its reader dies of it; get it again"):
            mat.survive([tmp_path / "a.mat", tmp_path / "b.mat"], "x", "get it again")
    mat.survive([tmp_path / "a.mat"], "x", "get it again")


@pytest.mark.parametrize(
    ("name", "file"), [("imagenet, flat", "ILSVRC2012_devkit_t12/data/meta.mat"), ("pascal_parts", "Annotations_Part/train.mat")]
)
def test_recipes_have_their_files_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    layout, source = LAYOUTS[name], tmp_path / "source"
    layout.write(source)
    built.write(source / file, "deadly")
    monkeypatch.setattr(
        mat, "_TRY", mat._TRY.replace("loadmat(path", "open(path, 'rb').read() == b'deadly' and __import__('os').abort() or loadmat(path")
    )
    mat._reader.cache_clear()
    arguments = [argument.replace("SOURCE", str(source)) for argument in layout.arguments]
    command = ["--source", str(source), "--out", str(tmp_path / layout.name), "--workers", "1", "--partial", *arguments]
    assert recipe.main(layout.module.describe, "", command, layout.options) == 2
    assert f"{Path(file).name}: expected a MATLAB file, got one so damaged that its reader dies of it" in capsys.readouterr().err
    mat._reader.cache_clear()
