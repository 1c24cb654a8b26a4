"""The attentive probe on a stream: it is the banked one, step by step; it learns what is planted; its statistics are those of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import load_sweep
from harness.core import EncoderInfo, Preprocessing, Rows, Sample, StreamSetting, Tokens, Trainer
from harness.data.augment import draw
from harness.data.manifest import load_manifest
from harness.errors import ProbeError, RequestError
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type
from harness.plan.plan import make_plan
from harness.probes import attentive, heads
from harness.probes.lib.streaming import PaddedEncoder
from harness.search.accounts import Accounts
from harness.search.build import state_of
from harness.search.runner import Runner
from harness.search.stream_feed import predicted
from harness.search.study import BankRef, Study
from harness.tasks import select, templates
from harness.tasks.streamed import ObjectAttentiveStreamed
from tests.helpers import tiny

torch.set_num_threads(1)
TASK = "object-attentive-streamed"
CLASSES, WIDTH = 3, 12


class Cells:
    """An encoder whose tokens are the mean colour of each of 16 cells, in the first three of its twelve features, and their places in the others."""

    def __init__(self) -> None:
        self.info = EncoderInfo(
            name="cells", family="planted", architecture="cells", source="planted", weights_sha256="", params=0, embed_dim=WIDTH,
            block_dims=(WIDTH,), grid=(4, 4), has_cls=False, registers=0, projection_dim=None, positions="none",
            preprocessing=Preprocessing(size=(32, 32), resize=32),
        )  # fmt: skip
        self.module = torch.nn.Identity()
        self._places = torch.randn(4, 4, WIDTH - 3, generator=torch.Generator().manual_seed(0))

    def encode(self, images: torch.Tensor, **_: Any) -> Tokens:
        colours = torch.nn.functional.adaptive_avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return Tokens(cls=None, patches=torch.cat([colours, self._places.expand(len(images), -1, -1, -1)], dim=-1))


def sample(index: int) -> Sample:
    """Grey noise with one bright quarter, whose colour is the class: only a query that looks for it finds it whatever the crop."""
    generator = np.random.default_rng(index)
    image = generator.integers(90, 130, (48, 48, 3), dtype=np.uint8)
    top, left = generator.integers(0, 2, 2) * 24
    image[top : top + 24, left : left + 24, index % CLASSES] = 250
    return Sample(key=f"s{index:03d}", image=image, label=index % CLASSES)


def setting_of(**protocol: Any) -> StreamSetting[ObjectAttentiveStreamed]:
    fields = ObjectAttentiveStreamed(**{"attention_heads": 2, "batch_size": 24, "epochs": 20, **protocol})
    return StreamSetting(encoder=PaddedEncoder(Cells(), Compute("float32", False, 1), 8), protocol=fields, classes=CLASSES, seed=0)


def trained(setting: StreamSetting[Any], rates: Sequence[float], samples: Sequence[Sample]) -> list[dict[str, torch.Tensor]]:
    """The heads after all epochs, the samples always in one order."""
    trainer = attentive.PROBE.trainer(setting, [("all", rate) for rate in rates])
    size = trainer.batch_size
    steps, step = trainer.steps(-(-len(samples) // size)), 0
    for epoch in range(trainer.epochs or 0):
        for start in range(0, len(samples), size):
            trainer.step([trainer.draw(example, draw(0, epoch, example.key)) for example in samples[start : start + size]], step, steps)
            step += 1
    assert step == steps
    return trainer.fitted()


def accuracy(setting: StreamSetting[Any], state: dict[str, torch.Tensor], samples: Sequence[Sample]) -> float:
    scorer = attentive.PROBE.scorer(setting, [("all", state)])
    (predictions,) = scorer.predict([example.key for example in samples], [scorer.view(example) for example in samples])
    assert not isinstance(predictions, ProbeError)
    return float((predictions.targets == predictions.predictions).mean())


def test_what_is_planted_is_learned_under_augmentation() -> None:
    setting = setting_of(crop_scale=(0.5, 1.0))
    (state,) = trained(setting, [0.5], [sample(index) for index in range(72)])
    assert accuracy(setting, state, [sample(index) for index in range(100, 160)]) > 0.95
    # the same network on labels that mean nothing stays near a third
    shuffled = [replace(sample(index), label=(index // CLASSES) % CLASSES) for index in range(72)]
    (chance,) = trained(setting, [0.5], shuffled)
    assert accuracy(setting, chance, [sample(index) for index in range(100, 160)]) < 0.7


@pytest.mark.parametrize("protocol", [{}, attentive.RELEASE])
def test_without_augmentation_the_heads_are_those_of_the_banked_probe_to_the_bit(monkeypatch: pytest.MonkeyPatch, protocol: dict[str, Any]) -> None:
    setting, samples = setting_of(augment="none", epochs=4, weight_decay=0.01, **protocol), [sample(index) for index in range(40)]
    rates = [0.05, 0.5]
    streamed = trained(setting, rates, samples)
    trainer = attentive.PROBE.trainer(setting, [("all", 0.1)])
    pictures = [trainer.draw(example, draw(0, 0, "")) for example in samples]
    (tokens,) = setting.encoder(torch.stack([picture.image for picture in pictures]), lambda output: [output.patches.flatten(1, 2)])
    keys = [example.key for example in samples]
    rows = Rows(keys=keys, groups=keys, targets=np.array([picture.target for picture in pictures]), features=tokens.numpy())
    in_order = [torch.arange(start, min(start + 24, 40)) for start in (0, 24)]
    monkeypatch.setattr(heads, "batch_order", lambda *_: in_order)
    banked = attentive.PROBE.fit(rows, rates, classes=CLASSES, protocol=setting.protocol, seed=0, device=torch.device("cpu"))
    for head, state in enumerate(streamed):
        assert all(torch.equal(state[name], tensor) for name, tensor in banked.state(head).items())


def test_a_head_goes_on_from_its_state_to_the_bit() -> None:
    setting = setting_of()
    batches = [[sample(index) for index in range(start, start + 8)] for start in range(0, 48, 8)]

    def steps(trainer: Trainer[Any], first: int, last: int) -> None:
        for step in range(first, last):
            trainer.step([trainer.draw(example, draw(0, step, example.key)) for example in batches[step]], step, 6)

    straight, before, after = (attentive.PROBE.trainer(setting, [("all", 0.1), ("tokens", 0.5)]) for _ in range(3))
    steps(straight, 0, 6)
    steps(before, 0, 3)
    state = before.state()
    steps(before, 3, 4)  # what was kept must be a copy
    after.load(state)
    steps(after, 3, 6)
    for head, resumed in zip(straight.fitted(), after.fitted(), strict=True):
        assert all(torch.equal(head[name], resumed[name]) for name in head)


def test_a_width_that_the_attention_heads_do_not_divide_is_named() -> None:
    setting = setting_of(attention_heads=5)
    trainer = attentive.PROBE.trainer(setting, [("all", 0.1)])
    with pytest.raises(ProbeError, match="a width that 5 attention heads divide, got 12"):
        trainer.step([trainer.draw(sample(0), draw(0, 0, "a"))], 0, 1)


# --- statistics at test -----------------------------------------------------------------------------------------------


class InOrder:
    """Samples as an epoch gives them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def read(self, prepare: Any) -> Any:
        from harness.data.epochs import Fed

        for position, example in enumerate(self._samples, start=1):
            yield Fed(key=example.key, value=prepare(example), position=position)


@pytest.mark.parametrize("size", [10, 20])
def test_batch_statistics_are_those_of_the_protocols_batches_whatever_the_encoder_takes_at_once(size: int) -> None:
    setting, samples = setting_of(bn_eval="batch", bn_batch=size, epochs=2), [sample(index) for index in range(50)]
    (state,) = trained(setting, [0.5], samples)
    assert attentive.PROBE.together(setting) == size
    scorer = attentive.PROBE.scorer(setting, [("all", state)])
    outcomes = [outcome for (outcome,) in predicted(scorer, InOrder(samples), size)]  # type: ignore[arg-type]
    scores = np.concatenate([outcome.scores for outcome in outcomes if not isinstance(outcome, ProbeError)])
    pictures = torch.stack([scorer.view(example).image for example in samples])
    (tokens,) = setting.encoder(pictures, lambda output: [output.patches.flatten(1, 2)])
    keys = [example.key for example in samples]
    rows = Rows(keys=keys, groups=keys, targets=np.array([example.label for example in samples]), features=tokens.numpy())
    how: dict[str, Any] = {"classes": CLASSES, "seed": 0, "device": torch.device("cpu")}
    banked = attentive.PROBE.restore(state, None, protocol=setting.protocol, **how).predict(rows, 0)
    assert np.array_equal(scores, banked.scores)
    running = attentive.PROBE.restore(state, None, protocol=setting.protocol.replaced(bn_eval="running"), **how).predict(rows, 0)
    assert not np.allclose(running.scores, banked.scores, atol=1e-4)


def test_running_statistics_do_not_depend_on_what_is_scored_together() -> None:
    setting, samples = setting_of(epochs=2), [sample(index) for index in range(20)]
    assert attentive.PROBE.together(setting) == 8
    (state,) = trained(setting, [0.5], samples)
    scorer = attentive.PROBE.scorer(setting, [("all", state)])
    scores = {}
    for size in (3, 20):
        parts = [predictions.scores for (predictions,) in predicted(scorer, InOrder(samples), size) if not isinstance(predictions, ProbeError)]  # type: ignore[arg-type]
        scores[size] = np.concatenate(parts)
    np.testing.assert_allclose(scores[3], scores[20], rtol=1e-5)


# --- the task ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("attentive")
    tiny.build(root)
    return root


def studied(root: Path, folder: Path, task: str, **protocol: Any) -> tuple[Study, dict[str, BankRef]]:
    (folder / "sweep.yaml").write_text(tiny.sweep_text(root, tasks=[task], protocol={"attention_heads": 4, "batch_size": 12, **protocol}))
    plan = make_plan(load_sweep(folder / "sweep.yaml"), folder, device_type(False), "float32")
    state = state_of(plan, plan.studies[0], Accounts(plan, BankStore(str(folder / "cache")), {}))
    return state.study, dict(state.test)


def test_its_protocols_are_those_of_the_banked_task_and_the_augmentation(data: Path) -> None:
    available = templates(load_manifest(str(data), "tiny"))
    banked, streamed = available["object-attentive"].protocols, available[TASK].protocols
    assert list(banked) == list(streamed) == ["zhu2023", "release", "published", "published-release"]
    for name, fields in streamed.items():
        assert (fields.augment, fields.crop_scale, fields.flip) == ("crop-flip", (0.08, 1.0), 0.5)
        streamed_fields, banked_fields = dict(fields), dict(banked[name])
        shared = streamed_fields.keys() & banked_fields.keys()
        assert {"bn_eval", "bn_batch", "epochs", "lr_bounds", "readouts"} <= shared
        assert all(streamed_fields[key] == banked_fields[key] for key in shared)


@pytest.mark.parametrize(("override", "reason"), [({"flip": 2.0}, "flip"), ({"crop_scale": [0.9, 0.1]}, "in order"), ({"bn_eval": "x"}, "bn_eval")])
def test_fields_that_cannot_be_are_refused(data: Path, override: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        select([f"tiny/{TASK}"], str(data), override)


def test_it_learns_the_colours_of_a_data_set_from_its_tars(data: Path, tmp_path: Path) -> None:
    study, test = studied(data, tmp_path, f"tiny/{TASK}@release", epochs=6, bn_batch=9)
    runner = Runner(str(tmp_path / "cache"), gpu=False, threads=1)
    round_ = runner.run_round(study, 0, [("all", 0.05), ("all", 0.2)])
    assert max(head.value or 0.0 for head in round_.heads) > 0.6, "chance is a third"
    score = runner.score(study, max(round_.heads, key=lambda head: head.value or 0.0), test["all"])
    assert score.n == 24
    value = score.values[0].value
    assert value is not None
    assert value > 0.6


def test_attention_heads_that_do_not_fit_cost_the_round_and_say_why(data: Path, tmp_path: Path) -> None:
    study, _ = studied(data, tmp_path, f"tiny/{TASK}", attention_heads=7)
    round_ = Runner(str(tmp_path / "cache"), gpu=False, threads=1).run_round(study, 0, [("all", 0.1)])
    assert round_.heads[0].value is None
    assert "7 attention heads" in (round_.heads[0].error or "")
