"""`harness.evaluate`: a sweep's values in one process, and a live module that comes back as it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import harness
from harness.encoders import EncoderSpec, load
from harness.errors import HarnessError, RequestError
from harness.local import Score
from harness.results.tables import RESULTS, read_table
from harness.sweep import main
from tests.helpers import here, tiny
from tests.helpers.runs import VOLATILE

ROOT = Path(__file__).parent.parent
SPEC = {"name": "tiny_vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 64}}
SEARCH = {"trials": 2, "stack": 2, "lr": [1e-3, 1.0]}
RESOURCES = {"batch_size": 8, "precision": "float32"}
QUICK = {"epochs": 2, "batch_size": 8}
TASKS = ["tiny/*", "tiny/object-mlp", "tiny/object-linear-streamed", "tiny/finetune", "tiny/dropped-tokens", "noval/object-linear"]
PROTOCOL = {
    **dict.fromkeys(("object-linear", "part-linear", "object-mlp", "object-linear-streamed"), QUICK),
    "object-segmentation": {"epochs": 2},
    "finetune": {**QUICK, "rungs": 2, "eta": 2},
}
UNLIKE = VOLATILE | {"run_id"}
"""Columns in which an evaluation differs from a sweep: times, and the name of the request."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("local")
    tiny.build(root)
    tiny.build(root, name="noval", splits={"train": 40, "test": 12})
    return root


def plain(record: Any) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in UNLIKE}


def predictions_in(folder: Path, score: Score) -> list[tuple[Any, ...]]:
    """The rows of a run's table of predictions that a score is of."""
    path = folder / "predictions" / score.encoder / f"{score.task}.parquet"
    rows = read_table(path) if path.exists() else []
    return [tuple(row[name] for name in ("key", "group", "target", "prediction", "score")) for row in rows if row["protocol"] == score.protocol]


def same_as_in(folder: Path, scores: list[Score]) -> None:
    rows = read_table(folder / "results.parquet")
    assert [plain(score.record) for score in scores] == [plain(row) for row in rows]
    for score in scores:
        assert list(zip(*score.predictions.values(), strict=True)) == predictions_in(folder, score)


def evaluate(data: Path, encoder: Any = SPEC, tasks: Any = "tiny/object-linear", **changes: Any) -> list[Score]:
    settings: dict[str, Any] = {"search": SEARCH, "protocol": PROTOCOL, "resources": RESOURCES, "device": "cpu"}
    return harness.evaluate(encoder, tasks, data, **{**settings, **changes})


# --- values -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_task_has_the_values_of_a_sweep(data: Path, tmp_path: Path) -> None:
    here.run(tmp_path, tiny.sweep_text(data, tasks=TASKS, search=SEARCH, protocol=PROTOCOL, encoders=[SPEC]))
    scores = evaluate(data, tasks=TASKS)
    same_as_in(tmp_path / "out", scores)
    assert {score.status for score in scores} == {"ok"}
    assert len({score.probe for score in scores}) >= 7


@pytest.mark.slow
def test_a_sweep_on_ray_has_the_same_values(data: Path, tmp_path: Path) -> None:
    tasks = ["tiny/object-linear", "tiny/part-retrieval", "tiny/finetune"]
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(data, tasks=tasks, search=SEARCH, protocol=PROTOCOL, encoders=[SPEC]))
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 0
    same_as_in(tmp_path / "out", evaluate(data, tasks=tasks))


def test_a_score_has_the_columns_of_a_record(data: Path) -> None:
    score = evaluate(data, tasks=["tiny/object-knn"])[0]
    assert list(score.record) == RESULTS.names
    assert all(getattr(score, name) == score.record[name] for name in RESULTS.names)
    assert (score.task, score.n, len(score.predictions["key"]), score.error) == ("tiny/object-knn", 24, 24, None)
    assert set(RESULTS.names) <= set(dir(score))
    assert repr(score).startswith("<Score tiny/object-knn@dino accuracy: ")
    with pytest.raises(AttributeError, match="a score has no 'values'; its columns are run_id, "):
        score.values  # noqa: B018


def test_a_seed_is_that_of_the_search(data: Path) -> None:
    first, second, third = evaluate(data, seed=1), evaluate(data, search={**SEARCH, "seed": 1}), evaluate(data)
    assert [plain(score.record) for score in first] == [plain(score.record) for score in second]
    assert {score.seed for score in first} == {1}
    assert [score.predictions for score in first] != [score.predictions for score in third]


def test_what_surrounds_the_call_changes_no_value(data: Path) -> None:
    expected = [plain(score.record) for score in evaluate(data)]
    torch.manual_seed(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert [plain(score.record) for score in evaluate(data)] == expected
    with torch.inference_mode():
        assert [plain(score.record) for score in evaluate(data)] == expected


def test_an_undefined_task_and_a_failed_one_have_scores_with_a_reason(data: Path) -> None:
    resnet = {"name": "resnet", "architecture": "test_resnet", "random": True, "preprocessing": {"size": 32}}
    (undefined, _) = evaluate(data, resnet, "tiny/object-knn", protocol={"readouts": ["cls"]})
    assert (undefined.status, undefined.value, undefined.error) == ("undefined", None, "cls: the encoder has no cls token")
    assert undefined.predictions == {}
    failed = evaluate(data, protocol={"object-linear": {**QUICK, "lr_bounds": [1e38, 2e38]}})[0]
    assert (failed.status, failed.value) == ("failed", None)
    assert "1e" in failed.error


# --- the encoder ------------------------------------------------------------------------------------------------------


def network_of(spec: dict[str, Any], **keywords: Any) -> nn.Module:
    """A module that somebody else made, with the weights of a spec."""
    network: nn.Module = timm.create_model(spec["architecture"], **keywords)
    network.load_state_dict(load(EncoderSpec.parse(spec)).module.trunk.state_dict(), strict=False)  # type: ignore[union-attr]
    return network


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet", "test_byobnet"])
def test_a_live_module_has_the_values_of_its_weights(data: Path, architecture: str) -> None:
    spec = {"name": "e", "architecture": architecture, "random": True, "preprocessing": {"size": 64}}
    tasks, search = ["tiny/object-linear", "tiny/object-linear-streamed"], {**SEARCH, "trials": 1}
    expected = evaluate(data, spec, tasks, search=search)
    scores = evaluate(data, {"module": network_of(spec), "name": "e", "preprocessing": {"size": 64}}, tasks, search=search)
    for name in ("encoder", "weights_sha256", "task", "metric", "value", "ci_low", "ci_high", "n", "hyperparameters", "status", "error"):
        assert [getattr(score, name) for score in scores] == [getattr(score, name) for score in expected], name
    assert [score.predictions for score in scores] == [score.predictions for score in expected]


def test_names_specs_and_entries_are_one(data: Path) -> None:
    expected = [plain(score.record) for score in evaluate(data)]
    assert [plain(score.record) for score in evaluate(data, EncoderSpec.parse(SPEC))] == expected


def test_a_live_module_comes_back_as_it_was(data: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=7)
    network.train()
    network.layer1.eval()  # type: ignore[operator, union-attr]
    network.conv1.requires_grad_(False)  # type: ignore[operator, union-attr]
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    gradients = {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in network.named_parameters()}
    modes = {name: module.training for name, module in network.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    modules = [id(module) for module in network.modules()]
    finetuned = {"finetune": {"epochs": 1, "batch_size": 12, "rungs": 1}}
    entry = {"module": network, "preprocessing": {"size": 32}}
    scores = evaluate(data, entry, ["tiny/object-knn", "tiny/finetune"], protocol=finetuned, search={"trials": 1, "stack": 1})
    assert {score.status for score in scores} == {"ok"}
    assert modules == [id(module) for module in network.modules()]
    assert modes == {name: module.training for name, module in network.named_modules()}
    assert needs == {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in network.state_dict().items())
    for name, parameter in network.named_parameters():
        before = gradients[name]
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(before, parameter.grad)  # type: ignore[arg-type]
    network(torch.randn(2, 3, 32, 32)).sum().backward()


class Patches(nn.Module):
    """A network with nothing of timm's but `forward_features`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 8, 8)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images)  # type: ignore[no-any-return]


def test_a_network_of_ones_own_needs_forward_features_alone(data: Path) -> None:
    for module in (Patches(), nn.DataParallel(Patches()), Patches().to(torch.bfloat16)):
        (score, _) = evaluate(data, module, "tiny/object-knn")
        assert (score.status, score.encoder, score.readout) == ("ok", "Patches", "mean")


class Broken(Patches):
    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        raise KeyError("layers")


class Uncopied(Patches):
    def __deepcopy__(self, memo: Any) -> nn.Module:
        raise RuntimeError("it holds a file")


# --- requests that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "words"), [
    (nn.Linear(3, 4), "expected a vision transformer of timm's making, or a network with forward_features(images), which gives a feature map"),
    (Broken(), "that fails with 'layers'"),
    (Uncopied(), "expected a module that copy.deepcopy can copy, got a Uncopied that fails with it holds a file"),
    ({"module": "vit"}, "module must be a torch module, got str"),
    ({"module": Patches(), "preprocesing": {}}, "unknown key 'preprocesing' of a live module"),
    ({"module": Patches(), "preprocessing": {"size": -1}}, "preprocessing: size must be"),
    ({"module": Patches(), "name": ""}, "an encoder's name must be text"),
    (3, "an encoder is a name or a mapping, got int"),
    ("vit_tiny_patch16_224", "write timm:vit_tiny_patch16_224"),
    ({**SPEC, "sede": 3}, "unknown key 'sede'"),
])  # fmt: skip
def test_an_encoder_that_cannot_be_is_refused_in_one_line(data: Path, encoder: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        evaluate(data, encoder, "tiny/object-knn")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"tasks": "tiny/object-knm"}, "object-knn"),
    ({"tasks": []}, "tasks: expected at least one, got an empty list"),
    ({"search": {"trails": 2}}, "did you mean 'trials'"),
    ({"protocol": {"epochs": -1}}, "epochs"),
    ({"resources": {"precision": "int8"}}, "precision"),
    ({"seed": -1}, "seed"),
    ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
    ({"device": "meta"}, "device: expected cpu or cuda, got 'meta'"),
    ({"data": "/nowhere"}, "/nowhere"),
])  # fmt: skip
def test_a_request_that_cannot_be_is_refused_in_one_line(data: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as refused:
        evaluate(**{"data": data, **changes})
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_fault_of_the_program_is_an_error_of_the_harness(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.local.records", lambda *_: 1 / 0)
    with pytest.raises(HarnessError, match="ZeroDivisionError: division by zero") as failure:
        evaluate(data, tasks="tiny/object-knn")
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = sorted(data.rglob("*"))
    torch.manual_seed(3)
    torch.set_num_threads(2)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16")
    state = torch.get_rng_state()
    evaluate(data, tasks=["tiny/object-linear", "tiny/object-linear-streamed"])
    assert torch.equal(torch.get_rng_state(), state)
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps, torch.get_num_threads()) == ("bf16", 4, 2)
    assert [*(tmp_path / "work").iterdir(), *(tmp_path / "temporary").iterdir()] == []
    assert sorted(data.rglob("*")) == before


# --- the face of the package ------------------------------------------------------------------------------------------


def test_the_face_of_the_package() -> None:
    assert harness.Score is Score
    with pytest.raises(AttributeError, match="has no attribute 'elevate'"):
        harness.elevate  # type: ignore[attr-defined]  # noqa: B018


def test_the_documented_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluate.md").read_text(), re.DOTALL)
    exec(compile(example, "docs/evaluate.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["stamps/object-knn", "accuracy"]
    assert any(line.startswith("stamps/object-retrieval") for line in lines)
