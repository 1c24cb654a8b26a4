"""Weight files that are broken, hostile or simply the wrong ones: one clear line each, and nothing in them is run."""

import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg

from harness.encoders import EncoderSpec, load
from harness.errors import EncoderError

State = dict[str, Any]
Maker = Callable[[Path, State], None]


class Payload:
    """A pickle that would make a file of this name when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class Plain(torch.nn.Module):
    """A whole module, saved as such."""


def truncated(path: Path, state: State, **options: Any) -> None:
    torch.save(state, path, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped_header(path: Path, state: State) -> None:
    save_file(state, path)
    content = bytearray(path.read_bytes())
    content[8:12] = b"{{{{"
    path.write_bytes(content)


def cut_safetensors(path: Path, state: State) -> None:
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-1000])


def bomb(path: Path, state: State) -> None:
    torch.save(state, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/999", b"\0" * 50_000_000)


def overlapping(path: Path, state: State) -> None:
    """Many directory entries for the same bytes."""
    torch.save(state, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * 50
        archive._didModify = True  # type: ignore[attr-defined]


def scripted(path: Path, state: State) -> None:
    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    torch.jit.save(torch.jit.trace(Doubling(), torch.zeros(2)), path)


def tarred(path: Path, state: State) -> None:
    torch.save(state, path.with_suffix(".inner"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_suffix(".inner"), "weights.pth")


def circular(path: Path, state: State) -> None:
    around: State = {"a": state}
    around["b"] = around
    torch.save(around, path)


def shared(innermost: State) -> Maker:
    """A few kilobytes that name `innermost` 60^6 times."""

    def make(path: Path, state: State) -> None:
        level = innermost
        for _ in range(6):
            level = {f"k{index}": level for index in range(60)}
        torch.save(level, path)

    return make


def changed(**tensors: Any) -> Maker:
    return lambda path, state: torch.save({**state, **tensors}, path)


def without(*names: str) -> Maker:
    return lambda path, state: torch.save({name: tensor for name, tensor in state.items() if name not in names}, path)


def saved(build: Callable[[State], Any], **options: Any) -> Maker:
    return lambda path, state: torch.save(build(state), path, **options)


def with_value(value: float) -> Maker:
    def make(path: Path, state: State) -> None:
        spoilt = state["norm.weight"].clone()
        spoilt[3] = value
        torch.save({**state, "norm.weight": spoilt}, path)

    return make


def mark_of(path: Path) -> Path:
    return path.with_suffix(".ran")


CASES: dict[str, tuple[Maker, str]] = {
    # what is no weight file
    "absent": (lambda path, state: None, "cannot be read: No such file"),
    "folder": (lambda path, state: path.mkdir(), "expected a file, got a folder"),
    "empty": (lambda path, state: path.write_bytes(b"") and None, "the file is empty"),
    "text": (lambda path, state: path.write_text("not weights") and None, "expected a torch or safetensors file"),
    "web page": (lambda path, state: path.write_text("<!DOCTYPE html><html>404</html>") and None, "is a web page"),
    "lfs pointer": (lambda path, state: path.write_text("version https://git-lfs.github.com/spec/v1\n") and None, "is a Git LFS pointer"),
    "image": (lambda path, state: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)) and None, "expected a torch or safetensors file"),
    "tar": (tarred, "expected a torch or safetensors file"),
    "numpy archive": (lambda path, state: np.savez(path.open("wb"), a=np.zeros(3)), "is a NumPy archive"),
    "zip of something": (lambda path, state: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "damaged"),
    # broken ones
    "truncated": (truncated, "damaged or cut short"),
    "truncated, old format": (
        lambda path, state: truncated(path, state, _use_new_zipfile_serialization=False),
        "damaged|is not a file of plain tensors",
    ),
    "truncated safetensors": (cut_safetensors, "damaged safetensors file"),
    "safetensors with a broken header": (flipped_header, "damaged safetensors file"),
    "pickle of garbage": (lambda path, state: path.write_bytes(b"\x80\x02" + bytes(range(256))) and None, "not a file of plain tensors|damaged"),
    # hostile ones
    "code": (lambda path, state: torch.save({**state, "x": Payload(mark_of(path))}, path), "need code to load .*pathlib.*load it where you trust it"),
    "code, old format": (
        lambda path, state: torch.save({**state, "x": Payload(mark_of(path))}, path, _use_new_zipfile_serialization=False),
        "need code to load|is not a file of plain tensors",
    ),
    "code, plain pickle": (
        lambda path, state: path.write_bytes(pickle.dumps(Payload(mark_of(path)))) and None,
        "not a file of plain tensors|need code",
    ),
    "whole module": (lambda path, state: torch.save(Plain(), path), "need code to load .*Plain.*state_dict"),
    "scripted program": (scripted, "is a TorchScript program"),
    "zip bomb": (bomb, "would unpack .* bytes from a file of"),
    "overlapping zip": (overlapping, "would unpack|damaged"),
    "tensor without bytes": (changed(huge=torch.zeros(1).expand(10**6, 10**6)), "huge claims .* over 4 bytes"),
    "dictionary in itself": (circular, "nested without end"),
    "dictionaries shared without end": (shared({"w": torch.zeros(1)}), "the same dictionaries lie under more than 100000 names"),
    "dictionaries shared without end or tensors": (shared({"epoch": 3}), "the same dictionaries lie under more than 100000 names"),
    "names without end": (saved(lambda state: {"k" * 2000: state}), "nested without end under 'kkk"),
    # not a state dict
    "tensor alone": (saved(lambda state: state["cls_token"]), "expected a dictionary of tensors, got Tensor"),
    "list": (saved(lambda state: list(state.values())), "expected a dictionary of tensors, got list"),
    "no tensors": (saved(lambda state: {"epoch": 3, "args": {"lr": 0.1}}), "found none"),
    "name twice": (saved(lambda state: {**state, "norm": {"weight": torch.zeros(64)}}), "the name 'norm.weight' occurs twice"),
    # values that cannot be
    "nan": (with_value(float("nan")), "norm.weight holds NaN or infinite"),
    "infinity": (with_value(float("inf")), "norm.weight holds NaN or infinite"),
    "whole numbers": (changed(**{"norm.weight": torch.ones(64, dtype=torch.int32)}), "norm.weight holds torch.int32"),
    "sparse": (changed(**{"norm.weight": torch.ones(64).to_sparse()}), "norm.weight is not a plain dense tensor"),
    "complex": (changed(**{"norm.weight": torch.ones(64, dtype=torch.complex64)}), "norm.weight is not a plain dense tensor"),
    # another architecture
    "another width": (
        saved(lambda state: timm.create_model("test_vit", embed_dim=32, num_heads=2).state_dict()),
        "does not fit test_vit: .* is .*, expected",
    ),
    "another depth": (saved(lambda state: timm.create_model("test_vit", depth=4).state_dict()), "does not fit test_vit: .* keys missing"),
    "deeper": (saved(lambda state: timm.create_model("test_vit", depth=8).state_dict()), r"does not fit test_vit: keys 24 unexpected \(blocks\.6"),
    "a convolutional one": (saved(lambda state: timm.create_model("test_resnet").state_dict()), "holds no key of test_vit|does not fit test_vit"),
    "one key missing": (without("blocks.3.attn.qkv.bias"), r"1 of \d+ keys missing under '' \(blocks\.3\.attn\.qkv\.bias\)"),
    "one key more": (changed(mask_token=torch.zeros(1, 1, 64)), r"keys 1 unexpected \(mask_token\).*goes under drop"),
    "positions of no square grid": (changed(pos_embed=torch.zeros(1, 98, 64)), r"pos_embed is \[1, 98, 64\], expected \[1, 101, 64\]"),
    "encoder twice": (saved(lambda state: {"model": state, "model_ema": state}), "fits in 2 places; say which one"),
    "moved averages only": (saved(lambda state: {"model_ema": state}), r"fits under 'model_ema\.' only; if that is meant"),
}


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return dict(timm.create_model("test_vit", num_classes=0).state_dict())


def test_a_good_file_loads(tmp_path: Path, state: State) -> None:
    """Without which the refusals below would prove nothing."""
    torch.save(state, tmp_path / "a.pth")
    load(EncoderSpec.parse({"architecture": "test_vit", "checkpoint": str(tmp_path / "a.pth")}))


@pytest.mark.parametrize("case", sorted(CASES))
def test_refused_in_one_line(case: str, tmp_path: Path, state: State) -> None:
    make, message = CASES[case]
    path = tmp_path / "weights.bin"
    make(path, dict(state))
    with pytest.raises(EncoderError, match=message) as caught:
        load(EncoderSpec.parse({"architecture": "test_vit", "checkpoint": str(path)}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert str(path) in str(caught.value)
    assert not mark_of(path).exists(), "the file's code was run"


def test_the_payload_would_run_where_it_is_trusted(tmp_path: Path) -> None:
    """Without which its not running would prove nothing."""
    torch.save({"x": Payload(tmp_path / "ran")}, tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_training_arguments_beside_the_weights_are_harmless(tmp_path: Path, state: State) -> None:
    import argparse

    torch.save({"model": state, "args": argparse.Namespace(lr=0.1, out="x"), "scaler": {"scale": 1.0}}, tmp_path / "a.pth")
    load(EncoderSpec.parse({"architecture": "test_vit", "checkpoint": str(tmp_path / "a.pth")}))


@pytest.mark.parametrize("encoder", ["timm:test_vit.r160_in1k", "hf-hub:timm/test_vit.r160_in1k"])
@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("truncated safetensors", "model.safetensors"),
        ("safetensors with a broken header", "model.safetensors"),
        ("web page", "model.safetensors"),
        ("empty", "model.safetensors"),
        ("truncated", "pytorch_model.bin"),
        ("code", "pytorch_model.bin"),
        ("zip bomb", "pytorch_model.bin"),
        ("list", "pytorch_model.bin"),
    ],
)
def test_published_files_are_read_as_safely(
    encoder: str, case: str, file: str, tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = CASES[case]
    published = {"architecture": "test_vit", "pretrained_cfg": {"num_classes": 0, "input_size": [3, 160, 160], "fixed_input_size": True}}
    (tmp_path / "config.json").write_text(json.dumps(published))
    make(tmp_path / file, dict(state))

    def cached(repository: str, name: str, **keys: Any) -> str | None:
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    def fetched(repository: str, name: str, **keys: Any) -> str:
        return cached(repository, name) or pytest.fail(f"{name} asked for, which is not in the cache")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fetched)
    if encoder.startswith("timm:"):
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: PretrainedCfg(hf_hub_id="timm/test_vit.r160_in1k"))
    with pytest.raises(EncoderError, match=message) as caught:
        load(EncoderSpec.parse(encoder))
    assert "\n" not in str(caught.value)
    assert not mark_of(tmp_path / file).exists(), "the file's code was run"


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "../x", "a/b@"])
def test_what_is_no_hub_id_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(EncoderError, match=r"hf-hub:<owner>/<model>\[@revision\]|cannot be had") as caught:
        load(EncoderSpec.parse(f"hf-hub:{name}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"architecture": "nothing", "pretrained_cfg": {}}', '{"architecture": 3, "pretrained_cfg": {}}']
)
def test_a_hub_config_that_is_not_timms_is_refused_in_one_line(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(content)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **keys: str(tmp_path / "config.json"))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *args, **keys: str(tmp_path / "config.json"))
    with pytest.raises(EncoderError, match=r"config\.json of hf-hub:me/mine is not timm's|unknown timm architecture '(nothing|3)'") as caught:
        load(EncoderSpec.parse("hf-hub:me/mine"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", ["deit", "moco_v3", "dino", "beit", "mae", "cae", "ibot", "simclr", "vicreg"])
@pytest.mark.parametrize("case", ["absent", "truncated", "code", "zip bomb", "no tensors"])
def test_official_formats_read_files_as_safely(encoder: str, case: str, tmp_path: Path, state: State) -> None:
    make, message = CASES[case]
    path = tmp_path / "weights.bin"
    make(path, dict(state))
    with pytest.raises(EncoderError, match=message):
        load(EncoderSpec.parse({"encoder": encoder, "checkpoint": str(path)}))
    assert not mark_of(path).exists()
