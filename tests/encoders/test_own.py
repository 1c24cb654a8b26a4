"""Your own checkpoints: found in their wrappers, loaded whole, or refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from harness.core import Encoder
from harness.encoders import EncoderSpec, describe, load
from harness.errors import EncoderError

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    torch.manual_seed(11)
    network: torch.nn.Module = timm.create_model("test_vit", num_classes=7)
    return network.eval()


@pytest.fixture
def state(trained: torch.nn.Module) -> State:
    return dict(trained.state_dict())


def mine(file: Path, **keys: Any) -> Encoder:
    return load(EncoderSpec.parse({"name": "mine", "architecture": "test_vit", "checkpoint": str(file), **keys}))


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def images() -> torch.Tensor:
    return torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 3},
        lambda state: {"teacher": under("backbone.", state)},
        lambda state: {"student": under("module.backbone.", state)},
        lambda state: {"state_dict": under("module.base_encoder.", state)},
        lambda state: under("encoder.", state),
        lambda state: under("module.", state),
        lambda state: under("_orig_mod.", state),
    ],
)
def test_usual_wrappers_are_found(tmp_path: Path, trained: torch.nn.Module, state: State, wrap: Any) -> None:
    torch.save(wrap(state), tmp_path / "a.pth")
    encoder = mine(tmp_path / "a.pth")
    with torch.inference_mode():
        expected = trained.forward_features(images())  # type: ignore[operator]
    torch.testing.assert_close(encoder.encode(images()).cls, expected[:, 0])
    report = encoder.info.load_report
    assert report is not None
    assert report.matched == len(state) - 2
    assert report.missing == report.unexpected == report.resized == ()
    assert {name.rpartition(".")[2] for name in report.dropped if "head" in name} == {"weight", "bias"}


def test_same_weights_have_the_same_digest_in_any_file(tmp_path: Path, state: State) -> None:
    torch.save({"teacher": under("backbone.", state)}, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    infos = [
        describe(EncoderSpec.parse({"architecture": "test_vit", "checkpoint": str(tmp_path / name)})) for name in ("a.pth", "b.safetensors", "c.pth")
    ]
    assert len({info.weights_sha256 for info in infos}) == 1
    assert len({info.load_report.sha256 for info in infos if info.load_report}) == 3


def test_a_file_is_described_anew_when_it_changes(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "a.pth")
    spec = EncoderSpec.parse({"architecture": "test_vit", "checkpoint": str(tmp_path / "a.pth")})
    first = describe(spec)
    state["cls_token"] = state["cls_token"] + 1
    torch.save({"model": state}, tmp_path / "a.pth")
    assert describe(spec).weights_sha256 != first.weights_sha256


def test_teacher_and_student_must_be_told_apart(tmp_path: Path, state: State) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"teacher": under("backbone.", state), "student": under("module.backbone.", other)}, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"fits in 2 places; say which one: prefix: one of 'student\.module\.backbone\.', 'teacher\.backbone\.'"):
        mine(tmp_path / "a.pth")
    teacher = mine(tmp_path / "a.pth", prefix="teacher.backbone.")
    assert torch.equal(teacher.module.trunk.cls_token, state["cls_token"])  # type: ignore[union-attr, arg-type]
    assert teacher.info.load_report is not None
    assert f"student.* ({len(state)})" in teacher.info.load_report.dropped
    assert "'teacher.backbone.'" in teacher.info.source


def test_an_unusual_wrapper_must_be_named(tmp_path: Path, state: State) -> None:
    torch.save(under("decoder.", state), tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"fits under 'decoder\.' only; if that is meant, give prefix: decoder\.$"):
        mine(tmp_path / "a.pth")
    mine(tmp_path / "a.pth", prefix="decoder.")


def test_rename_and_drop(tmp_path: Path, state: State) -> None:
    renamed = {name.replace("blocks.", "layers.").replace("norm.", "ln."): tensor for name, tensor in state.items()}
    torch.save({**renamed, "mask_token": torch.zeros(1, 1, 64)}, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"keys missing"):
        mine(tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"1 unexpected \(mask_token\).*what is to be left out on purpose goes under drop"):
        mine(tmp_path / "a.pth", rename={"layers.": "blocks.", "ln.": "norm."})
    encoder = mine(tmp_path / "a.pth", rename={"layers.": "blocks.", "ln.": "norm."}, drop=["mask_token"])
    assert encoder.info.load_report is not None
    assert "mask_token" in encoder.info.load_report.dropped
    with pytest.raises(EncoderError, match="rename rule 'layer_s' matches no key"):
        mine(tmp_path / "a.pth", rename={"layer_s": "blocks"})
    with pytest.raises(EncoderError, match="gives two tensors the name"):
        mine(tmp_path / "a.pth", rename={"bias": "weight"})


def test_positions_trained_at_another_size_set_the_encoders_size(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = timm.create_model("test_vit", img_size=96, num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    encoder = mine(tmp_path / "a.pth")
    assert encoder.info.preprocessing.size == (96, 96)
    assert encoder.info.grid == (6, 6)
    small = images()[:, :, :96, :96]
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(small).cls, network.forward_features(small)[:, 0])
    assert mine(tmp_path / "a.pth", options={"img_size": 96}).info.preprocessing == encoder.info.preprocessing
    resized = mine(tmp_path / "a.pth", preprocessing={"size": 160})
    assert resized.info.grid == (10, 10)
    assert resized.info.load_report is not None
    assert resized.info.load_report.resized == ("pos_embed",)
    assert any("positions resized from 6x6 to 10x10" in note for note in resized.info.notes)


@pytest.mark.parametrize("size", [96, [64, 96]])
def test_resized_position_tables_of_hierarchical_networks_are_reported(tmp_path: Path, size: Any) -> None:
    options = {"img_size": 64, "window_size": 2}
    torch.save(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **options).state_dict(), tmp_path / "a.pth")
    entry = {"architecture": "swin_tiny_patch4_window7_224", "checkpoint": str(tmp_path / "a.pth"), "options": options}
    native = load(EncoderSpec.parse({**entry, "preprocessing": {"size": 64}}))
    assert native.info.load_report is not None
    assert native.info.load_report.resized == ()
    resized = load(EncoderSpec.parse({**entry, "preprocessing": {"size": size}}))
    assert resized.info.load_report is not None
    assert resized.info.load_report.resized == tuple(name for name in native.module.trunk.state_dict() if "bias_table" in name)  # type: ignore[union-attr, operator]
    assert any(note.startswith("resized from 64x64 px") for note in resized.info.notes)


def test_half_precision_files_are_read_as_float32(tmp_path: Path, state: State) -> None:
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "a.pth")
    encoder = mine(tmp_path / "a.pth")
    assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.float32}


def test_convolutional_checkpoints_too(tmp_path: Path) -> None:
    torch.manual_seed(4)
    network = timm.create_model("test_resnet").eval()
    torch.save({"state_dict": under("module.encoder_q.", network.state_dict())}, tmp_path / "a.pth")
    spec = EncoderSpec.parse({"architecture": "test_resnet", "checkpoint": str(tmp_path / "a.pth")})
    with torch.inference_mode():
        expected = network.forward_features(images())
    torch.testing.assert_close(load(spec).encode(images()).patches, expected.permute(0, 2, 3, 1))


def test_twelve_heads_in_a_six_head_network_are_refused(tmp_path: Path) -> None:
    """MoCo v3's ViT-S has 12 heads: its shapes fit timm's 6-head ViT-S, which computes something else with them."""
    network = timm.create_model("vit_small_patch16_224", depth=1, num_heads=12, num_classes=0, img_size=32)
    torch.save({"state_dict": under("module.base_encoder.", network.state_dict())}, tmp_path / "a.pth")
    entry = {"architecture": "vit_small_patch16_224", "checkpoint": str(tmp_path / "a.pth"), "options": {"depth": 1}}
    with pytest.raises(EncoderError, match="12 attention heads where vit_small_patch16_224 has 6"):
        load(EncoderSpec.parse(entry))
    for family in ("deit", "dino"):
        official = {"encoder": family, "prefix": "state_dict.module.base_encoder.", "checkpoint": str(tmp_path / "a.pth")}
        with pytest.raises(EncoderError, match=f"12 attention heads where {family} has 6.*use encoder: moco_v3"):
            load(EncoderSpec.parse(official))
        twelve = load(EncoderSpec.parse({**official, "options": {"num_heads": 12}}))
        assert "heads=12" in twelve.info.architecture
    small = images()[:, :, :32, :32]
    encoder = load(EncoderSpec.parse({**entry, "options": {"depth": 1, "num_heads": 12}}))
    assert encoder.info.architecture == "vit_small_patch16_224(depth=1, num_heads=12)"
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(small).cls, network.eval().forward_features(small)[:, 0])


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6)])
def test_caes_small_networks_have_twelve_heads_too(tmp_path: Path, width: int, heads: int) -> None:
    architecture = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224"}[width]
    network = timm.create_model(architecture, depth=1, num_heads=12, num_classes=0, img_size=32)
    torch.save({"model": {**under("encoder.", network.state_dict()), "regresser.norm.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    by_architecture = {"architecture": architecture, "options": {"depth": 1}}
    for entry in (by_architecture, {"encoder": "deit", "prefix": "model.encoder."}, {"encoder": "ibot", "prefix": "model.encoder."}):
        with pytest.raises(EncoderError, match=f"looks like one of cae, whose small ViT has 12 attention heads where .* has {heads}"):
            load(EncoderSpec.parse({**entry, "checkpoint": str(tmp_path / "a.pth")}))


def test_an_oblong_grid_is_told_by_its_image_size(tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = timm.create_model("test_vit", img_size=(96, 160), num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"no square grid of patches; give options: \{img_size: \[height, width\]\}"):
        mine(tmp_path / "a.pth")
    encoder = mine(tmp_path / "a.pth", options={"img_size": [96, 160]})
    assert (encoder.info.preprocessing.size, encoder.info.grid) == ((96, 160), (6, 10))
    assert encoder.info.architecture == "test_vit(img_size=(96, 160))"
    oblong = images()[:, :, :96]
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(oblong).cls, network.forward_features(oblong)[:, 0])


def test_another_size_than_the_files_is_refused_with_its_own(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", img_size=96, num_classes=0).state_dict(), tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"trained on 96x96 px images; leave the option img_size out, preprocessing: \{size: …\}"):
        mine(tmp_path / "a.pth", options={"img_size": 160})


def test_relative_positions_trained_at_another_size(tmp_path: Path) -> None:
    small = {"depth": 1, "embed_dim": 96}
    network = timm.create_model("beit_base_patch16_224", img_size=64, num_classes=0, **small).eval()
    torch.save(network.state_dict(), tmp_path / "beit.pth")
    encoder = mine(tmp_path / "beit.pth", architecture="beit_base_patch16_224", options=small)
    assert (encoder.info.preprocessing.size, encoder.info.grid) == ((64, 64), (4, 4))
    swin = "swin_tiny_patch4_window7_224"
    network = timm.create_model(swin, img_size=96, window_size=3, num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "swin.pth")
    with pytest.raises(EncoderError, match=r"trained with windows of 3x3; give options: \{window_size: 3, img_size: …\}"):
        mine(tmp_path / "swin.pth", architecture=swin)
    encoder = mine(tmp_path / "swin.pth", architecture=swin, options={"window_size": 3, "img_size": 96})
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode(images()[:, :, :96, :96]).patches, network.forward_features(images()[:, :, :96, :96]))


def test_a_prefix_may_lack_its_last_dot(tmp_path: Path, state: State) -> None:
    torch.save({"teacher": under("backbone.", state)}, tmp_path / "a.pth")
    whole, short = mine(tmp_path / "a.pth", prefix="teacher.backbone."), mine(tmp_path / "a.pth", prefix="teacher.backbone")
    assert short.info == whole.info


def test_a_drop_that_matches_no_key_is_refused(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"drop 'nonsense' matches no key; keys are e\.g\. cls_token, pos_embed"):
        mine(tmp_path / "a.pth", drop=["head.", "nonsense"])


def test_a_tag_is_named_where_the_heads_do_not_fit(tmp_path: Path) -> None:
    network = timm.create_model("vit_small_patch16_224", depth=1, num_heads=12, num_classes=0, img_size=32)
    torch.save({"state_dict": under("module.base_encoder.", network.state_dict())}, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"12 attention heads where vit_small_patch16_224\.dino.* has 6"):
        load(EncoderSpec.parse({"encoder": "timm:vit_small_patch16_224.dino", "checkpoint": str(tmp_path / "a.pth"), "options": {"depth": 1}}))


def test_rename_rules_read_the_files_own_names(tmp_path: Path, state: State) -> None:
    """Two parts that swap their names, and rules of which one writes what another reads."""
    swapped = {name.replace("norm1", "?").replace("norm2", "norm1").replace("?", "norm2"): tensor for name, tensor in state.items()}
    torch.save(swapped, tmp_path / "a.pth")
    for rules in ({"norm1": "norm2", "norm2": "norm1"}, {"norm2": "norm1", "norm1": "norm2"}):
        encoder = mine(tmp_path / "a.pth", rename=rules)
        assert torch.equal(encoder.module.trunk.blocks[0].norm1.weight, state["blocks.0.norm1.weight"])  # type: ignore[union-attr, index]
    torch.save({f"a.{name}": tensor for name, tensor in state.items()}, tmp_path / "b.pth")
    mine(tmp_path / "b.pth", rename={"a.": ""})
    fed = {name.replace("blocks.", "layers."): tensor for name, tensor in state.items()}
    torch.save(fed, tmp_path / "c.pth")
    with pytest.raises(EncoderError, match="rename rule 'blocks' matches no key"):
        mine(tmp_path / "c.pth", rename={"layers": "blocks", "blocks": "layers"})
    with pytest.raises(EncoderError, match="rename rule 'layer' is never applied: other rules take every key"):
        mine(tmp_path / "c.pth", rename={"layer": "x", "layers": "blocks"})


@pytest.mark.parametrize("wrapper", ["_orig_mod.module.", "module.module.module.", "model._orig_mod.module._fsdp_wrapped_module."])
def test_nested_wrappers_are_found(tmp_path: Path, trained: torch.nn.Module, state: State, wrapper: str) -> None:
    inner = {name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in state.items()}
    torch.save(under(wrapper, inner), tmp_path / "a.pth")
    with torch.inference_mode():
        expected = trained.forward_features(images())  # type: ignore[operator]
    torch.testing.assert_close(mine(tmp_path / "a.pth").encode(images()).cls, expected[:, 0])
    mine(tmp_path / "a.pth", prefix=wrapper)


def test_compiled_and_plain_copies_of_one_name_stay_apart(tmp_path: Path, state: State) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({**state, **under("_orig_mod.", other)}, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"fits in 2 places; say which one: prefix: one of '', '_orig_mod\.'"):
        mine(tmp_path / "a.pth")
    compiled = mine(tmp_path / "a.pth", prefix="_orig_mod.")
    assert torch.equal(compiled.module.trunk.cls_token, other["cls_token"])  # type: ignore[union-attr, arg-type]


def test_a_network_tuned_behind_mean_pooling_is_refused_with_the_option_that_reads_it(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=3, global_pool="avg").state_dict(), tmp_path / "a.pth")
    options = {"global_pool": "avg"}
    with pytest.raises(EncoderError, match=r"final norm lies behind mean pooling.* options: \{global_pool: avg\}\}$"):
        mine(tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"final norm lies behind mean pooling.* options: \{global_pool: avg\}\}$"):
        load(EncoderSpec.parse({"encoder": "mae", "checkpoint": str(tmp_path / "a.pth"), "options": {"num_heads": 2}}))
    assert mine(tmp_path / "a.pth", options=options).encode(images()).cls is not None


@pytest.mark.parametrize("address", ["https://example.org/vit.pth", "s3://bucket/vit.pth"])
def test_a_checkpoint_that_is_an_address_is_refused_as_one(address: str) -> None:
    with pytest.raises(EncoderError, match=rf"checkpoint must be a file on this machine, got {address}; download it and give its path$"):
        EncoderSpec.parse({"architecture": "test_vit", "checkpoint": address})
