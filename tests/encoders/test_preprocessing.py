"""Where an encoder's preprocessing comes from: the sweep, the file, what lies beside it, its family, its tag, or the default."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from harness.core import EncoderInfo, Preprocessing
from harness.encoders import EncoderSpec, describe, fingerprint, load
from harness.errors import EncoderError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = (0.5, 0.5, 0.5)
OTHER = [0.4, 0.5, 0.6]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(5)
    return dict(timm.create_model("test_vit", num_classes=0).state_dict())


@pytest.fixture
def file(tmp_path: Path, state: State) -> Path:
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def info(checkpoint: Path | None = None, **keys: Any) -> EncoderInfo:
    entry: dict[str, Any] = {"name": "e", **keys}
    if "encoder" not in keys:
        entry.setdefault("architecture", "test_vit")
    if checkpoint is not None:
        entry["checkpoint"] = str(checkpoint)
    return load(EncoderSpec.parse(entry)).info


def write(file: Path, name: str, content: object) -> None:
    (file.parent / name).write_text(content if isinstance(content, str) else json.dumps(content))


# --- an architecture alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "options", "size", "resize"),
    [
        ("test_vit", {}, 160, 183),
        ("vit_tiny_patch16_224", {"depth": 1}, 224, 256),
        ("vit_small_patch16_dinov3", {"depth": 1}, 256, 293),
        ("vit_small_patch14_dinov2", {"depth": 1}, 518, 592),
        ("vit_base_patch16_clip_224", {"depth": 1, "embed_dim": 96}, 224, 256),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 96}, 224, 256),
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 96}, 224, 256),
        ("test_resnet", {}, 160, 183),
    ],
)
def test_an_architecture_alone_has_imagenets(architecture: str, options: dict[str, Any], size: int, resize: int) -> None:
    described = info(architecture=architecture, random=True, options=options)
    assert described.preprocessing == Preprocessing(size=(size, size), resize=resize, interpolation="bicubic", mean=IMAGENET[0], std=IMAGENET[1])
    assert described.preprocessing_source.startswith("by default, ImageNet's")
    assert ("timm publishes" in described.preprocessing_source) == (architecture not in ("vit_small_patch14_dinov2", "vit_small_patch16_dinov3"))


def test_a_file_in_an_architecture_has_imagenets_and_says_so(file: Path) -> None:
    described = info(file)
    assert (described.preprocessing.mean, described.preprocessing.std) == IMAGENET
    assert (described.preprocessing.size, described.preprocessing.resize, described.preprocessing.interpolation) == ((160, 160), 183, "bicubic")
    assert described.preprocessing_source == (
        "by default, ImageNet's (the weights that timm publishes for test_vit have mean 0.5 0.5 0.5, std 0.5 0.5 0.5)"
    )
    assert described.preprocessing_replaced == ()
    assert info(random=True).preprocessing == described.preprocessing


def test_positions_of_another_size_set_the_crop_at_the_same_share(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", img_size=96, num_classes=0).state_dict(), tmp_path / "a.pth")
    assert (info(tmp_path / "a.pth").preprocessing.size, info(tmp_path / "a.pth").preprocessing.resize) == ((96, 96), 110)


def test_a_name_that_names_weights_keeps_their_preprocessing(file: Path) -> None:
    expected = Preprocessing(size=(160, 160), resize=168, mean=HALF, std=HALF)
    for keys in ({"encoder": "timm:test_vit.r160_in1k"}, {"encoder": "timm:test_vit"}, {"architecture": "test_vit.r160_in1k"}):
        for described in (info(file, **keys), info(**keys, random=True)):
            assert described.preprocessing == expected
            assert described.preprocessing_source == "timm's for test_vit.r160_in1k"


# --- written in or beside the file ------------------------------------------------------------------------------------

PROCESSORS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {
            "do_center_crop": True,
            "crop_size": {"height": 96, "width": 96},
            "size": {"shortest_edge": 128},
            "resample": 2,
            "image_mean": OTHER,
            "image_std": OTHER,
        },
        {"size": (96, 96), "resize": 128, "interpolation": "bilinear", "mean": tuple(OTHER), "std": tuple(OTHER)},
    ),
    (
        {"do_center_crop": True, "crop_size": 96, "size": 112, "resample": 3, "image_mean": HALF},
        {"size": (96, 96), "resize": 112, "mean": HALF},
    ),
    ({"size": {"height": 96, "width": 96}, "image_mean": HALF, "image_std": HALF}, {"size": (96, 96), "resize": 96, "mean": HALF, "std": HALF}),
    ({"size": 96, "resample": 2}, {"size": (96, 96), "resize": 96, "interpolation": "bilinear"}),
    ({"size": {"shortest_edge": 96}, "crop_pct": 0.75}, {"size": (96, 96), "resize": 128}),
    ({"do_normalize": False, "size": 160}, {"size": (160, 160), "resize": 160, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    ({"do_resize": False, "size": 96, "image_mean": OTHER, "rescale_factor": 1 / 255}, {"mean": tuple(OTHER)}),
]


@pytest.mark.parametrize(("processor", "expected"), PROCESSORS)
def test_hugging_faces_image_processor_beside_the_file(file: Path, processor: dict[str, Any], expected: dict[str, Any]) -> None:
    default = {"size": (160, 160), "resize": 183, "interpolation": "bicubic", "mean": IMAGENET[0], "std": IMAGENET[1]}
    write(file, "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", **processor})
    described = info(file)
    assert described.preprocessing == Preprocessing(**{**default, **expected})
    assert "preprocessor_config.json beside the file" in described.preprocessing_source


TIMM_FORMS = [
    {"pretrained_cfg": {"mean": OTHER, "std": HALF, "input_size": [3, 96, 128], "interpolation": "bilinear", "crop_pct": 0.75}},
    {"architecture": "test_vit", "mean": OTHER, "std": HALF, "input_size": [3, 96, 128], "interpolation": "bilinear", "crop_pct": 0.75},
    {"preprocessing": {"mean": OTHER, "std": HALF, "size": [96, 128], "interpolation": "bilinear", "resize": 128}},
]
FROM_TIMM = Preprocessing(size=(96, 128), resize=128, interpolation="bilinear", mean=(0.4, 0.5, 0.6), std=HALF)


@pytest.mark.parametrize("config", TIMM_FORMS)
def test_timms_config_beside_the_file(file: Path, config: dict[str, Any]) -> None:
    write(file, "config.json", config)
    described = info(file)
    assert described.preprocessing == FROM_TIMM
    assert described.preprocessing_source == "config.json beside the file"


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_config_with_a_byte_order_mark_is_read(file: Path, name: str) -> None:
    (file.parent / name).write_bytes(b"\xef\xbb\xbf" + json.dumps({"mean": OTHER, "image_mean": OTHER}).encode())
    assert info(file).preprocessing.mean == tuple(OTHER)


@pytest.mark.parametrize("config", TIMM_FORMS)
def test_metadata_as_python_prints_it_is_read(tmp_path: Path, state: State, config: dict[str, Any]) -> None:
    save_file(state, tmp_path / "a.safetensors", metadata={key: value if isinstance(value, str) else repr(value) for key, value in config.items()})
    assert info(tmp_path / "a.safetensors").preprocessing == FROM_TIMM


@pytest.mark.parametrize("config", TIMM_FORMS)
def test_a_safetensors_files_metadata(tmp_path: Path, state: State, config: dict[str, Any]) -> None:
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt", **metadata})
    described = info(tmp_path / "a.safetensors")
    assert described.preprocessing == FROM_TIMM
    assert described.preprocessing_source == "the metadata of a.safetensors"
    save_file(state, tmp_path / "a.safetensors", metadata={"mean": "0.4, 0.5, 0.6"})
    assert info(tmp_path / "a.safetensors").preprocessing.mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("kind", [dict, lambda **values: Namespace(**values)])
def test_the_args_of_a_torch_file(tmp_path: Path, state: State, kind: Any) -> None:
    stated = {"mean": OTHER, "std": list(HALF), "input_size": 96, "crop_pct": 0.75, "interpolation": "bilinear", "lr": 0.1, "model": "test_vit"}
    torch.save({"model": state, "args": kind(**stated)}, tmp_path / "a.pth")
    described = info(tmp_path / "a.pth")
    assert described.preprocessing == Preprocessing(size=(96, 96), resize=128, interpolation="bilinear", mean=(0.4, 0.5, 0.6), std=HALF)
    assert described.preprocessing_source == "the args in a.pth"


@pytest.mark.parametrize(("flag", "mean"), [(True, IMAGENET[0]), (False, HALF)])
def test_beits_flag_between_two_normalisations(tmp_path: Path, state: State, flag: bool, mean: tuple[float, ...]) -> None:
    args = Namespace(imagenet_default_mean_and_std=flag, crop_pct=None, mean=None, interpolation="", std=None)
    torch.save({"model": state, "args": args}, tmp_path / "a.pth")
    assert info(tmp_path / "a.pth").preprocessing.mean == mean


def test_what_decides_first_to_last(tmp_path: Path, state: State) -> None:
    torch.save({"model": state, "args": {"std": [0.1, 0.1, 0.1]}}, tmp_path / "a.pth")
    file = tmp_path / "a.pth"
    write(file, "preprocessor_config.json", {"image_mean": OTHER, "image_std": [0.2, 0.2, 0.2]})
    write(file, "config.json", {"pretrained_cfg": {"mean": HALF, "std": [0.3, 0.3, 0.3], "interpolation": "bilinear", "crop_pct": 0.8}})
    described = info(file, preprocessing={"size": 96})
    assert described.preprocessing == Preprocessing(size=(96, 96), resize=120, interpolation="bilinear", mean=(0.4, 0.5, 0.6), std=(0.1, 0.1, 0.1))
    assert described.preprocessing_source == (
        "size, resize: the sweep; interpolation: config.json beside the file; mean: preprocessor_config.json beside the file; std: the args in a.pth"
    )
    assert described.preprocessing_replaced == ("size", "resize", "interpolation", "mean", "std")


def test_an_official_file_and_its_random_twin_follow_what_lies_beside(tmp_path: Path) -> None:
    fixture = json.loads((Path(__file__).parents[1] / "fixtures/encoders/dino/backbone.json").read_text())["spec"]
    (tmp_path / fixture["checkpoint"]).write_bytes((Path(__file__).parents[1] / "fixtures/encoders/dino" / fixture["checkpoint"]).read_bytes())
    write(tmp_path / "x", "preprocessor_config.json", {"image_mean": OTHER})
    for random in (False, True):
        described = load(EncoderSpec.parse({**fixture, "random": random}, base=tmp_path)).info
        assert described.preprocessing.mean == (0.4, 0.5, 0.6)
        assert (
            described.preprocessing_source.endswith("size, resize, interpolation, std: as the authors of dino evaluate")
            or "dino" in described.preprocessing_source
        )
        assert described.preprocessing_replaced == ("mean",)


def test_a_link_to_a_file_elsewhere_has_what_lies_beside_either(tmp_path: Path, file: Path) -> None:
    """Hugging Face's cache keeps a snapshot's files as links to blobs."""
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.pth").symlink_to(file)
    write(file, "config.json", {"mean": OTHER, "std": OTHER})
    assert info(tmp_path / "snapshot" / "model.pth").preprocessing.mean == (0.4, 0.5, 0.6)
    write(tmp_path / "snapshot" / "model.pth", "config.json", {"mean": HALF, "std": OTHER})
    assert info(tmp_path / "snapshot" / "model.pth").preprocessing.mean == HALF


def test_a_file_is_described_anew_when_what_lies_beside_it_changes(file: Path) -> None:
    spec = EncoderSpec.parse({"name": "e", "architecture": "test_vit", "checkpoint": str(file)})
    assert describe(spec).preprocessing.mean == IMAGENET[0]
    write(file, "config.json", {"mean": OTHER})
    assert describe(spec).preprocessing.mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "vit", "image_size": 224, "hidden_size": 64},
        {"mean": 3.0, "size": "base", "interpolation": "linear"},
        {"train": {"lr": 0.1}, "std": 0.02},
        [1, 2],
        "{not json",
    ],
)
def test_a_config_of_something_else_changes_nothing(file: Path, content: object) -> None:
    write(file, "config.json", content)
    assert info(file).preprocessing_source.startswith("by default")


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5]}, "mean", r"image_mean: expected three numbers.*got \[0\.5, 0\.5\]"),
        ("preprocessor_config.json", {"image_mean": ["a", 0.5, 1]}, "mean", r"image_mean: expected three numbers"),
        ("preprocessor_config.json", {"image_mean": [123.7, 116.3, 103.5]}, "mean", r"in \[0, 1\] \(those of values up to 255 are divided by 255\)"),
        ("config.json", {"mean": [0.5, 0.5, 0.5], "std": [58.4, 57.1, 57.4]}, "std", r"std: expected three positive numbers.* divided by 255"),
        ("config.json", {"mean": [-0.5, 0.5, 0.5]}, "mean", r"mean: expected three numbers"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "std", r"image_std: expected three positive numbers.*got \[0\.5, 0, 0\.5\]"),
        (
            "preprocessor_config.json",
            {"size": {"shortest_edge": -3}},
            "size",
            r"size: expected a shortest edge in pixels.*got \{'shortest_edge': -3\}",
        ),
        ("preprocessor_config.json", {"size": {"height": 96}}, "size", r"size: expected a side or a height and a width"),
        ("preprocessor_config.json", {"resample": "nearly"}, "interpolation", r"resample: expected bicubic, bilinear.*got 'nearly'"),
        ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, None, r"rescale_factor: expected 1/255"),
        ("preprocessor_config.json", "{not json", None, r"expected a JSON object of Hugging Face's image processor"),
        ("preprocessor_config.json", {"crop_size": 160, "size": {"shortest_edge": 96}}, "resize", r"expected resize of at least the crop's"),
        ("config.json", {"pretrained_cfg": {"std": [0, 0, 0]}}, "std", r"std: expected three positive numbers"),
        ("config.json", {"pretrained_cfg": {"crop_pct": 0}}, "resize", r"crop_pct: expected a share"),
        ("config.json", {"mean": [float("nan"), 0, 0]}, "mean", r"mean: expected three numbers"),
        ("config.json", {"input_size": [1, 28, 28]}, "size", r"input_size: expected a side or a height and a width.*got \[1, 28, 28\]"),
    ],
)
def test_malformed_preprocessing_is_refused_by_file_and_key_unless_the_sweep_gives_it(
    file: Path, name: str, content: object, field: str | None, message: str
) -> None:
    write(file, name, content)
    with pytest.raises(EncoderError, match=message) as caught:
        info(file)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    whole = {"size": 96, "resize": 96, "interpolation": "bicubic", "mean": OTHER, "std": OTHER}
    assert info(file, preprocessing=whole).preprocessing_source == "the sweep"
    if field is not None:
        info(file, preprocessing={field: whole[field], **({"size": 96} if field == "resize" else {})})


# --- families, and what it changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dino_small16", "as the authors of dino evaluate"),
        ("beit_base", "as the authors of beit evaluate (mean 0.5 0.5 0.5, std 0.5 0.5 0.5, unlike most)"),
        ("simclr_resnet50", "as the authors of simclr evaluate (mean 0 0 0, std 1 1 1, unlike most)"),
        ("moco_v3_small", "as the authors of moco_v3 evaluate (bilinear, unlike most)"),
    ],
)
def test_a_family_says_that_its_images_are_prepared_unlike_most(name: str, words: str) -> None:
    assert info(encoder=name, random=True).preprocessing_source == words


def test_where_preprocessing_comes_from_is_in_no_key(file: Path) -> None:
    spec = {"name": "e", "architecture": "test_vit", "checkpoint": str(file)}
    given = {"size": 96, "resize": 110, "interpolation": "bilinear", "mean": OTHER, "std": OTHER}
    by_sweep = EncoderSpec.parse({**spec, "preprocessing": given})
    expected, words = fingerprint(by_sweep), describe(by_sweep)
    write(file, "config.json", {"preprocessing": given})
    by_file = describe(EncoderSpec.parse(spec))
    assert fingerprint(EncoderSpec.parse(spec)) == expected
    assert (by_file.notes, by_file.preprocessing) == (words.notes, words.preprocessing)
    assert by_file.preprocessing_source != words.preprocessing_source


def test_the_description_names_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from harness.encoders.__main__ import main

    write(file, "config.json", {"mean": OTHER, "std": HALF})
    assert main([json.dumps({"name": "e", "architecture": "test_vit", "checkpoint": str(file)}), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "mean 0.400 0.500 0.600" in shown["preprocessing"]
    assert "mean, std: config.json beside the file" in shown["preprocessing from"]
