"""What every encoder promises, held over every family: the families are those of the folder, their examples those of the fixtures' folder."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from harness.core import Encoder, Tokens
from harness.data.preprocess import prepare
from harness.encoders import EncoderSpec, all_families, describe, load
from harness.errors import EncoderError, RequestError
from harness.features.device import Compute, resolve_precision

FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
EXAMPLES = sorted(FIXTURES.glob("*/*.json"))
BATCH = 4


def example_spec(path: Path, **keys: Any) -> EncoderSpec:
    return EncoderSpec.parse({**json.loads(path.read_text())["spec"], **keys}, base=path.parent)


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def path(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


@pytest.fixture(scope="module")
def encoder(path: Path) -> Encoder:
    return load(example_spec(path))


@pytest.fixture(scope="module")
def images(encoder: Encoder) -> torch.Tensor:
    """More images than a batch, prepared as the encoder wants them."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2 * BATCH, 60, 80, 3), dtype=np.uint8)
    return torch.stack([prepare(picture, encoder.info.preprocessing, "crop") for picture in pictures])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everything(encoder: Encoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that an encoder gives, by name."""
    blocks = range(len(encoder.info.block_dims))
    tokens = encoder.encode(images, blocks=blocks, projection=encoder.info.projection_dim is not None)
    tensors = dict(parts("", tokens))
    for block in blocks:
        tensors |= parts(f"block {block} ", tokens.blocks[block])
    return tensors


def parts(prefix: str, tokens: Tokens) -> dict[str, torch.Tensor]:
    named = {"cls": tokens.cls, "registers": tokens.registers, "patches": tokens.patches, "projection": tokens.projection}
    return {f"{prefix}{name}": tensor for name, tensor in named.items() if tensor is not None}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("module", [family.__name__.rpartition(".")[2] for family in all_families()])  # type: ignore[attr-defined]
def test_every_family_has_an_example(module: str) -> None:
    assert any(path.parent.name == module for path in EXAMPLES), f"add tests/fixtures/encoders/{module}/NAME.json with a spec"


def test_the_example_is_its_familys(path: Path, encoder: Encoder) -> None:
    claiming = [family for family in all_families() if family.claims(example_spec(path))]
    assert [family.__name__.rpartition(".")[2] for family in claiming] == [path.parent.name]  # type: ignore[attr-defined]
    assert encoder.info.family == claiming[0].FAMILY


def test_shapes_are_those_described(encoder: Encoder, images: torch.Tensor) -> None:
    info, tensors = encoder.info, everything(encoder, images[:BATCH])
    assert tensors["patches"].shape == (BATCH, *info.grid, info.embed_dim)
    assert ("cls" in tensors) == info.has_cls
    if info.has_cls:
        assert tensors["cls"].shape == (BATCH, info.embed_dim)
    assert (tensors["registers"].shape if info.registers else None) == ((BATCH, info.registers, info.embed_dim) if info.registers else None)
    assert ("projection" in tensors) == (info.projection_dim is not None)
    if info.projection_dim is not None:
        assert tensors["projection"].shape == (BATCH, info.projection_dim)
    assert info.block_dims
    for block, width in enumerate(info.block_dims):
        assert tensors[f"block {block} patches"].shape[3] == width
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_the_description_is_true(path: Path, encoder: Encoder) -> None:
    info = encoder.info
    assert info == describe(example_spec(path))
    assert pickle.loads(pickle.dumps(info)) == info
    assert info.params == sum(parameter.numel() for parameter in encoder.module.parameters())
    assert len(info.weights_sha256) == 64
    assert info.source
    assert (info.load_report is None) == info.random
    if info.load_report is not None:
        assert info.load_report.unexpected == ()
        assert len(info.load_report.sha256) == 64


def test_frozen_in_eval_mode_without_gradients(encoder: Encoder, images: torch.Tensor) -> None:
    assert not any(module.training for module in encoder.module.modules())
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    before = {name: tensor.clone() for name, tensor in encoder.module.state_dict().items()}
    tensors = everything(encoder, images[:BATCH])
    assert not any(tensor.requires_grad for tensor in tensors.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.module.state_dict().items())


def test_deterministic(path: Path, encoder: Encoder, images: torch.Tensor) -> None:
    first, second, reloaded = (everything(instance, images[:BATCH]) for instance in (encoder, encoder, load(example_spec(path))))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, reloaded[name]), name


def test_features_depend_on_the_image(encoder: Encoder, images: torch.Tensor) -> None:
    for name, tensor in everything(encoder, images[:BATCH]).items():
        if name in ("cls", "patches", "projection"):
            assert relative(tensor[0], tensor[1]) > 1e-3, name


def test_exactly_the_same_whatever_else_is_in_the_batch(encoder: Encoder, images: torch.Tensor) -> None:
    batch, order = images[:BATCH], torch.tensor([2, 0, 3, 1])
    first, shuffled = everything(encoder, batch), everything(encoder, batch[order])
    others = everything(encoder, torch.cat([batch[:1], images[BATCH : 2 * BATCH - 1]]))
    padded = everything(encoder, batch[:1].expand(BATCH, -1, -1, -1))
    for name, tensor in first.items():
        assert torch.equal(shuffled[name], tensor[order]), name
        assert torch.equal(others[name][0], tensor[0]), name
        assert torch.equal(padded[name][0], tensor[0]), name


def test_the_same_across_batch_sizes_within_rounding(encoder: Encoder, images: torch.Tensor) -> None:
    first = everything(encoder, images[:BATCH])
    for size in (1, 3, 2 * BATCH):
        other = everything(encoder, images[:size])
        for name, tensor in first.items():
            count = min(size, BATCH)
            assert relative(other[name][:count], tensor[:count]) <= 1e-5, (name, size)


def test_another_size_and_aspect_is_taken(encoder: Encoder) -> None:
    height, width = encoder.info.preprocessing.size
    larger = torch.zeros(1, 3, 2 * height, width)
    assert encoder.encode(larger).patches.shape[1:3] == (2 * encoder.info.grid[0], encoder.info.grid[1])


def test_dropping_and_misplacing_work_or_are_refused(encoder: Encoder, images: torch.Tensor) -> None:
    keep, positions = torch.tensor([[0, 1]] * BATCH), torch.tensor([[1, 0]] * BATCH)
    if encoder.info.positions == "absolute" and len(set(encoder.info.block_dims)) == 1:
        partial = encoder.encode(images[:BATCH], keep=keep).patches
        assert partial.shape == (BATCH, 1, 2, encoder.info.embed_dim)
        assert relative(encoder.encode(images[:BATCH], keep=keep, positions=positions).patches, partial) > 1e-5
    else:
        with pytest.raises(EncoderError, match="cannot drop or misplace tokens"):
            encoder.encode(images[:BATCH], keep=keep)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bf16() -> Iterator[Compute]:
    yield Compute("bf16", False, 1)
    AcceleratorState._reset_state(True)


def _dtypes_of_matrix_products(network: torch.nn.Module) -> tuple[set[torch.dtype], list[Any]]:
    seen: set[torch.dtype] = set()
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        for module in network.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    return seen, handles


def test_bf16_computes_in_bf16_and_stays_near_float32(encoder: Encoder, images: torch.Tensor, bf16: Compute) -> None:
    exact = everything(encoder, images[:BATCH])
    seen, handles = _dtypes_of_matrix_products(encoder.module)
    with bf16.autocast():
        half = everything(encoder, images[:BATCH])
    for handle in handles:
        handle.remove()
    assert seen == {torch.float32 if encoder.info.float32_only else torch.bfloat16}
    for name in ("cls", "patches", "projection"):
        if name in exact:
            difference = relative(half[name], exact[name])
            assert difference == 0 if encoder.info.float32_only else 0 < difference < 0.02, name


def test_preparing_a_model_alone_would_leave_float32(bf16: Compute) -> None:
    """accelerate wraps `forward` and nothing else, which is why every call is made inside autocast."""
    encoder = load(example_spec(FIXTURES / "timm/vit.json"))
    trunk: Any = bf16.accelerator.prepare_model(encoder.module.trunk)  # type: ignore[union-attr]
    seen, _ = _dtypes_of_matrix_products(trunk)
    with torch.inference_mode():
        trunk.forward_features(torch.zeros(1, 3, 160, 160))
    assert seen == {torch.float32}


def test_resized_positions_do_not_depend_on_the_precision(bf16: Compute) -> None:
    path = FIXTURES / "dino/backbone.json"
    first, second = load(example_spec(path)), load(example_spec(path))
    oblong = torch.zeros(1, 3, 24, 64)
    with bf16.autocast():
        first.encode(oblong)
    torch.testing.assert_close(first.encode(oblong).patches, second.encode(oblong).patches, rtol=0, atol=0)


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(RequestError, match="fp16 needs a GPU"):
        resolve_precision("fp16", gpu=False)
    with pytest.raises(RequestError, match="fp16 needs a GPU"):
        Compute("fp16", False, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_on_a_gpu(path: Path, images: torch.Tensor, precision: Any) -> None:
    moved = load(example_spec(path))
    exact = everything(moved, images[:BATCH])
    compute = Compute(precision, True, 1)
    moved.module.to(compute.device)
    seen, _ = _dtypes_of_matrix_products(moved.module)
    with compute.autocast():
        half = everything(moved, images[:BATCH].to(compute.device))
    AcceleratorState._reset_state(True)
    expected = torch.bfloat16 if precision == "bf16" else torch.float16
    assert seen == {torch.float32 if moved.info.float32_only else expected}
    for name in ("cls", "patches", "projection"):
        if name in exact:
            assert relative(half[name].cpu(), exact[name]) < 0.02, name


def test_channels_last_is_the_layout_of_networks_with_batch_norms_and_changes_nothing_but_rounding(encoder: Encoder, images: torch.Tensor) -> None:
    network = encoder.module
    convolutional = any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert not encoder.info.channels_last or convolutional
    if not encoder.info.channels_last:
        return
    kernels = [module.weight for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    found = everything(encoder, images[:BATCH])
    try:
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for name, tensor in everything(encoder, images[:BATCH]).items():
            assert relative(tensor, found[name]) <= 1e-5, name
    finally:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
