"""Published weights, through timm's tags and the Hugging Face Hub: whole and accounted for, or refused in one line. The hub here is a folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from harness.core import Encoder
from harness.encoders import EncoderSpec, describe_once, fingerprint, load
from harness.errors import EncoderError

State = dict[str, torch.Tensor]
Publish = Callable[..., Path]
TAG = "timm:test_vit.r160_in1k"
PUBLISHED = "timm/test_vit.r160_in1k"


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Puts a repository's weights, and the config.json of an architecture, where the hub's client keeps what it has fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    describe_once.cache_clear()

    def put(repository: str, state: State, architecture: str = "test_vit", classes: int = 1000, **arguments: Any) -> Path:
        commit = "a" * 40
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        published = {**timm.get_pretrained_cfg(architecture).to_dict(remove_source=True), "num_classes": classes, "mean": [0.1, 0.2, 0.3]}
        config = {"architecture": architecture, "num_classes": classes, "pretrained_cfg": published, "model_args": arguments}
        (snapshot / "config.json").write_text(json.dumps(config))
        save_file(state, snapshot / "model.safetensors")
        return snapshot

    return put


def trained(architecture: str = "test_vit", seed: int = 3, **keys: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    network: torch.nn.Module = timm.create_model(architecture, **keys)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)  # none keeps its initial value
    return network.eval()


def encoder(entry: object) -> Encoder:
    return load(EncoderSpec.parse(entry))


def images(side: int = 160) -> torch.Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [TAG, "hf-hub:me/mine"])
def test_published_weights_come_with_an_account_of_their_file(name: str, publish: Publish) -> None:
    network = trained(num_classes=1000)
    publish(PUBLISHED, network.state_dict())
    publish("me/mine", {**network.state_dict()})
    loaded = encoder(name)
    report = loaded.info.load_report
    assert report is not None
    assert (report.matched, report.missing, report.unexpected, report.resized) == (len(loaded.module.state_dict()), (), (), ())
    assert report.dropped == ("head.bias", "head.weight")
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode(images()).cls, network.forward_features(images())[:, 0])  # type: ignore[operator]
    assert encoder(name).info.weights_sha256 == loaded.info.weights_sha256


def test_weights_published_without_a_classifier_drop_nothing(publish: Publish) -> None:
    publish("me/trunk", trained(num_classes=0).state_dict(), classes=0)
    report = encoder("hf-hub:me/trunk").info.load_report
    assert report is not None
    assert report.dropped == ()


def without_blocks(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(("blocks.3.", "blocks.4.", "blocks.5."))}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without_blocks, {}, r"36 missing \(blocks\.3\.norm1\.weight, .* and 32 more\) for test_vit"),
        (lambda state: {f"foo.{name}": tensor for name, tensor in state.items()}, {}, r"80 missing .*, 80 unexpected \(foo\."),
        (lambda state: {**state, "adapter": torch.zeros(3)}, {}, r"1 unexpected \(adapter\)"),
        (dict, {"depth": 7}, r"12 missing \(blocks\.6\..*leave out the options"),
        (dict, {"depth": 4}, r"24 unexpected \(blocks\.[45]\..*leave out the options"),
        (dict, {"init_values": 1e-5}, r"12 missing \(blocks\.0\.ls1\.gamma.*leave out the options"),
        (dict, {"img_size": 96}, r"published weights have their own img_size: expected preprocessing: \{size"),
        (dict, {"patch_size": 8}, r"published weights have their own patch_size"),
        (lambda state: {**state, "norm.weight": torch.full((64,), float("nan"))}, {}, "norm.weight holds NaN"),
    ],
)
@pytest.mark.parametrize("name", [TAG, "hf-hub:me/mine"])
def test_weights_that_do_not_fill_the_network_are_refused(
    name: str, change: Callable[[State], State], options: dict[str, float], message: str, publish: Publish
) -> None:
    state = change(dict(trained(num_classes=1000).state_dict()))
    publish(PUBLISHED, state)
    publish("me/mine", dict(state))
    with pytest.raises(EncoderError, match=message) as caught:
        encoder({"encoder": name, "options": options})
    assert "\n" not in str(caught.value)


def test_families_that_timm_loads_without_a_check_are_checked(publish: Publish) -> None:
    """timm ignores keys that a DLA's file lacks."""
    state = trained("dla46_c", num_classes=3).state_dict()
    publish("me/whole", dict(state), "dla46_c", 3)
    assert encoder("hf-hub:me/whole").info.load_report.missing == ()  # type: ignore[union-attr]
    publish("me/no_norm", {name: tensor for name, tensor in state.items() if name != "base_layer.1.weight"}, "dla46_c", 3)
    assert encoder("hf-hub:me/no_norm").info.load_report.missing == ("base_layer.1.weight",)  # type: ignore[union-attr]
    publish("me/cut", {name: tensor for name, tensor in state.items() if name != "level5.tree1.conv1.weight"}, "dla46_c", 3)
    with pytest.raises(EncoderError, match=r"1 missing \(level5\.tree1\.conv1\.weight\)"):
        encoder("hf-hub:me/cut")


def test_keys_of_other_names_that_timm_converts_are_said(publish: Publish) -> None:
    network = trained("test_convnext", num_classes=1000)
    renamed = (
        (".blocks.", "."),
        ("conv_dw", "dwconv"),
        ("mlp.fc", "pwconv"),
        ("head.norm", "norm"),
        ("head.fc", "head"),
        ("stem.", "downsample_layers.0."),
    )
    original: State = {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        original[re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)] = tensor
    publish("me/original", original, "test_convnext")
    loaded = encoder("hf-hub:me/original")
    report = loaded.info.load_report
    assert report is not None
    assert (report.matched, report.missing, report.dropped) == (len(loaded.module.state_dict()), (), ("head.fc.bias", "head.fc.weight"))
    assert any(re.match(r"\d+ tensors made by timm from keys of other names in the file", note) for note in loaded.info.notes)
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(images()), pre_logits=True)  # type: ignore[operator]
        got = network.forward_head(loaded.module.trunk.forward_features(images()), pre_logits=True)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(got, expected)


def test_the_size_of_published_weights_is_set_by_preprocessing(publish: Publish) -> None:
    publish(PUBLISHED, trained(num_classes=1000).state_dict())
    small = encoder({"encoder": TAG, "preprocessing": {"size": 96}})
    assert (small.info.grid, small.info.preprocessing.size) == ((6, 6), (96, 96))
    assert small.info.load_report is not None
    assert small.info.load_report.resized == ("pos_embed",)


def test_a_hub_id_has_the_architecture_of_its_config(publish: Publish) -> None:
    state = trained(num_classes=1000).state_dict()
    publish("me/two", dict(state))
    publish("me/four", dict(state), num_heads=4)
    two, four = encoder("hf-hub:me/two").info, encoder("hf-hub:me/four").info
    assert (two.architecture, four.architecture) == ("test_vit", "test_vit(num_heads=4)")
    assert two.weights_sha256 == four.weights_sha256
    assert fingerprint(EncoderSpec.parse("hf-hub:me/two")) != fingerprint(EncoderSpec.parse("hf-hub:me/four"))


def test_a_hub_id_has_its_positions_resized_as_its_authors_do(publish: Publish) -> None:
    publish("timm/deit_tiny_patch16_224.fb_in1k", trained("deit_tiny_patch16_224").state_dict(), "deit_tiny_patch16_224")
    for name in ("timm:deit_tiny_patch16_224.fb_in1k", "hf-hub:timm/deit_tiny_patch16_224.fb_in1k"):
        notes = encoder({"encoder": name, "preprocessing": {"size": 96}}).info.notes
        assert "positions resized from 14x14 to 6x6: bicubic without antialiasing (as DeiT, MAE, BEiT)" in notes


def test_a_hub_id_has_a_random_twin(publish: Publish) -> None:
    publish("me/four", trained(num_classes=1000).state_dict(), num_heads=4)
    published, twin = encoder("hf-hub:me/four").info, encoder({"encoder": "hf-hub:me/four", "random": True, "seed": 2}).info
    assert twin.random
    assert twin.load_report is None
    assert (twin.architecture, twin.preprocessing, twin.grid) == (published.architecture, published.preprocessing, published.grid)
    assert twin.weights_sha256 == encoder({"architecture": "test_vit", "random": True, "seed": 2, "options": {"num_heads": 4}}).info.weights_sha256


# --- one file by two routes -------------------------------------------------------------------------------------------

TWO_ROUTES = [
    "vit_small_patch16_224.dino",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_224.mae",
    "deit_tiny_patch16_224.fb_in1k",
    "deit3_small_patch16_224.fb_in1k",
    "vit_tiny_patch16_224.augreg_in21k",
]


def smooth(network: torch.nn.Module) -> None:
    """Positions as training leaves them: waves over the grid with a little noise, on which the ways of resizing differ."""
    positions: Any = network.pos_embed
    side = int((positions.shape[1]) ** 0.5)
    rows, columns = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 3, side), indexing="ij")
    waves = torch.stack([torch.sin(rows * (1 + i % 7) + columns * (1 + i % 5) + i) for i in range(positions.shape[2])], dim=-1)
    with torch.no_grad():
        positions[:, -side * side :] = waves.reshape(1, side * side, -1) + 0.1 * torch.randn(1, side * side, positions.shape[2])


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.flatten(0, -2), second.flatten(0, -2), dim=-1).min())


@pytest.mark.parametrize("name", TWO_ROUTES)
def test_weights_fetched_and_given_as_a_file_are_the_same_features(name: str, publish: Publish) -> None:
    """By timm's name and by the architecture with its tag; at the native size and at another, to the bit."""
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    network = trained(name, **options)
    smooth(network)
    snapshot = publish(f"timm/{name}", network.state_dict())
    (snapshot / "config.json").unlink()  # timm's own config of the tag decides
    file = str(snapshot / "model.safetensors")
    side = 140 if "patch14" in name else 160
    for sized in ({}, {"preprocessing": {"size": side}}):
        entry = {"encoder": f"timm:{name}", "options": options, **sized}
        fetched = encoder(entry)
        pictures = images(fetched.info.preprocessing.size[0])
        first = fetched.encode(pictures)
        for given in (encoder({**entry, "checkpoint": file}), encoder({"architecture": name, "options": options, "checkpoint": file, **sized})):
            second = given.encode(pictures)
            assert cosine(first.patches, second.patches) > 0.999999
            assert torch.equal(first.patches, second.patches)
            assert torch.equal(first.cls, second.cls)  # type: ignore[arg-type]
            for fact in ("weights_sha256", "architecture", "preprocessing", "positions", "notes", "preprocessing_source"):
                assert getattr(given.info, fact) == getattr(fetched.info, fact)
        assert fingerprint(EncoderSpec.parse(entry)) == fingerprint(EncoderSpec.parse({**entry, "checkpoint": file}))
        describe_once.cache_clear()


def test_a_published_file_that_timm_converts_is_read_as_a_checkpoint_too(publish: Publish, tmp_path: Path) -> None:
    network = trained("test_convnext", num_classes=1000)
    renamed = {
        name.replace(".blocks.", ".")
        .replace("conv_dw", "dwconv")
        .replace("mlp.fc", "pwconv")
        .replace("head.norm", "norm")
        .replace("head.fc", "head"): tensor
        for name, tensor in network.state_dict().items()
    }
    original = {
        re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", k.replace("stem.", "downsample_layers.0.")): v for k, v in renamed.items()
    }
    publish("timm/test_convnext.r160_in1k", original, "test_convnext")
    save_file(original, tmp_path / "given.safetensors")
    fetched = encoder("timm:test_convnext.r160_in1k")
    given = encoder({"encoder": "timm:test_convnext.r160_in1k", "checkpoint": str(tmp_path / "given.safetensors")})
    assert torch.equal(fetched.encode(images()).patches, given.encode(images()).patches)
    assert fetched.info.notes == given.info.notes
    save_file({name: tensor for name, tensor in original.items() if "pwconv1" not in name}, tmp_path / "less.safetensors")
    with pytest.raises(EncoderError, match=r"holds no key of test_convnext"):
        encoder({"encoder": "timm:test_convnext.r160_in1k", "checkpoint": str(tmp_path / "less.safetensors")})


# --- ids of transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 768}, {"architectures": ["ViTModel"]}, {"model_type": "clip"}],
)
@pytest.mark.parametrize("random", [False, True])
def test_a_transformers_id_says_so_and_how_to_read_it(config: dict[str, Any], random: bool, publish: Publish) -> None:
    snapshot = publish("facebook/dinov2-base", {"w": torch.zeros(2)})
    (snapshot / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        EncoderError, match=r"is a model of transformers .*give \{architecture: <timm model>, checkpoint: model\.safetensors\}$"
    ) as caught:
        encoder({"encoder": "hf-hub:facebook/dinov2-base", "random": random})
    assert "hf download facebook/dinov2-base" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bare_hub_id_is_told_what_it_is() -> None:
    with pytest.raises(EncoderError, match=r"unknown encoder 'facebook/dinov2-base': it looks like a transformers id.*give \{architecture"):
        EncoderSpec.parse("facebook/dinov2-base")
    with pytest.raises(EncoderError, match=r"write hf-hub:timm/vit_small_patch16_224\.dino$"):
        EncoderSpec.parse("timm/vit_small_patch16_224.dino")
