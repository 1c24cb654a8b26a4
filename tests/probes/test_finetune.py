"""Fine-tuning in plain torch: the network and its layers, groups, schedule, drop path, a step, mixing, checkpoints, scoring."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

from harness.core import Encoder, Preprocessing, Sample, StreamSetting
from harness.encoders import EncoderSpec, load
from harness.encoders.create import wrap
from harness.encoders.identity import Identity
from harness.encoders.preprocessing import decide
from harness.encoders.resnet import Resnet, ResnetShape
from harness.errors import ProbeError, RequestError, ShardError
from harness.features.device import Compute
from harness.features.readouts import parse_readout, read
from harness.probes import row_probe
from harness.probes.finetune import NAME, FinetuneFields, learning_rate, rung_ends
from harness.probes.finetune.training import FinetuneNetwork, FinetuneScorer, FinetuneTrainer, layers_of, parameter_groups, seeded, set_drop_path
from harness.probes.lib.pictures import Pictured
from harness.probes.lib.streaming import PaddedEncoder

torch.set_num_threads(1)
SMALL = {"epochs": 2, "batch_size": 6, "warmup": 0.0, "label_smoothing": 0.0, "init_std": 0.02}
ARCHITECTURES = ["test_vit", "test_efficientnet"]


@pytest.fixture(scope="module")
def compute() -> Compute:
    return Compute("float32", False, 1)


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    specs = {name: {"name": name, "architecture": name, "random": True, "preprocessing": {"size": 32}} for name in ARCHITECTURES}
    return {name: load(EncoderSpec.parse(spec)) for name, spec in specs.items()}


def setting_of(encoder: Encoder, compute: Compute, *, batch_size: int = 8, **protocol: Any) -> StreamSetting[FinetuneFields]:
    fields = FinetuneFields(**{**SMALL, **protocol})
    return StreamSetting(encoder=PaddedEncoder(encoder, compute, batch_size), protocol=fields, classes=3, seed=0)


def pictures(count: int, seed: int = 0) -> list[Pictured]:
    generator = torch.Generator().manual_seed(seed)
    return [Pictured(image=torch.randn(3, 32, 32, generator=generator), target=index % 3, group=str(index)) for index in range(count)]


def trained(setting: StreamSetting[FinetuneFields], batches: list[list[Pictured]], rate: float = 1e-3) -> FinetuneTrainer:
    trainer = FinetuneTrainer(setting, [("mean", rate)])
    for step, batch in enumerate(batches):
        trainer.step(batch, step, len(batches))
    return trainer


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "test_convnext", "test_resnet"])
def test_the_trainable_copy_gives_the_tokens_of_its_encoder(architecture: str) -> None:
    encoder = load(EncoderSpec.parse({"name": "t", "architecture": architecture, "random": True, "preprocessing": {"size": 64}}))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for readout in ("mean", "cls", "mean@1") if encoder.info.has_cls else ("mean", "mean@1"):
        network = FinetuneNetwork(encoder, readout, 3).eval()
        network.initialise(1.0, 0)
        with torch.no_grad():
            expected = network.head(read(encoder.encode(images, blocks=(1,)), parse_readout(readout), encoder.info))
            assert torch.equal(network(images), expected)


def test_built_in_sizes_are_resized_once_and_then_trained() -> None:
    encoder = load(EncoderSpec.parse({"name": "t", "architecture": "swin_tiny_patch4_window7_224", "random": True, "preprocessing": {"size": 64}}))
    network = FinetuneNetwork(encoder, "mean", 3)
    network.initialise(1.0, 0)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.head(read(encoder.encode(images), parse_readout("mean"), encoder.info))
    logits = network(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_moves_and_the_encoder_stays(architecture: str, encoders: dict[str, Encoder], compute: Compute) -> None:
    encoder = encoders[architecture]
    digest, images = encoder.module.digest(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # type: ignore[operator]
    before = encoder.encode(images).patches.clone()
    trainer = FinetuneTrainer(setting_of(encoder, compute), [("mean", 1e-2)])
    first = {name: parameter.detach().clone() for name, parameter in trainer.network.named_parameters()}
    for step in range(3):
        trainer.step(pictures(6, seed=step), step, 4)
    still = [name for name, parameter in trainer.network.named_parameters() if torch.equal(parameter, first[name])]
    assert not still
    assert encoder.module.digest() == digest  # type: ignore[operator]
    assert torch.equal(encoder.encode(images).patches, before)
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())


# --- groups -----------------------------------------------------------------------------------------------------------


def scales(network: FinetuneNetwork, **fields: Any) -> dict[str, tuple[float, float]]:
    """Parameter → (lr_scale, weight_decay)."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network, FinetuneFields(**fields))
    return {names[id(parameter)]: (group["lr_scale"], group["weight_decay"]) for group in groups for parameter in group["params"]}


def test_rates_of_a_vit_by_layer_are_those_of_beit_and_mae(encoders: dict[str, Encoder]) -> None:
    by_parameter = scales(FinetuneNetwork(encoders["test_vit"], "mean", 3), layer_decay=0.5, weight_decay=0.05)
    assert len(by_parameter) == len(list(encoders["test_vit"].module.parameters())) + 2
    expected = {
        "trunk.cls_token": (0.5**7, 0.0),
        "trunk.pos_embed": (0.5**7, 0.0),
        "trunk.patch_embed.proj.weight": (0.5**7, 0.05),
        "trunk.patch_embed.proj.bias": (0.5**7, 0.0),
        "trunk.blocks.0.attn.qkv.weight": (0.5**6, 0.05),
        "trunk.blocks.0.norm1.weight": (0.5**6, 0.0),
        "trunk.blocks.4.mlp.fc1.bias": (0.5**2, 0.0),
        "trunk.blocks.5.mlp.fc1.weight": (0.5**1, 0.05),
        "trunk.norm.weight": (1.0, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
    }
    assert {name: by_parameter[name] for name in expected} == expected
    for name, (scale, decay) in by_parameter.items():
        if name.startswith("trunk.blocks."):
            assert scale == 0.5 ** (6 - int(name.split(".")[2]))
        assert (decay == 0.05) == (name.endswith("weight") and "norm" not in name)


def test_rates_of_a_convolutional_network_by_block(encoders: dict[str, Encoder]) -> None:
    by_parameter = scales(FinetuneNetwork(encoders["test_efficientnet"], "mean", 3), layer_decay=0.5, weight_decay=0.05)
    expected = {
        "trunk.conv_stem.weight": (0.5**6, 0.05),
        "trunk.bn1.weight": (0.5**6, 0.0),
        "trunk.blocks.0.0.conv.weight": (0.5**5, 0.05),
        "trunk.blocks.4.0.conv_pw.weight": (0.5**1, 0.05),
        "trunk.conv_head.weight": (0.5**1, 0.05),
        "head.weight": (1.0, 0.05),
    }
    assert {name: by_parameter[name] for name in expected} == expected


def test_a_network_that_tells_no_layers_is_one_layer_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    trunk = Resnet(ResnetShape(stem=8, layers=(1, 1, 1, 1), bottleneck=False))
    assert set(layers_of(trunk).values()) == {0}
    preprocessing = decide(EncoderSpec(name="r"), Preprocessing(size=(32, 32), resize=32), "made for it")
    about = Identity(name="r", family="t", architecture="r", source="t", preprocessing=preprocessing, random=True)
    by_parameter = scales(FinetuneNetwork(wrap(trunk, about), "mean", 3), layer_decay=0.5)
    assert {scale for scale, _ in by_parameter.values()} == {1.0}
    assert "no effect" in caplog.text


@pytest.mark.parametrize(("architecture", "places"), [("test_vit", 6), ("test_convnext", 9), ("test_resnet", 4)])
def test_drop_path_is_where_and_what_timm_makes_it(architecture: str, places: int) -> None:
    ours, theirs = timm.create_model(architecture), timm.create_model(architecture, drop_path_rate=0.3)
    assert set_drop_path(ours, 0.3) == places

    def rates(network: nn.Module) -> dict[str, float]:
        return {name: module.drop_prob for name, module in network.named_modules() if isinstance(module, DropPath) and module.drop_prob}

    assert rates(ours) == pytest.approx(rates(theirs))
    assert max(rates(ours).values()) == pytest.approx(0.3)
    set_drop_path(ours, 0.0)
    assert not rates(ours)


# --- schedule and rungs -----------------------------------------------------------------------------------------------


def test_the_schedule_value_by_value() -> None:
    """100 epochs of 10 steps: MAE's fractional epochs stand for the shares of the training used here."""
    for step in (0, 1, 25, 49, 50, 51, 500, 999):
        epoch = step / 10
        expected = 2e-3 * epoch / 5 if epoch < 5 else 1e-6 + (2e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / (100 - 5)))
        assert learning_rate(2e-3, step, 1000, warmup=0.05, min_lr=1e-6) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(2e-3, 0, 1000, warmup=0.05, min_lr=1e-6) == 0
    assert learning_rate(2e-3, 50, 1000, warmup=0.05, min_lr=1e-6) == 2e-3
    assert learning_rate(2e-3, 0, 1000, warmup=0.0, min_lr=1e-6) == 2e-3
    assert {learning_rate(1e-7, step, 10, warmup=0.0, min_lr=1e-6) for step in range(10)} == {1e-7}


def test_the_schedule_is_that_of_timm() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=95, lr_min=1e-6, warmup_t=5, warmup_prefix=True)
    for step in range(100):
        assert learning_rate(2e-3, step, 100, warmup=0.05, min_lr=1e-6) == pytest.approx(theirs._get_lr(step)[0], rel=1e-9, abs=1e-15)


def test_a_step_takes_the_scheduled_rate_of_each_layer(encoders: dict[str, Encoder], compute: Compute) -> None:
    trainer = FinetuneTrainer(setting_of(encoders["test_vit"], compute, warmup=0.5, layer_decay=0.5), [("mean", 1e-3)])
    trainer.step(pictures(6), 1, 8)
    names = {id(parameter): name for name, parameter in trainer.network.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert rates["head.weight"] == pytest.approx(1e-3 * (1 / 8) / 0.5)
    assert rates["trunk.cls_token"] == pytest.approx(1e-3 * (1 / 8) / 0.5 * 0.5**7)


@pytest.mark.parametrize(("epochs", "rungs", "eta", "ends"), [
    (100, 3, 3, (12, 34, 100)),
    (100, 2, 4, (25, 100)),
    (100, 1, 3, (100,)),
    (3, 3, 3, (1, 3)),
    (1, 3, 2, (1,)),
])  # fmt: skip
def test_rungs_end_after_shares_of_the_training(epochs: int, rungs: int, eta: int, ends: tuple[int, ...]) -> None:
    assert rung_ends(epochs, rungs, eta) == ends


@pytest.mark.parametrize("wrong", [{"layer_decay": 0.0}, {"drop_path": 1.0}, {"lr_bounds": (1e-2, 1e-3)}, {"eta": 1}, {"rungs": 0}, {"warmup": 1.0}])
def test_fields_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong)) if "lr_bounds" not in wrong else "bounds in order"):
        FinetuneFields().replaced(**wrong)


def test_it_cannot_be_fitted_to_a_bank() -> None:
    with pytest.raises(ProbeError, match="expected a stream of images, got rows"):
        row_probe(NAME)


# --- a step -----------------------------------------------------------------------------------------------------------


def test_a_step_is_one_of_adamw_by_hand(encoders: dict[str, Encoder], compute: Compute) -> None:
    """No drop path, one group: torch's AdamW on the same network, loss and data."""
    plain = {"drop_path": 0.0, "layer_decay": 1.0, "weight_decay": 0.0, "min_lr": 0.0, "label_smoothing": 0.1, "clip_norm": 0.5}
    setting = setting_of(encoders["test_vit"], compute, **plain)
    trainer = trained(setting, [pictures(6, seed=step) for step in range(3)])
    network = FinetuneNetwork(encoders["test_vit"], "mean", 3)
    network.initialise(0.02, 0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        batch = pictures(6, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 3)) / 2
        optimizer.zero_grad()
        shares = torch.full((6, 3), 0.1 / 3)
        shares[range(6), [picture.target for picture in batch]] += 0.9
        (-(log_softmax(network(torch.stack([picture.image for picture in batch])), dim=1) * shares).sum(dim=1).mean()).backward()
        norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in network.parameters() if parameter.grad is not None))
        for parameter in network.parameters():
            parameter.grad *= min(1.0, 0.5 / (norm + 1e-6))  # type: ignore[operator]
        optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(trainer.network.get_parameter(name), parameter, rtol=1e-3, atol=2e-5)


def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(encoders: dict[str, Encoder], compute: Compute) -> None:
    def gradients(batch_size: int) -> dict[str, torch.Tensor]:
        setting = setting_of(encoders["test_vit"], compute, batch_size=batch_size, drop_path=0.0)
        trainer = trained(setting, [pictures(7)])
        return {name: parameter.grad for name, parameter in trainer.network.named_parameters() if parameter.grad is not None}

    whole, pieces = gradients(8), gradients(2)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["train", "frozen"])
def test_batch_norms_keep_their_statistics_where_asked(kind: str, encoders: dict[str, Encoder], compute: Compute) -> None:
    before = dict(encoders["test_efficientnet"].module.trunk.named_buffers())["bn1.running_mean"]  # type: ignore[union-attr]
    trainer = trained(setting_of(encoders["test_efficientnet"], compute, batch_norm=kind), [pictures(6), pictures(1)])
    after = dict(trainer.network.named_buffers())["trunk.bn1.running_mean"]
    assert torch.equal(before, after) == (kind == "frozen")
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.network.parameters())


def test_what_a_step_draws_is_a_function_of_its_seed_and_number() -> None:
    def drawn(seed: int, step: int) -> tuple[float, float]:
        with seeded(seed, step, torch.device("cpu")):
            return float(torch.rand(1)), float(np.random.rand())  # noqa: NPY002

    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = float(torch.rand(1)), float(np.random.rand())  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    first = drawn(0, 0)
    assert (float(torch.rand(1)), float(np.random.rand())) == expected, "the process's own states stay"  # noqa: NPY002
    assert first == drawn(0, 0)
    assert len({first, drawn(0, 1), drawn(1, 0)}) == 3


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
@pytest.mark.parametrize("count", [1, 6, 7])
def test_mixed_images_keep_their_shares(mix: dict[str, float], count: int, encoders: dict[str, Encoder], compute: Compute) -> None:
    """Constant images: the pixels of a mixed image show its components."""
    trainer = FinetuneTrainer(setting_of(encoders["test_vit"], compute, label_smoothing=0.3, **mix), [("mean", 1e-3)])
    targets = torch.arange(count) % 3
    images = targets.float()[:, None, None, None].expand(count, 3, 32, 32).clone()
    with seeded(0, 0, torch.device("cpu")):
        mixed, shares = trainer.mixed(images, targets)
    assert mixed.shape == (count, 3, 32, 32)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(count))
    pure = (shares - 0.1) / 0.7  # smoothing of 0.3 over three classes
    torch.testing.assert_close((pure * torch.arange(3)).sum(dim=1), mixed.mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    if count == 6:
        assert 0 < float(pure[0].max()) < 1


def test_the_moving_average_is_what_is_scored(encoders: dict[str, Encoder], compute: Compute) -> None:
    batches = [pictures(6, seed=step) for step in range(4)]
    plain = FinetuneTrainer(setting_of(encoders["test_vit"], compute), [("mean", 1e-3)])
    average: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(batches):
        plain.step(batch, step, 4)
        weights = {name: parameter.detach().clone() for name, parameter in plain.network.named_parameters()}
        average = weights if step == 0 else {name: 0.5 * average[name] + 0.5 * weights[name] for name in weights}
    (state,) = trained(setting_of(encoders["test_vit"], compute, ema_decay=0.5), batches).fitted()
    for name, expected in average.items():
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-7)
    assert not same(state, plain.fitted()[0])


def test_a_rate_that_diverges_says_so(encoders: dict[str, Encoder], compute: Compute) -> None:
    with pytest.raises(ProbeError, match=r"finite loss.*1e\+30.*search below it"):
        trained(setting_of(encoders["test_vit"], compute), [pictures(6, seed=step) for step in range(4)], rate=1e30)


def test_fp16_and_stacks_are_refused(encoders: dict[str, Encoder], compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of(encoders["test_vit"], compute)
    with pytest.raises(ProbeError, match="one learning rate at a time"):
        FinetuneTrainer(setting, [("mean", 1e-3), ("mean", 1e-2)])
    monkeypatch.setattr(setting.encoder, "precision", "fp16")
    with pytest.raises(ProbeError, match="bf16 or float32"):
        FinetuneTrainer(setting, [("mean", 1e-3)])


def test_a_sample_without_a_label_cannot_be_used(encoders: dict[str, Encoder], compute: Compute) -> None:
    trainer = FinetuneTrainer(setting_of(encoders["test_vit"], compute), [("mean", 1e-3)])
    image = np.zeros((40, 50, 3), np.uint8)
    assert trainer.draw(Sample(key="a", image=image, label=2), np.random.default_rng(0)).image.shape == (3, 32, 32)
    for label in (None, 3):
        with pytest.raises(ShardError):
            trainer.draw(Sample(key="a", image=image, label=label), np.random.default_rng(0))


# --- checkpoints and scoring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.9, "mixup": 0.8, "cutmix": 1.0, "clip_norm": 1.0}], ids=["plain", "everything"])
def test_a_training_goes_on_from_its_checkpoint_to_the_bit(
    architecture: str, fields: dict[str, Any], encoders: dict[str, Encoder], compute: Compute
) -> None:
    setting = setting_of(encoders[architecture], compute, drop_path=0.3, **fields)
    batches = [pictures(count, seed=step) for step, count in enumerate((6, 6, 5, 6, 1))]
    straight = trained(setting, batches)
    first = FinetuneTrainer(setting, [("mean", 1e-3)])
    for step in range(2):
        first.step(batches[step], step, 5)
    (checkpoint,) = first.state()
    torch.manual_seed(99)  # another process is in another state
    resumed = FinetuneTrainer(setting, [("mean", 1e-3)])
    resumed.load([checkpoint])
    for step in range(2, 5):
        resumed.step(batches[step], step, 5)
    assert same(resumed.state()[0], straight.state()[0])
    assert same(resumed.fitted()[0], straight.fitted()[0])
    assert not same(first.fitted()[0], straight.fitted()[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_network_and_do_not_depend_on_the_batch(architecture: str, encoders: dict[str, Encoder], compute: Compute) -> None:
    setting = setting_of(encoders[architecture], compute, batch_size=4)
    trainer = trained(setting, [pictures(6, seed=step) for step in range(3)])
    scorer, batch = FinetuneScorer(setting, [("mean", trainer.fitted()[0])]), pictures(7, seed=9)
    (predictions,) = scorer.predict([str(index) for index in range(7)], batch)
    assert not isinstance(predictions, ProbeError)
    with torch.no_grad():
        logits = trainer.network.eval()(torch.stack([picture.image for picture in batch]))
    scores, classes = logits.softmax(dim=1).max(dim=1)
    assert predictions.predictions.tolist() == classes.tolist()
    np.testing.assert_allclose(predictions.scores, scores, rtol=1e-4)
    assert predictions.targets.tolist() == [index % 3 for index in range(7)]
    (alone,) = scorer.predict(["6"], batch[6:])
    assert not isinstance(alone, ProbeError)
    assert alone.scores[0] == predictions.scores[6]


def test_scores_of_a_network_without_finite_weights_are_refused(encoders: dict[str, Encoder], compute: Compute) -> None:
    setting = setting_of(encoders["test_vit"], compute)
    (state,) = FinetuneTrainer(setting, [("mean", 1e-3)]).fitted()
    state["head.bias"][0] = float("nan")
    (error,) = FinetuneScorer(setting, [("mean", state)]).predict(["a"], pictures(1))
    assert isinstance(error, ProbeError)
    assert "search below it" in str(error)


def test_in_bf16_the_weights_stay_in_float32(encoders: dict[str, Encoder]) -> None:
    setting = setting_of(encoders["test_vit"], Compute("bf16", False, 1), drop_path=0.0)
    try:
        trainer = trained(setting, [pictures(6, seed=0)] * 2)
    finally:
        exact = setting_of(encoders["test_vit"], Compute("float32", False, 1), drop_path=0.0)
    dtypes = {tensor.dtype for name, tensor in trainer.state()[0].items() if tensor.is_floating_point()}
    assert dtypes == {torch.float32}
    images = torch.stack([picture.image for picture in pictures(6)])
    with setting.encoder.autocast(), torch.no_grad():
        assert trainer.network(images).dtype == torch.bfloat16
    loss = [
        float(cross_entropy(network_trainer.network.eval()(images).detach(), torch.tensor([0, 1, 2, 0, 1, 2])))
        for network_trainer in (trainer, trained(exact, [pictures(6, seed=0)] * 2))
    ]
    assert loss[0] == pytest.approx(loss[1], rel=0.02)
