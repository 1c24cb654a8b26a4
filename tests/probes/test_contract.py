"""The contract of probes, tested on every probe of the folder with rows of its kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from harness.core import FittedStack, Predictions, Probe, Reading, RowProbe, Rows, Sample, StreamProbe, StreamSetting
from harness.data.augment import draw
from harness.encoders import EncoderSpec, load
from harness.errors import ProbeError, RequestError
from harness.features.device import Compute
from harness.probes import all_metrics, grid, probes, row_probe, stream_probe
from harness.probes.classifier import ClassifierProbe
from harness.probes.heads import TrainedProbe
from harness.probes.lib.streaming import PaddedEncoder

CPU = torch.device("cpu")
CLASSES, COUNT = 3, 24
RATES = [0.01, 0.1]
ROW_PROBES = {name: probe for name, probe in probes().items() if isinstance(probe, RowProbe)}
STREAM_PROBES = {name: probe for name, probe in probes().items() if isinstance(probe, StreamProbe)}
TRAINED = {name: probe for name, probe in ROW_PROBES.items() if isinstance(probe, TrainedProbe)}


# --- rows by kind -----------------------------------------------------------------------------------------------------


def rows_of(shape: tuple[int, ...], seed: int, **fields: Any) -> Rows:
    """Rows around the means of their classes, in read-only memory."""
    rng, targets = np.random.default_rng(seed), np.arange(COUNT) % CLASSES
    means = np.random.default_rng(99).standard_normal((CLASSES, shape[-1]))
    features = (rng.standard_normal((COUNT, *shape)) + means[targets].reshape(COUNT, *(1 for _ in shape[1:]), shape[-1])).astype(np.float32)
    names = [f"image-{index:02d}" for index in range(COUNT)]
    return frozen(Rows(keys=names, groups=names, targets=targets, features=features, **fields))


def frozen(rows: Rows) -> Rows:
    for array in (rows.features, rows.targets, rows.masks):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return rows


def vectors(seed: int) -> Rows:
    return rows_of((8,), seed)


def tokens(seed: int) -> Rows:
    return rows_of((2, 3, 8), seed)


def masked(seed: int) -> Rows:
    return rows_of((2, 3, 8), seed, masks=np.random.default_rng(seed).integers(0, CLASSES, (COUNT, 6, 9)).astype(np.uint8))


def marked(seed: int) -> Rows:
    return rows_of((2, 3, 8), seed, masks=np.random.default_rng(seed).integers(0, 2, (COUNT, 1, 6)).astype(np.uint8))


def patches(seed: int) -> Rows:
    """Two draws of two patches of every image."""
    whole = vectors(seed)
    rng, keys = np.random.default_rng(seed), [f"{key}#{draw}.{index}" for key in whole.keys for draw in range(2) for index in range(2)]
    features = whole.features[:].repeat(4, axis=0) + rng.standard_normal((4 * COUNT, 8)).astype(np.float32)
    return frozen(Rows(keys=keys, groups=[key.partition("#")[0] for key in keys], targets=whole.targets.repeat(4), features=features))


def compared(seed: int) -> Rows:
    return replace(patches(seed), reference=vectors(seed + 10))


@dataclass(frozen=True)
class Kind:
    """Rows that a probe reads, and fields that make it quick."""

    rows: Callable[[int], Rows] = vectors
    protocol: dict[str, Any] = field(default_factory=dict)
    classes: int = CLASSES


QUICK = {"epochs": 3, "batch_size": 10}
BAG = {"patches": 2, "draws": 2, "bag_size": 2}
KINDS = {
    "attentive": Kind(tokens, {**QUICK, "attention_heads": 4}),
    "bag_knn": Kind(patches, BAG),
    "bag_linear": Kind(patches, {**QUICK, **BAG}),
    "convergence": Kind(compared, BAG),
    "dense": Kind(masked, QUICK),
    "detector": Kind(marked, QUICK, classes=2),
    "lowshot": Kind(protocol={"share": 0.5}),
    "mlp": Kind(protocol={**QUICK, "width": 6, "dropout": 0.25}),
}
"""Probe → its kind of rows. All others read vectors; trained ones for a few epochs."""


def kind_of(name: str) -> Kind:
    return KINDS.get(name, Kind(protocol=QUICK if name in TRAINED else {}))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_num_threads(before)


def how(name: str, *, seed: int = 0, **protocol: Any) -> dict[str, Any]:
    kind = kind_of(name)
    return {"classes": kind.classes, "protocol": probes()[name].fields(**{**kind.protocol, **protocol}), "seed": seed, "device": CPU}


def training_rows(name: str) -> Rows | None:
    return kind_of(name).rows(0) if probes()[name].needs_train else None


def values_of(name: str) -> list[float | None]:
    """What its heads differ in."""
    return list(RATES) if probes()[name].has_learning_rate else list(grid(name, how(name)["protocol"])[-2:])


def fit(name: str, values: list[float | None] | None = None, *, seed: int = 0, **protocol: Any) -> FittedStack:
    return row_probe(name).fit(training_rows(name), values or values_of(name), **how(name, seed=seed, **protocol))


def same(first: Predictions, second: Predictions) -> bool:
    return (
        list(first.keys) == list(second.keys)
        and list(first.groups) == list(second.groups)
        and np.array_equal(first.targets, second.targets)
        and np.array_equal(first.predictions, second.predictions)
        and np.array_equal(first.scores, second.scores, equal_nan=True)
    )


# --- every probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "probe"), probes().items(), ids=probes())
def test_it_says_what_it_can_do(name: str, probe: Probe[Any]) -> None:
    assert isinstance(probe, RowProbe | StreamProbe)
    assert probe.fields.model_validate_json(probe.fields().to_json()) == probe.fields()  # a record has them as JSON
    assert probe.metrics
    assert set(probe.metrics) <= set(all_metrics())
    assert {quantity.name for quantity in probe.quantities} <= set(probe.metrics)
    assert probe.has_learning_rate <= probe.needs_train
    if probe.has_learning_rate:
        assert grid(name, probe.fields()) == (None,)


@pytest.mark.parametrize("name", probes())
def test_a_feed_that_it_does_not_have_is_refused(name: str) -> None:
    if name not in ROW_PROBES:
        with pytest.raises(ProbeError, match=f"{name} probe: expected a stream"):
            row_probe(name)
    if name not in STREAM_PROBES:
        with pytest.raises(ProbeError, match=f"{name} probe: expected rows"):
            stream_probe(name)


# --- on rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROW_PROBES)
def test_a_restored_head_predicts_as_it_did(name: str) -> None:
    stack, test = fit(name), kind_of(name).rows(1)
    for head in range(len(values_of(name))):
        state = load_tensors(save_tensors({key: tensor.contiguous() for key, tensor in stack.state(head).items()}))
        back = row_probe(name).restore(state, training_rows(name), **how(name))
        assert same(stack.predict(test, head), back.predict(test, 0))
        again = back.state(0)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", ROW_PROBES)
def test_a_head_of_a_stack_is_as_it_would_have_been_alone(name: str) -> None:
    stack, test = fit(name), kind_of(name).rows(1)
    for head, value in enumerate(values_of(name)):
        alone = fit(name, [value])
        assert all(torch.equal(alone.state(0)[key], tensor) for key, tensor in stack.state(head).items())
        assert same(stack.predict(test, head), alone.predict(test, 0))


@pytest.mark.parametrize("name", ROW_PROBES)
def test_the_seed_alone_decides_what_is_drawn(name: str) -> None:
    torch.manual_seed(1)
    first = fit(name, seed=5)
    torch.manual_seed(2)
    again = fit(name, seed=5)
    assert all(torch.equal(again.state(0)[key], tensor) for key, tensor in first.state(0).items())
    if name in TRAINED:
        other = fit(name, seed=6).state(0)
        assert any(not torch.equal(other[key], tensor) for key, tensor in first.state(0).items())


@pytest.mark.parametrize("name", ROW_PROBES)
def test_what_it_reads_stays_as_it_was(name: str) -> None:
    """The rows' memory is read-only: a write would fail, or warn, which is an error here."""
    train, test = training_rows(name), kind_of(name).rows(1)
    before = [None if rows is None else rows.features[:].copy() for rows in (train, test)]
    row_probe(name).fit(train, values_of(name), **how(name)).predict(test, 0)
    for rows, features in zip((train, test), before, strict=True):
        assert rows is None or np.array_equal(rows.features[:], features)


@pytest.mark.parametrize("name", ROW_PROBES)
def test_what_it_cannot_be_fitted_to_is_refused_in_one_line(name: str) -> None:
    probe, values, train = row_probe(name), values_of(name), training_rows(name)
    wrong_values: list[Any] = [[None], [], [-1.0], [float("nan")]] if values != [None] else [[0.1], [], [None, None]]
    for wrong in wrong_values:
        with pytest.raises(ProbeError, match=r"expected .* got ") as error:
            probe.fit(train, wrong, **how(name))
        assert "\n" not in str(error.value)
    if train is not None:
        with pytest.raises(ProbeError, match="expected training rows, got None"):
            probe.fit(None, values, **how(name))


@pytest.mark.parametrize("name", ROW_PROBES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named(name: str, value: float) -> None:
    def spoilt(rows: Rows) -> Rows:
        features = rows.features[:].copy()
        features.reshape(len(features), -1)[5, 0] = value
        return replace(rows, features=features)

    test = kind_of(name).rows(1)
    with pytest.raises(ProbeError, match=f"finite features, got NaN or infinity in '{test.keys[5]}'"):
        fit(name).predict(spoilt(test), 0)
    train = training_rows(name)
    if name in TRAINED and train is not None:
        with pytest.raises(ProbeError, match=f"finite features, got NaN or infinity in '{train.keys[5]}'"):
            row_probe(name).fit(spoilt(train), values_of(name), **how(name))


@pytest.mark.parametrize("name", [name for name in ROW_PROBES if probes()[name].fields.model_fields])
def test_a_field_of_another_type_is_refused(name: str) -> None:
    fields = how(name)["protocol"]
    wrong = next(iter(type(fields).model_fields))
    with pytest.raises(RequestError, match=rf"protocol\.{wrong}(\.0)?: .*got {{'no': 'such value'}}"):
        fields.replaced(**{wrong: {"no": "such value"}})


# --- trained on rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_a_head_that_diverges_says_so_and_leaves_the_others_alone(name: str) -> None:
    test, alone = kind_of(name).rows(1), fit(name, [0.01])
    stack = fit(name, [0.01, 1e30], epochs=30, weight_decay=1.0)
    with pytest.raises(ProbeError, match=r"got NaN or infinity at learning rate 1e\+30; search below it"):
        stack.predict(test, 1)
    alone = fit(name, [0.01], epochs=30, weight_decay=1.0)
    assert same(stack.predict(test, 0), alone.predict(test, 0))


@pytest.mark.parametrize("name", TRAINED)
def test_heads_can_be_looked_at_after_every_epoch_and_are_not_changed_by_it(name: str) -> None:
    probe, test, looks = TRAINED[name], kind_of(name).rows(1), list[Predictions]()
    stack = probe.fit(training_rows(name), [0.1], **how(name), after_epoch=lambda stack: looks.append(stack.predict(test, 0)))
    assert len(looks) == how(name)["protocol"].epochs
    assert same(looks[-1], stack.predict(test, 0))
    assert same(looks[-1], fit(name, [0.1]).predict(test, 0))
    assert not same(looks[0], looks[-1])


@pytest.mark.parametrize("name", TRAINED)
def test_weights_of_other_classes_are_not_restored(name: str) -> None:
    wrong = {**how(name), "classes": kind_of(name).classes + 1}
    with pytest.raises(ProbeError, match=f"expected weights of {wrong['classes']} classes"):
        row_probe(name).restore(fit(name).state(0), None, **wrong)


@pytest.mark.parametrize("name", TRAINED)
def test_a_head_continues_from_its_state_to_the_bit(name: str) -> None:
    probe, rows, arguments = TRAINED[name], kind_of(name).rows(0), how(name)
    fields = arguments["protocol"]
    examples = probe.examples(rows, arguments["classes"], fields, CPU)
    batches = [examples.batch(torch.arange(start, start + 8)) for start in (0, 8, 16)]
    drawn = probe.head.drawn(examples.width, arguments["classes"], fields, torch.Generator().manual_seed(0))

    def fresh() -> Any:
        return probe.head({key: tensor.clone() for key, tensor in drawn.items()}, fields)

    head, other = fresh(), fresh()
    for step, batch in enumerate(batches):
        assert batch is not None
        head.step(*batch, 0.1, (0, step))
        if step == 0:
            other.load(load_tensors(save_tensors({key: tensor.contiguous() for key, tensor in head.state().items()})))
        else:
            other.step(*batch, 0.1, (0, step))
    assert probe.head.shape(head.tensors()) == (examples.width, arguments["classes"])
    assert all(torch.equal(other.state()[key], tensor) for key, tensor in head.state().items())


# --- on streams -------------------------------------------------------------------------------------------------------


STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "attentive": ("all", {"attention_heads": 4}),
    "segmentation": (
        "tokens",
        {"iterations": 12, "crop": 32, "stride": 32, "train_scale": (64, 32), "test_scale": (64, 32), "warmup_steps": 2}
        | {"batch_size": 4, "mask": "object", "ignore_label": (255,)},
    ),
    "finetune": ("mean", {"lr_bounds": (1e-5, 1e-2)}),
}
"""Probe → a readout and protocol fields. All others read `mean` with their defaults."""


@pytest.fixture(scope="module")
def encoder() -> PaddedEncoder:
    spec = EncoderSpec.parse({"name": "t", "architecture": "test_vit", "random": True, "preprocessing": {"size": 32}})
    return PaddedEncoder(load(spec), Compute("float32", False, 1), 8)


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for index in range(8):
        image = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
        image[..., index % CLASSES] += 100
        samples.append(Sample(key=f"s{index}", image=image, label=index % CLASSES, object_mask=(image[..., 0] > 100).astype(np.uint8)))
    return samples


def setting_of(name: str, encoder: PaddedEncoder, **protocol: Any) -> StreamSetting[Any]:
    short = {"epochs": 2, "batch_size": 4} if "epochs" in probes()[name].fields.model_fields else {}
    fields = probes()[name].fields(**{**short, **STREAMS.get(name, ("", {}))[1], **protocol})
    return StreamSetting(encoder=encoder, protocol=fields, classes=CLASSES, seed=0)


def proposals_of(name: str, rates: list[float]) -> list[tuple[str, float | None]]:
    return [(STREAMS.get(name, ("mean", {}))[0], rate) for rate in rates]


def advance(trainer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        trainer.step([trainer.draw(sample, draw(0, step, sample.key)) for sample in samples()[:4]], step, 12)


def trained(name: str, setting: StreamSetting, rates: list[float]) -> list[dict[str, torch.Tensor]]:
    trainer = stream_probe(name).trainer(setting, proposals_of(name, rates))
    advance(trainer, 0, 3)
    return trainer.fitted()


def scored(name: str, setting: StreamSetting, fitted: list[dict[str, torch.Tensor]]) -> list[Predictions | ProbeError]:
    scorer = stream_probe(name).scorer(setting, [(proposals_of(name, [0.1])[0][0], state) for state in fitted])
    views = [scorer.view(sample) for sample in samples()]
    assert all(scorer.inputs(view) >= 1 for view in views)
    return scorer.predict([sample.key for sample in samples()], views)


@pytest.mark.parametrize("name", STREAM_PROBES)
def test_a_stream_is_resumed_to_the_bit_and_scored_for_every_sample(name: str, encoder: PaddedEncoder) -> None:
    setting, proposals = setting_of(name, encoder), proposals_of(name, [1e-3])
    whole, first, second = (stream_probe(name).trainer(setting, proposals) for _ in range(3))
    assert whole.batch_size == 4
    assert whole.steps(2) > 0
    advance(whole, 0, 3)
    advance(first, 0, 2)
    second.load([load_tensors(save_tensors({key: tensor.contiguous() for key, tensor in state.items()})) for state in first.state()])
    advance(second, 2, 3)
    for expected, got in zip(whole.fitted(), second.fitted(), strict=True):
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    (predictions,) = scored(name, setting, whole.fitted())
    assert isinstance(predictions, Predictions)
    assert set(predictions.keys) == {sample.key for sample in samples()}


@pytest.mark.parametrize("name", [name for name, probe in STREAM_PROBES.items() if probe.rungs(probe.fields()) is None])
def test_streamed_heads_do_not_touch_each_other(name: str, encoder: PaddedEncoder) -> None:
    setting = setting_of(name, encoder)
    for rate, state in zip([1e-3, 1e-1], trained(name, setting, [1e-3, 1e-1]), strict=True):
        (alone,) = trained(name, setting, [rate])
        assert all(torch.equal(alone[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", [name for name, probe in STREAM_PROBES.items() if isinstance(probe, ClassifierProbe)])
def test_a_streamed_head_is_restored_by_the_banked_probe(name: str, encoder: PaddedEncoder) -> None:
    setting = setting_of(name, encoder)
    (state,) = trained(name, setting, [0.1])
    restored = row_probe(name).restore(state, None, classes=CLASSES, protocol=setting.protocol, seed=0, device=CPU)
    assert all(torch.equal(restored.state(0)[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("name", [name for name, probe in STREAM_PROBES.items() if probe.rungs(probe.fields()) is None])
def test_a_streamed_head_that_diverged_says_so(name: str, encoder: PaddedEncoder) -> None:
    setting = setting_of(name, encoder, weight_decay=1.0)
    trainer = stream_probe(name).trainer(setting, proposals_of(name, [1e-3, 1e30]))
    advance(trainer, 0, 10)
    right, wrong = scored(name, setting, trainer.fitted())
    assert isinstance(right, Predictions)
    assert isinstance(wrong, ProbeError)
    assert str(wrong).endswith("got NaN or infinity at learning rate 1e+30; search below it")


@pytest.mark.parametrize(("name", "probe"), STREAM_PROBES.items(), ids=STREAM_PROBES)
def test_its_cost_grows_with_what_it_reads(name: str, probe: StreamProbe[Any]) -> None:
    small = Reading(train=100, chosen_on=10, read_to_choose=10, heads=4, input_size=(32, 32), sizes=((40, 48),))
    cost, larger = (probe.passes(probe.fields(), reading) for reading in (small, replace(small, chosen_on=20, read_to_choose=20)))
    assert 0 < cost.decoded < larger.decoded
    assert 0 < cost.encoded < larger.encoded
    assert cost.encoded_per_test_image > 0
    rungs = probe.rungs(probe.fields())
    assert rungs is None or (list(rungs.ends) == sorted(set(rungs.ends)) and rungs.eta > 1)
