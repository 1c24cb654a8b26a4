"""Official checkpoints: parity with the authors' own models, whose outputs on tiny random weights lie beside each fixture, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.core import Encoder
from harness.encoders import EncoderSpec, describe, load
from harness.errors import EncoderError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
OFFICIAL = sorted(path for path in FIXTURES.glob("*/*.json") if "expected" in json.loads(path.read_text()))
TOLERANCE = 1e-5


def fixture(path: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(path.read_text())
    return entry


def fixture_encoder(path: Path, **keys: Any) -> Encoder:
    return load(EncoderSpec.parse({**fixture(path)["spec"], **keys}, base=path.parent))


def expected(path: Path) -> dict[str, dict[str, np.ndarray]]:
    arrays: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path.parent / fixture(path)["expected"]["file"]) as stored:
        for name in stored.files:
            case, _, kind = name.partition("__")
            arrays.setdefault(case, {})[kind] = stored[name]
    return arrays


def images(case: dict[str, Any]) -> torch.Tensor:
    """Drawn from the stream that NumPy promises never to change."""
    height, width = case["size"]
    return torch.from_numpy(np.random.RandomState(case["seed"]).randn(2, 3, height, width).astype(np.float32))


def relative_error(got: torch.Tensor, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got.numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_parity_with_the_authors_model(path: Path) -> None:
    encoder, arrays = fixture_encoder(path), expected(path)
    cases = fixture(path)["expected"]["cases"]
    assert set(arrays) == set(cases)
    for name, case in cases.items():
        outputs = arrays[name]
        tokens = encoder.encode(images(case), projection="projection" in outputs)
        for kind, array in outputs.items():
            got = getattr(tokens, kind)
            assert got is not None, f"{name}: no {kind}"
            assert relative_error(got, array) <= TOLERANCE, f"{name}: {kind}"
        for kind in ("cls", "registers", "patches"):
            assert (getattr(tokens, kind) is not None) == (kind in outputs), f"{name}: {kind}"


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_fixtures_say_how_they_were_made(path: Path) -> None:
    entry = fixture(path)
    assert len(entry["made"]) > 100
    assert entry["repository"].startswith("https://github.com/")
    assert len(entry["commit"]) == 40
    assert entry["architecture"]
    assert isinstance(entry["seed"], int)
    digest = hashlib.sha256()
    arrays = {f"{case}/{kind}": array for case, kinds in expected(path).items() for kind, array in kinds.items()}
    for name in sorted(arrays):
        digest.update(f"{name}|{arrays[name].shape}|{arrays[name].dtype}|".encode())
        digest.update(arrays[name].tobytes())
    assert digest.hexdigest() == entry["expected"]["sha256"]


def test_every_official_format_has_a_fixture() -> None:
    formats = {"deit", "moco_v3", "dino", "beit", "mae", "cae", "ibot", "simclr", "vicreg"}
    assert {path.parent.name for path in OFFICIAL} == formats


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_key_is_accounted_for(path: Path) -> None:
    from harness.encoders.files import read_checkpoint

    encoder = fixture_encoder(path)
    report = encoder.info.load_report
    assert report is not None
    assert report.unexpected == report.missing == report.resized == ()
    tensors = read_checkpoint(str(path.parent / fixture(path)["spec"]["checkpoint"])).tensors
    groups = [name for name in report.dropped if name.endswith(")")]
    dropped = len(report.dropped) - len(groups) + sum(int(name.rpartition("(")[2][:-1]) for name in groups)
    assert report.matched + dropped == len(tensors)
    assert report.matched == len(encoder.module.state_dict())


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_one_key_more_or_less_is_refused(path: Path, tmp_path: Path) -> None:
    spec = fixture(path)["spec"]
    content = torch.load(path.parent / spec["checkpoint"], weights_only=False)  # our own file
    place = describe(EncoderSpec.parse(spec, base=path.parent)).source
    prefix = place.partition("under '")[2].partition("'")[0]
    holder = content
    for part in prefix.split(".")[:-1]:
        if isinstance(holder, dict) and part in holder and isinstance(holder[part], dict):
            holder = holder[part]
    rest = next(prefix[start:] for start in range(len(prefix) + 1) if any(name.startswith(prefix[start:]) for name in holder))
    norm = next(name for name in holder if name.startswith(rest) and name.endswith(("norm1.bias", "bn1.bias")))
    removed = holder.pop(norm)
    torch.save(content, tmp_path / "less.pth")
    with pytest.raises(EncoderError, match=r"1 missing \(.*(norm1|bn1)\.bias\)"):
        load(EncoderSpec.parse({**spec, "checkpoint": str(tmp_path / "less.pth")}))
    holder[norm] = removed
    holder[f"{rest}surprise"] = torch.zeros(3)
    torch.save(content, tmp_path / "more.pth")
    with pytest.raises(EncoderError, match=r"1 unexpected \(surprise\)"):
        load(EncoderSpec.parse({**spec, "checkpoint": str(tmp_path / "more.pth")}))
    allowed = load(EncoderSpec.parse({**spec, "checkpoint": str(tmp_path / "more.pth"), "drop": ["surprise"]}))
    assert allowed.info.load_report is not None
    assert any("surprise" in name for name in allowed.info.load_report.dropped)


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_format_has_a_random_twin(path: Path) -> None:
    trained, twin = fixture_encoder(path), fixture_encoder(path, random=True, seed=5)
    assert twin.info.random
    assert twin.info.load_report is None
    assert (twin.info.architecture, twin.info.params, twin.info.preprocessing) == (
        trained.info.architecture,
        trained.info.params,
        trained.info.preprocessing,
    )
    assert twin.info.projection_dim == trained.info.projection_dim
    assert twin.info.weights_sha256 != trained.info.weights_sha256
    assert twin.info.weights_sha256 == fixture_encoder(path, random=True, seed=5).info.weights_sha256
    assert twin.info.weights_sha256 != fixture_encoder(path, random=True, seed=6).info.weights_sha256


def widened(path: Path, where: Path, *names: str) -> str:
    """The fixture's file with more tensors, by their full paths."""
    content = torch.load(path.parent / fixture(path)["spec"]["checkpoint"], weights_only=False)  # our own file
    for name in names:
        *folders, last = name.split("/")
        holder = content
        for folder in folders:
            holder = holder.setdefault(folder, {})
        holder[last] = torch.zeros(3)
    torch.save(content, where)
    return str(where)


@pytest.mark.parametrize(
    "name", ["beit/pretrained", "cae/with_teacher", "dino/full_teacher", "ibot/full_student", "mae/full", "moco_v3/vit", "vicreg/full"]
)
def test_what_the_authors_do_not_save_beside_the_encoder_is_refused(name: str, tmp_path: Path) -> None:
    path = FIXTURES / f"{name}.json"
    declared = widened(path, tmp_path / "known.pth", "optimizer/state", "scaler/scale")
    load(EncoderSpec.parse({**fixture(path)["spec"], "checkpoint": declared}))
    spec = {**fixture(path)["spec"], "checkpoint": widened(path, tmp_path / "more.pth", "adapters/0.weight", "adapters/1.weight")}
    with pytest.raises(
        EncoderError, match=r"2 unexpected keys beside the encoder.*\(adapters\.0\.weight, adapters\.1\.weight\).*by its full path, under drop"
    ):
        load(EncoderSpec.parse(spec))
    allowed = load(EncoderSpec.parse({**spec, "drop": ["adapters."]})).info
    assert allowed.load_report is not None
    assert {"adapters.0", "adapters.1"} <= set(allowed.load_report.dropped)
    assert allowed.weights_sha256 == fixture_encoder(path).info.weights_sha256


def test_a_second_encoder_that_cae_does_not_have_is_refused(tmp_path: Path) -> None:
    path = FIXTURES / "cae/with_teacher.json"
    spec = {**fixture(path)["spec"], "checkpoint": widened(path, tmp_path / "a.pth", "model/encoder2.norm.weight")}
    with pytest.raises(EncoderError, match=r"1 unexpected keys.*\(model\.encoder2\.norm\.weight\)"):
        load(EncoderSpec.parse(spec))


# --- an explicit prefix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("dino/full_teacher", "teacher.backbone."),
        ("dino/full_student", "student.module.backbone."),
        ("ibot/full_teacher", "teacher.backbone."),
        ("moco_v3/vit", "state_dict.module.base_encoder."),
        ("simclr/resnet", "state_dict.convnet."),
        ("vicreg/full", "model.module.backbone."),
        ("deit/plain", "model."),
        ("cae/with_teacher", "model.encoder."),
    ],
)
def test_the_prefix_that_is_found_may_also_be_given(name: str, prefix: str) -> None:
    path = FIXTURES / f"{name}.json"
    assert fixture_encoder(path, prefix=prefix).info == fixture_encoder(path).info


def test_a_prefix_chooses_among_the_formats_places() -> None:
    student = fixture_encoder(FIXTURES / "dino/full_student.json").info
    chosen = fixture_encoder(FIXTURES / "dino/full_student.json", encoder="dino", prefix="student.module.backbone.").info
    assert chosen.projection_dim == student.projection_dim is not None
    assert chosen.source == student.source
    assert ": the student in" in chosen.source


# --- the known traps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "heads"),
    [
        ("deit", "plain", 2),
        ("moco_v3", "vit", 2),
        ("dino", "backbone", 8),
        ("mae", "encoder", 2),
        ("cae", "with_teacher", 2),
        ("ibot", "backbone", 2),
    ],
)
def test_another_number_of_heads_fits_in_shape_and_computes_something_else(family: str, name: str, heads: int) -> None:
    """Which is why the number is never guessed."""
    path = FIXTURES / family / f"{name}.json"
    encoder = fixture_encoder(path, options={"num_heads": heads})
    case = fixture(path)["expected"]["cases"]["native"]
    cls = encoder.encode(images(case)).cls
    assert cls is not None
    assert relative_error(cls, expected(path)["native"]["cls"]) > 1e-3
    with pytest.raises(EncoderError, match="keys do not tell the heads; give options"):
        fixture_encoder(path, options={})


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("deit_small", 6),
        ("dino_small16", 6),
        ("ibot_small", 6),
        ("moco_v3_small", 12),
        ("cae_small", 12),
        ("moco_v3_base", 12),
        ("mae_base", 12),
        ("beit_base", 12),
    ],
)
def test_published_sizes_have_their_authors_heads(name: str, heads: int) -> None:
    from harness.encoders import family_of

    entries = family_of(EncoderSpec(name="x", encoder=name)).FORMAT.entries  # type: ignore[attr-defined]
    with torch.device("meta"):
        network = entries[name].shape.create()
    assert {block.attn.num_heads for block in network.blocks} == {heads}
    assert {norm.eps for norm in network.modules() if isinstance(norm, torch.nn.LayerNorm)} == {1e-6}


def test_width_384_is_read_with_the_heads_of_its_authors() -> None:
    """The same tensors are a 6-head network in DINO's file and a 12-head network in MoCo v3's and CAE's."""
    from harness.encoders.families import cae, dino, moco_v3

    tensors = {
        "cls_token": torch.zeros(1, 1, 384),
        "patch_embed.proj.weight": torch.zeros(384, 3, 16, 16),
        "pos_embed": torch.zeros(1, 197, 384),
        "blocks.11.mlp.fc1.weight": torch.zeros(1536, 384),
        "blocks.0.mlp.fc1.weight": torch.zeros(1536, 384),
    }
    shapes = [family.FORMAT.read_shape("file", tensors, None) for family in (dino, moco_v3, cae)]
    assert [shape.heads for shape in shapes] == [6, 12, 12]  # type: ignore[attr-defined]


def test_distilled_deit_has_its_distillation_token_as_register() -> None:
    info = describe(EncoderSpec.parse(fixture(FIXTURES / "deit/distilled.json")["spec"], base=FIXTURES / "deit"))
    assert (info.has_cls, info.registers) == (True, 1)
    assert info.architecture.startswith("distilled(")


def test_beit_has_relative_positions_no_key_bias_and_a_final_norm() -> None:
    encoder = fixture_encoder(FIXTURES / "beit/pretrained.json")
    trunk: Any = encoder.module.trunk
    assert encoder.info.positions == "relative"
    assert all(not block.attn.k_bias.any() for block in trunk.blocks)
    assert isinstance(trunk.norm, torch.nn.LayerNorm)
    assert not any("final norm" in note for note in encoder.info.notes)


def test_resizing_is_the_authors_and_said(tmp_path: Path) -> None:
    path = FIXTURES / "dino/backbone.json"
    encoder = fixture_encoder(path, preprocessing={"size": 48})
    assert any("scale factor from grid + 0.1 (as DINO" in note for note in encoder.info.notes)
    assert encoder.info.load_report is not None
    assert encoder.info.load_report.resized == ("pos_embed",)
    plain = load(EncoderSpec.parse({**fixture(path)["spec"], "encoder": "mae", "preprocessing": {"size": 48}}, base=path.parent))
    case = fixture(path)["expected"]["cases"]["larger"]
    difference = relative_error(plain.encode(images(case)).patches, expected(path)["larger"]["patches"])
    assert difference > 10 * TOLERANCE, "DINO's resizing and MAE's would be one and the same"


def test_timm_resizes_beit_otherwise() -> None:
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table

    from harness.encoders.positions import resize_bias_table

    table = torch.randn(52, 3, generator=torch.Generator().manual_seed(0))
    ours = resize_bias_table(table, (4, 4), (7, 7))
    theirs = resize_rel_pos_bias_table(table, new_window_size=(7, 7), new_bias_shape=(172, 3))
    assert ours.shape == theirs.shape == (172, 3)
    assert torch.equal(ours[-3:], table[-3:])
    assert float((ours - theirs).abs().max()) > 0.01
    assert resize_bias_table(table, (4, 4), (4, 6)).shape == (80, 3)
    assert resize_bias_table(table, (4, 4), (4, 4)) is table


# --- wrong files for a format -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "file", "message"),
    [
        ("moco_v3", "deit/plain.pth", "is not one of moco_v3 as its authors save them"),
        ("dino_teacher", "dino/backbone.pth", "expected the teacher under one of 'teacher.backbone.'"),
        ("cae", "beit/pretrained.pth", "is not one of cae"),
        ("beit", "mae/full.pth", "rel_pos_bias.relative_position_bias_table is missing"),
        ("mae", "vicreg/backbone.pth", "expected a ViT's keys"),
        ("vicreg", "dino/backbone.pth", "expected a ResNet's keys"),
        ("deit", "mae/full.pth", r"unexpected \(decoder"),
        ("mae", "deit/plain.pth", r"2 unexpected \(head.bias, head.weight\)"),
        ("dino", "mae/encoder.pth", "is not one of dino"),
        ("dino_base16", "dino/backbone.pth", "is no dino_base16: patch 8, expected 16; width 16, expected 768"),
        ("vicreg_resnet50", "vicreg/backbone.pth", "is no vicreg_resnet50: stem 2, expected 64"),
    ],
)
def test_another_authors_file_is_refused(encoder: str, file: str, message: str) -> None:
    options = {} if encoder in ("beit", "vicreg", "vicreg_resnet50") else {"num_heads": 4}
    with pytest.raises(EncoderError, match=message) as caught:
        load(EncoderSpec.parse({"encoder": encoder, "checkpoint": str(FIXTURES / file), "options": options}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoder": "dino"}, "dino needs checkpoint: FILE"),
        ({"encoder": "dino", "random": True}, "has no size: give checkpoint: FILE, or one of dino_small16"),
        ({"encoder": "dino", "options": {"depth": 3}}, "takes the option num_heads only, got depth"),
        ({"encoder": "dino", "options": {"num_heads": 0}}, "must be a whole number of at least 1"),
        ({"encoder": "dino", "checkpoint": "dino/backbone.pth", "options": {"num_heads": 3}}, "3 heads do not divide its width of 16"),
        ({"encoder": "beit", "checkpoint": "beit/pretrained.pth", "options": {"num_heads": 2}}, "its position bias table has 4 heads"),
        ({"encoder": "dino", "checkpoint": "dino/backbone.pth", "prefix": "nothing."}, "no key begins with the prefix 'nothing.'"),
        ({"encoder": "dino_student", "checkpoint": "dino/full.pth", "prefix": "teacher.head.", "options": {"num_heads": 4}}, "expected a ViT's keys"),
    ],
)
def test_wrong_requests_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load(EncoderSpec.parse(keys, base=FIXTURES))


def test_a_projector_is_no_classifier_of_deits() -> None:
    entry = {
        "encoder": "deit",
        "checkpoint": "moco_v3/vit.pth",
        "prefix": "state_dict.module.base_encoder.",
        "options": {"num_heads": 4},
        "drop": ["state_dict."],
    }
    with pytest.raises(EncoderError, match=r"16 unexpected \(head\.0\.weight"):
        load(EncoderSpec.parse(entry, base=FIXTURES))


def test_a_fine_tuned_beit_is_refused(tmp_path: Path) -> None:
    content = torch.load(FIXTURES / "beit/pretrained.pth", weights_only=False)
    content["model"]["fc_norm.weight"] = torch.ones(16)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match="is a fine-tuned BEiT"):
        load(EncoderSpec.parse({"encoder": "beit", "checkpoint": str(tmp_path / "a.pth")}))


# --- pretraining heads ------------------------------------------------------------------------------------------------


def test_a_head_can_be_left_out() -> None:
    path = FIXTURES / "dino/full_teacher.json"
    encoder = fixture_encoder(path, drop=["head."])
    assert encoder.info.projection_dim is None
    assert encoder.info.weights_sha256 == fixture_encoder(FIXTURES / "dino/backbone.json").info.weights_sha256
    moco = fixture_encoder(FIXTURES / "moco_v3/vit.json", drop=["head."])
    assert moco.info.projection_dim is None
    assert moco.info.load_report is not None
    assert sum("head." in name for name in moco.info.load_report.dropped) == 16


@pytest.mark.parametrize(("file", "head"), [("dino/full.pth", "last_layer.weight_v"), ("dino/full.pth", "mlp.0.bias")])
def test_an_incomplete_head_is_refused(file: str, head: str, tmp_path: Path) -> None:
    content = torch.load(FIXTURES / file, weights_only=False)
    content["teacher"][f"head.unknown.{head}"] = content["teacher"].pop(f"head.{head}")
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(EncoderError, match=r"pretraining head"):
        load(EncoderSpec.parse({"encoder": "dino", "checkpoint": str(tmp_path / "a.pth"), "options": {"num_heads": 4}}))


def test_torchs_weight_norm_is_ours() -> None:
    from harness.encoders.heads import WeightNormed

    torch.manual_seed(0)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 7, bias=False))
    gain, direction = reference.parametrizations.weight.original0, reference.parametrizations.weight.original1  # type: ignore[union-attr]
    ours = WeightNormed(direction)
    ours.load_state_dict({"weight_g": gain * 3, "weight_v": direction})
    reference.parametrizations.weight.original0.data.mul_(3)  # type: ignore[union-attr, operator]
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), reference(x))
