"""Streamed probes in one process: order and account of the stream, schedules, stacks, sliding windows, checkpoints."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from harness.config import load_sweep
from harness.core import Rows, Sample, StreamSetting
from harness.data.augment import IGNORED, draw
from harness.data.epochs import Epoch
from harness.data.manifest import load_manifest, shard_url
from harness.data.shards import Source
from harness.encoders import EncoderSpec, load
from harness.errors import RequestError, RunError, ShardError, is_of_the_place
from harness.features.bank import BankStore
from harness.features.device import Compute, device_type
from harness.plan.plan import Plan, make_plan
from harness.probes import attentive, heads, linear
from harness.probes.classifier import StreamedHeads
from harness.probes.lib.segmentation_stream import SegmentationScorer, SegmentationTrainer
from harness.probes.lib.streaming import PaddedEncoder
from harness.probes.segmentation import SegmentationFields, SegmentationHead, confusion, logits, slide, warmed_up, windows
from harness.search import build
from harness.search.accounts import Accounts
from harness.search.head_store import HeadStore
from harness.search.runner import Runner
from harness.search.stream_feed import StreamFeed, labels_of
from harness.search.study import BankRef, Study
from harness.tasks import select, templates
from tests.helpers import tiny

torch.set_num_threads(1)
SMALL = {"crop": 32, "stride": 16, "train_scale": [96, 48], "test_scale": [96, 48], "blocks": [1, 3], "warmup_steps": 2, "iterations": 6}
PROTOCOL = {"epochs": 3, "batch_size": 8, "attention_heads": 4, **SMALL}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("streamed")
    tiny.build(root / "tiny_root", name="tiny")
    tiny.build(root / "tiny_root", name="noval", splits={"train": 40, "test": 12})
    folder = tiny.build(root / "tiny_root", name="broken_tail")
    last = keys_of(source_of(root / "tiny_root", "broken_tail", "train"), 0)[-3]  # of the 4 in the first epoch's last batch of 8
    break_image(folder, int(last.removeprefix("train-")))
    return root / "tiny_root"


def break_image(folder: Path, index: int) -> None:
    """Put something else in the place of a train image, and its shard into the manifest as it then is."""
    rng, shard = np.random.default_rng(0), index // 12
    records = [tiny.members(rng, f"train-{number:05d}", number % 3) for number in range(12 * shard, 12 * shard + 12)]
    records[index % 12][0] = (records[index % 12][0][0], b"no picture")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][shard] = tiny.write_tar(folder / f"train-{shard:03d}.tar", records)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def compute() -> Compute:
    return Compute("float32", False, 1)


@pytest.fixture(scope="module")
def network(compute: Compute) -> PaddedEncoder:
    spec = EncoderSpec.parse({"name": "t", "architecture": "test_vit", "random": True, "preprocessing": {"size": 64}})
    return PaddedEncoder(load(spec), compute, 8)


def plan_of(root: Path, folder: Path, task: str, **protocol: Any) -> Plan:
    fields = {key: value for key, value in PROTOCOL.items() if ("segmentation" in task) == (key in SMALL) or key == "batch_size"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(tiny.sweep_text(root, tasks=[task], protocol={**fields, **protocol}))
    return make_plan(load_sweep(folder / "sweep.yaml"), folder, device_type(False), "float32")


def studied(root: Path, folder: Path, task: str, **protocol: Any) -> tuple[Study, dict[str, BankRef], Accounts]:
    """The study of one task, its test shards and its accounts."""
    plan = plan_of(root, folder, task, **protocol)
    accounts = Accounts(plan, BankStore(str(folder / "cache")), {})
    state = build.state_of(plan, plan.studies[0], accounts)
    return state.study, dict(state.test), accounts


def source_of(root: Path, dataset: str, split: str) -> Source:
    manifest = load_manifest(str(root), dataset)
    return Source(shards=tuple((shard_url(str(root), dataset, shard), shard) for shard in manifest.split(split).shards), rules=manifest.rules)


# --- which tasks ------------------------------------------------------------------------------------------------------


def test_only_patterns_that_say_so_select_streamed_tasks(data: Path) -> None:
    plain, _ = select(["tiny/*"], str(data), {})
    assert {task.feed for task in plain} == {"banked"}
    named, _ = select(["tiny/*-streamed", "tiny/object-linear-streamed"], str(data), {})
    assert [task.name for task in named] == [f"tiny/object-{name}-streamed" for name in ("linear", "attentive", "segmentation")]
    assert {task.feed for task in named} == {"streamed"}


@pytest.mark.parametrize(("dataset", "crop", "stride", "train", "test"), [
    ("ade20k", 512, 341, (2048, 512), (2048, 512)),
    ("pascal_part", 480, 161, (520, 520), (3840, 480)),
    ("lip", 320, 161, (1024, 320), (4096, 320)),
])  # fmt: skip
def test_segmentation_defaults_are_those_of_the_data_set(
    data: Path, dataset: str, crop: int, stride: int, train: tuple[int, int], test: tuple[int, int]
) -> None:
    manifest = load_manifest(str(data), "tiny").model_copy(
        update={"dataset": dataset, "annotations": ("part",), "mask_classes": {"part": ("background", "a", "b")}}
    )
    template = templates(manifest)["part-segmentation-streamed"]
    for name, blocks, upsample in (("release", (3, 5, 7, 11), 1), ("paper", (), 4)):
        fields = template.protocols[name]
        assert (fields.crop, fields.stride, fields.train_scale, fields.test_scale) == (crop, stride, train, test)
        assert (fields.blocks, fields.upsample, fields.ignore_label) == (blocks, upsample, (0, 255))
        assert (fields.iterations, fields.batch_size, fields.warmup_steps, fields.weight_decay) == (160_000, 16, 1500, 0.05)


def test_figure_and_ground_are_two_classes(data: Path) -> None:
    template = templates(load_manifest(str(data), "tiny"))["object-segmentation-streamed"]
    assert template.protocols["release"].ignore_label == (255,)


@pytest.mark.parametrize(("override", "reason"), [
    ({"iterations": 4, "batch_size": 8}, "at least the 5"),
    ({"loss_mean": "some"}, "loss_mean"),
    ({"crop": 0}, "crop"),
])  # fmt: skip
def test_fields_that_cannot_be_are_refused(data: Path, tmp_path: Path, override: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        plan_of(data, tmp_path, "tiny/object-segmentation-streamed", **override)


@pytest.mark.parametrize(("override", "reason"), [({"blocks": [3, 5, 7, 11]}, "encoder that has 6"), ({"crop": 40}, "patches of 16 px")])
def test_an_encoder_that_cannot_be_probed_so_is_undefined(data: Path, tmp_path: Path, override: dict[str, Any], reason: str) -> None:
    (study,) = plan_of(data, tmp_path, "tiny/object-segmentation-streamed", **override).studies
    assert study.undefined is not None
    assert reason in study.undefined


# --- the stream -------------------------------------------------------------------------------------------------------


def keys_of(source: Source, epoch: int, *, threads: int = 2, **settings: Any) -> list[str]:
    epoch_read = Epoch(source=source, threads=threads, order=draw(0, epoch, "order of the samples"), **settings)
    return [fed.key for fed in epoch_read.read(lambda sample: sample.key)]


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own(data: Path) -> None:
    source = source_of(data, "tiny", "train")
    first, second = keys_of(source, 0), keys_of(source, 1)
    assert len(first) == len(set(first)) == 36
    assert sorted(first) == sorted(second)
    assert first != second
    assert first != sorted(first)
    assert first == keys_of(source, 0, threads=5)


@pytest.mark.parametrize("buffer", [1, 5])
def test_a_small_buffer_loses_and_repeats_nothing(data: Path, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.data.epochs.BUFFER", buffer)
    monkeypatch.setattr("harness.data.epochs.OPEN_SHARDS", 2)
    keys = keys_of(source_of(data, "tiny", "train"), 0)
    assert len(keys) == len(set(keys)) == 36


def test_an_epoch_goes_on_where_it_was_left(data: Path) -> None:
    source = source_of(data, "tiny", "train")
    epoch = Epoch(source=source, threads=2, order=draw(0, 0, "order of the samples"), skip=13)
    feed = list(epoch.read(lambda sample: sample.key))
    assert [fed.value for fed in feed] == keys_of(source, 0)[13:]
    assert feed[0].position == 14
    assert [audit.seen for audit in epoch.audits] == [12, 12, 12]


def test_samples_that_cannot_be_used_are_accounted_for(data: Path) -> None:
    def prepare(sample: Sample) -> str:
        if sample.key.endswith("7"):
            raise ShardError("no label")
        return sample.key

    epoch = Epoch(source=source_of(data, "tiny", "train"), threads=2, order=draw(0, 0, "x"), belongs=lambda key: not key.endswith("3"))
    keys = [fed.key for fed in epoch.read(prepare)]
    assert len(keys) == 36 - 3 - 4
    assert [(audit.seen, audit.failed, audit.expected) for audit in epoch.audits] == [(11, 1, 12), (11, 1, 12), (11, 1, 12)]
    assert epoch.audits[0].reasons == {"no label": ["train-00007"]}


@pytest.mark.parametrize("error", [ZeroDivisionError("in a view"), MemoryError("no room"), ShardError("no label")])
def test_whatever_the_work_on_a_sample_raises_costs_that_sample_alone(data: Path, error: Exception) -> None:
    def prepare(sample: Sample) -> str:
        if sample.key.endswith("7"):
            raise error
        return sample.key

    epoch = Epoch(source=source_of(data, "tiny", "train"), threads=2)
    assert len(list(epoch.read(prepare))) == 36 - 3
    reason = str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}"
    assert [audit.reasons for audit in epoch.audits] == [{reason: [key]} for key in ("train-00007", "train-00017", "train-00027")]
    assert epoch.lost == dict.fromkeys(("train-00007", "train-00017", "train-00027"), reason)


def test_an_error_that_is_no_samples_ends_the_epoch(data: Path) -> None:
    def prepare(sample: Sample) -> str:
        raise RunError("disk full")

    with pytest.raises(RunError):
        list(Epoch(source=source_of(data, "tiny", "train"), threads=2).read(prepare))


@pytest.mark.parametrize("order", [None, 0, 1])
def test_a_sample_that_two_shards_have_is_taken_once_and_counts_in_the_first(data: Path, order: int | None) -> None:
    source = source_of(data, "tiny", "train")
    (url, first), (_, second), third = source.shards
    twice = Source(shards=(source.shards[0], (url, second), third), rules=source.rules)
    epoch = Epoch(source=twice, threads=2, order=None if order is None else draw(0, order, "order of the samples"))
    keys = [fed.key for fed in epoch.read(lambda sample: sample.key)]
    assert len(keys) == len(set(keys)) == 24
    assert [(audit.seen, audit.failed, audit.duplicates) for audit in epoch.audits] == [(12, 0, 0), (0, 12, 12), (12, 0, 0)]
    assert sorted(epoch.audits[1].reasons["duplicate key"]) == [f"train-{index:05d}, which {first.file} has" for index in range(12)]


def test_a_shard_that_is_gone_is_lost_and_the_others_are_read(data: Path) -> None:
    source = source_of(data, "tiny", "train")
    gone = (source.shards[0][0] + ".gone", source.shards[0][1])
    epoch = Epoch(source=Source(shards=(gone, *source.shards[1:]), rules=source.rules), threads=1)
    assert len(list(epoch.read(lambda sample: sample.key))) == 24
    assert list(epoch.audits[0].reasons) == ["shard lost", "absent"]
    assert epoch.audits[0].failed == 12


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), TimeoutError("slow"), ConnectionResetError("peer")])
def test_a_read_error_is_no_loss_of_a_shard_but_ends_the_pass(data: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained on the rest would be another outcome; the same pass again, once the place is well, is as if nothing had been."""
    source = source_of(data, "tiny", "train")
    whole = keys_of(source, 0)
    opened = fsspec.open

    def ill(url: str, *arguments: Any) -> Any:
        if url == source.shards[1][0]:
            raise error
        return opened(url, *arguments)

    monkeypatch.setattr(fsspec, "open", ill)
    with pytest.raises(ShardError, match="cannot be read") as caught:
        keys_of(source, 0)
    assert is_of_the_place(caught.value)
    with pytest.raises(ShardError, match="cannot be read"):
        list(labels_of(source))
    monkeypatch.undo()
    assert keys_of(source, 0) == whole


def test_the_schedule_of_segmentation_value_by_value() -> None:
    steps, warmup = 160_000, 1500
    for step in (0, 1, 2, 749, 1499, 1500, 1501, 80_000, 159_999):
        expected = 1 - step / steps
        if step < warmup:  # mmcv: lr (1 - (1 - i / warm-up) (1 - ratio))
            expected *= 1 - (1 - step / warmup) * (1 - 1e-6)
        assert warmed_up(step, steps, warmup) == pytest.approx(expected, rel=1e-12)
    assert warmed_up(0, steps, warmup) == pytest.approx(1e-6, rel=1e-9)
    assert warmed_up(0, steps, 0) == 1


def test_the_schedule_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    both = torch.optim.lr_scheduler.ChainedScheduler([
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-6, total_iters=15),
        torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=100, power=1.0),
    ])  # fmt: skip
    for step in range(100):
        assert warmed_up(step, 100, 15) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        both.step()


# --- heads ------------------------------------------------------------------------------------------------------------


def batch_of(seed: int = 0, *, classes: int = 3, width: int = 6, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, classes, (4, side, side), generator=generator)
    return torch.randn(4, width, 4, 4, generator=generator), labels


@pytest.mark.parametrize("loss_mean", ["labelled", "all"])
def test_a_segmentation_head_is_a_convolution_under_adamw(loss_mean: str) -> None:
    fields = SegmentationFields.model_validate({"upsample": 4, "loss_mean": loss_mean})
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    head = SegmentationHead(weight.clone(), 1e-2, fields)
    module = torch.nn.Conv2d(6, 3, 1)
    with torch.no_grad():
        module.weight.copy_(weight[:, :, None, None])
        module.bias.zero_()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.05)
    for step in range(5):
        features, labels = batch_of(step)
        # as the paper says it: the tokens are upsampled four times, then convolved
        scores = module(interpolate(features, scale_factor=4, mode="bilinear", align_corners=False))
        loss = cross_entropy(interpolate(scores, size=labels.shape[1:], mode="bilinear", align_corners=False), labels, ignore_index=-1)
        if loss_mean == "all":
            loss = loss * (labels != IGNORED).sum() / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head.step(features, labels, 1.0)
    torch.testing.assert_close(head.weight, module.weight[:, :, 0, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias, module.bias, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_batch_does_not_depend_on_the_memory_it_is_cut_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> torch.Tensor:
        head = SegmentationHead(torch.zeros(3, 6), 1e-2, SegmentationFields())
        for step in range(3):
            head.step(*batch_of(step), 1.0)
        return head.weight.detach()

    whole = trained()
    monkeypatch.setattr("harness.probes.segmentation.LOGITS", 3 * 16 * 16)
    torch.testing.assert_close(trained(), whole, rtol=1e-4, atol=1e-7)


def test_a_class_that_is_ignored_is_neither_trained_nor_predicted() -> None:
    fields = SegmentationFields.model_validate({"ignore_label": (0,), "weight_decay": 0.0, "upsample": 2})
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    head = SegmentationHead(weight.clone(), 1e-1, fields)
    for step in range(3):
        features, labels = batch_of(step)
        head.step(features, torch.where(labels == 0, IGNORED, labels), 1.0)
    assert torch.equal(head.weight[0], weight[0])
    assert not torch.equal(head.weight[1], weight[1])
    scores = logits(features, head.weight, head.bias, size=(16, 16), upsample=2, left_out=(0,))
    assert scores.isfinite().all()
    assert (scores.argmax(dim=1) != 0).all()


def test_a_batch_without_labels_moves_nothing_but_by_decay() -> None:
    head = SegmentationHead(torch.ones(3, 6), 1e-2, SegmentationFields())
    head.step(torch.randn(2, 6, 4, 4), torch.full((2, 8, 8), IGNORED), 1.0)
    torch.testing.assert_close(head.weight.detach(), torch.full((3, 6), 1 - 1e-2 * 0.05))


def test_a_segmentation_head_goes_on_from_its_state_to_the_bit() -> None:
    def fresh() -> SegmentationHead:
        return SegmentationHead(torch.zeros(3, 6), 1e-2, SegmentationFields())

    straight, first = fresh(), fresh()
    for step in range(6):
        straight.step(*batch_of(step), 0.5)
    for step in range(3):
        first.step(*batch_of(step), 0.5)
    second = fresh()
    second.load(first.state())
    for step in range(3, 6):
        second.step(*batch_of(step), 0.5)
    assert torch.equal(straight.weight, second.weight)
    assert torch.equal(straight.bias, second.bias)


# --- stacks -----------------------------------------------------------------------------------------------------------


def setting_of(network: PaddedEncoder, data: Path, task: str, **protocol: Any) -> StreamSetting[Any]:
    fields = {key: value for key, value in PROTOCOL.items() if ("segmentation" in task) == (key in SMALL) or key == "batch_size"}
    ((selected,), _) = select([f"tiny/{task}"], str(data), {**fields, **protocol})
    return StreamSetting(encoder=network, protocol=selected.protocol.fields, classes=len(selected.classes), seed=0)


def samples_of(data: Path, split: str, count: int) -> list[Sample]:
    epoch = Epoch(source=source_of(data, "tiny", split), threads=1)
    return [fed.value for fed in epoch.read(lambda sample: sample)][:count]


@pytest.mark.parametrize(("kind", "task", "readout"), [
    (linear.PROBE.trainer, "object-linear-streamed", "cls"),
    (attentive.PROBE.trainer, "object-attentive-streamed", "all"),
    (SegmentationTrainer, "object-segmentation-streamed", "tokens"),
])  # fmt: skip
def test_a_head_of_a_stack_is_as_it_would_have_been_alone(network: PaddedEncoder, data: Path, kind: Any, task: str, readout: str) -> None:
    setting, samples = setting_of(network, data, task), samples_of(data, "train", 8)

    def trained(rates: Sequence[float]) -> list[dict[str, torch.Tensor]]:
        trainer = kind(setting, [(readout, rate) for rate in rates])
        batch = [trainer.draw(sample, draw(0, 0, sample.key)) for sample in samples]
        for step in range(4):
            trainer.step(batch, step, 4)
        return trainer.fitted()  # type: ignore[no-any-return]

    rates = [1e-3, 1e-1, 1.0]
    stacked = trained(rates)
    for rate, together in zip(rates, stacked, strict=True):
        (alone,) = trained([rate])
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[name], together[name]) for name in alone)
    weight = "classifier_weight" if kind == attentive.PROBE.trainer else "weight"
    assert not torch.equal(stacked[0][weight], stacked[1][weight])


def test_readouts_of_a_stack_do_not_touch_each_other(network: PaddedEncoder, data: Path) -> None:
    setting, samples = setting_of(network, data, "object-linear-streamed"), samples_of(data, "train", 8)

    def trained(proposals: list[tuple[str, float | None]]) -> list[dict[str, torch.Tensor]]:
        trainer = linear.PROBE.trainer(setting, proposals)
        batch = [trainer.draw(sample, draw(0, 0, sample.key)) for sample in samples]
        trainer.step(batch, 0, 2)
        return trainer.fitted()

    both = trained([("mean", 0.1), ("cls", 0.1)])
    (alone,) = trained([("cls", 0.1)])
    assert torch.equal(both[1]["weight"], alone["weight"])


@pytest.mark.parametrize("anneal", ["step", "epoch"])
def test_without_augmentation_the_stream_gives_the_banked_probe(
    data: Path, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anneal: str
) -> None:
    study, _, _ = studied(data, tmp_path, "tiny/object-linear-streamed", augment="none", anneal=anneal)
    order: list[list[str]] = []
    step = StreamedHeads.step

    def noting(self: StreamedHeads[Any], batch: Any, at: int, steps: int) -> None:
        order.append([picture.group for picture in batch])
        step(self, batch, at, steps)

    monkeypatch.setattr(StreamedHeads, "step", noting)
    runner = Runner(str(tmp_path / "cache"), gpu=False, threads=1)
    rates = [0.01, 0.1]
    round_ = runner.run_round(study, 0, [("cls", rate) for rate in rates])

    assert study.stream is not None
    network = PaddedEncoder(load(study.stream.encoder), compute, 8)
    trainer = linear.PROBE.trainer(StreamSetting(encoder=network, protocol=study.protocol, classes=3, seed=0), [("cls", 0.1)])
    samples = samples_of(data, "train", 36)
    pictures = [trainer.draw(sample, draw(0, 0, "")) for sample in samples]
    (features,) = network(torch.stack([picture.image for picture in pictures]), lambda tokens: [tokens.cls])
    keys = [sample.key for sample in samples]
    rows = Rows(keys=keys, groups=keys, targets=np.array([picture.target for picture in pictures]), features=features.numpy())
    batches = [torch.tensor([keys.index(key) for key in batch]) for batch in order]
    epochs = iter([batches[start : start + 5] for start in range(0, 15, 5)])
    monkeypatch.setattr(heads, "batch_order", lambda rows, size, generator: next(epochs))
    banked = linear.PROBE.fit(rows, rates, classes=3, protocol=study.protocol, seed=study.seed, device=torch.device("cpu"))
    for head in range(2):
        streamed = HeadStore(BankStore(str(tmp_path / "cache"))).state(study, round_.heads[head])
        torch.testing.assert_close(streamed["weight"], banked.state(head)["weight"], rtol=1e-5, atol=1e-6)


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_windows_cover_the_image_and_end_at_its_edges() -> None:
    assert windows(512, 512, 512, 341) == [(0, 0)]
    # 683 wide: max(683 - 512 + 341 - 1, 0) // 341 + 1 = 2 windows
    assert windows(512, 683, 512, 341) == [(0, 0), (0, 171)]
    assert windows(512, 1024, 512, 341) == [(0, 0), (0, 341), (0, 512)]
    covered = np.zeros((100, 130), bool)
    for top, left in windows(100, 130, 32, 20):
        assert top + 32 <= 100
        assert left + 32 <= 130
        covered[top : top + 32, left : left + 32] = True
    assert covered.all()


def test_one_window_is_the_whole_image(network: PaddedEncoder, data: Path) -> None:
    setting = setting_of(network, data, "object-segmentation-streamed", crop=48, stride=20)
    scorer, sample = SegmentationScorer(setting, []), samples_of(data, "val", 1)[0]
    view = scorer.view(sample)
    assert view.places == [(0, 0)]
    fields = setting.protocol
    (features,) = network(
        view.windows, lambda tokens: [torch.cat([tokens.blocks[b].patches for b in (1, 3)], dim=-1).permute(0, 3, 1, 2)], blocks=(1, 3)
    )
    weight, bias = torch.randn(2, features.shape[1], generator=torch.Generator().manual_seed(0)), torch.zeros(2)
    whole = logits(features, weight, bias, size=(48, 48), upsample=1, left_out=())
    torch.testing.assert_close(slide(features, weight, bias, view.places, (48, 48), fields), whole[0], rtol=1e-5, atol=1e-6)


def test_overlapping_windows_are_averaged() -> None:
    fields = SegmentationFields.model_validate({"crop": 4, "stride": 2})
    features = torch.tensor([1.0, 3.0])[:, None, None, None].expand(2, 1, 1, 1)
    scores = slide(features, torch.tensor([[1.0], [0.0]]), torch.zeros(2), [(0, 0), (0, 2)], (4, 6), fields)
    assert scores[0].tolist() == [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]] * 4


def test_confusion_counts_pixels_that_count() -> None:
    labels = torch.tensor([[0, 1, IGNORED], [1, 1, 0]])
    assert confusion(torch.tensor([[0, 0, 0], [1, 1, 1]]), labels, 2).tolist() == [[1, 1], [1, 2]]


def test_a_head_that_knows_the_answer_gets_every_pixel(network: PaddedEncoder, data: Path) -> None:
    """Labels drawn by the head itself at their own, larger resolution: the scorer must find each of them again."""
    setting = setting_of(network, data, "object-segmentation-streamed")
    (sample,) = samples_of(data, "val", 1)
    width = 2 * 64
    state = {"weight": torch.randn(2, width, generator=torch.Generator().manual_seed(3)), "bias": torch.zeros(2), "lr": torch.tensor(1.0)}
    view = SegmentationScorer(setting, []).view(sample)
    (features,) = network(
        view.windows, lambda tokens: [torch.cat([tokens.blocks[b].patches for b in (1, 3)], dim=-1).permute(0, 3, 1, 2)], blocks=(1, 3)
    )
    fields = setting.protocol
    drawn = slide(features, state["weight"], state["bias"], view.places, view.size, fields)
    state["bias"][1] = (drawn[0] - drawn[1]).median()  # half of the pixels each
    drawn = slide(features, state["weight"], state["bias"], view.places, view.size, fields)
    mask = interpolate(drawn[None], size=(96, 96), mode="bilinear", align_corners=False)[0].argmax(dim=0).numpy().astype(np.uint8)
    assert 0 < mask.mean() < 1
    scorer = SegmentationScorer(setting, [("tokens", state)])
    truth = Sample(key="k", group="photograph", image=sample.image, object_mask=mask)
    (predictions,) = scorer.predict(["k"], [scorer.view(truth)])
    assert not isinstance(predictions, Exception)
    assert predictions.targets.tolist() == predictions.predictions.tolist() == [0, 1]
    assert predictions.scores.sum() == 96 * 96
    assert set(predictions.groups) == {"photograph"}


# --- rounds -----------------------------------------------------------------------------------------------------------

TASKS = ["object-linear-streamed", "object-attentive-streamed", "object-segmentation-streamed"]
SEEN = [*TASKS, "object-mlp-streamed"]
TRAINERS = (StreamedHeads, SegmentationTrainer)


class Stopped(Exception):
    """An interruption."""


def proposals_of(task: str) -> list[tuple[str, float | None]]:
    if "linear" in task or "mlp" in task:
        return [("cls", 0.1), ("mean", 0.1)]
    return [("all", 1e-2), ("all", 1e-1)] if "attentive" in task else [("tokens", 1e-3), ("tokens", 1e-2)]


def stopping_after(saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt whatever runs right after it has written so many checkpoints."""
    written = 0
    publish = BankStore.publish

    def counted(store: BankStore, names: Sequence[str], data: bytes, *, replace: bool = False) -> bool:
        nonlocal written
        published = publish(store, names, data, replace=replace)
        written += names[-1].startswith("checkpoint-")
        if written == saves and names[-1].startswith("checkpoint-"):
            raise Stopped
        return published

    monkeypatch.setattr(BankStore, "publish", counted)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("dataset", "saves"), [("tiny", 1), ("tiny", 5), ("tiny", 7), ("broken_tail", 5)])
def test_an_interrupted_round_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, dataset: str, saves: int
) -> None:
    def study_in(folder: Path) -> Study:
        plan = plan_of(data, folder, f"{dataset}/{task}")
        plan.sweep = plan.sweep.model_copy(update={"resources": plan.sweep.resources.model_copy(update={"checkpoint_seconds": 0.0})})
        state = build.state_of(plan, plan.studies[0], Accounts(plan, BankStore(str(folder / "cache")), {}))
        return state.study

    def published(folder: Path, study: Study) -> bytes:
        return (folder / "cache" / "studies" / study.id / "round-0.safetensors").read_bytes()

    straight = study_in(tmp_path / "straight")
    whole = Runner(str(tmp_path / "straight" / "cache"), gpu=False, threads=1).run_round(straight, 0, proposals_of(task))
    study = study_in(tmp_path / "stopped")
    runner = Runner(str(tmp_path / "stopped" / "cache"), gpu=False, threads=1)
    stopping_after(saves, monkeypatch)
    with pytest.raises(Stopped):
        runner.run_round(study, 0, proposals_of(task))
    assert list((tmp_path / "stopped" / "cache").glob("*/checkpoint-*"))
    resumed = Runner(str(tmp_path / "stopped" / "cache"), gpu=False, threads=1)
    steps: list[int] = []
    for kind in TRAINERS:
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, batch, at, total, step=step: (steps.append(at), step(self, batch, at, total)))
    again = resumed.run_round(study, 0, proposals_of(task))
    assert again.heads == whole.heads
    assert published(tmp_path / "stopped", study) == published(tmp_path / "straight", straight)
    assert 0 not in steps, "it began anew"
    assert steps or saves == 7, "only the last checkpoint leaves nothing to train"
    assert not list((tmp_path / "stopped" / "cache").glob("*/checkpoint-*"))


@pytest.mark.parametrize("task", SEEN)
def test_the_account_says_that_every_sample_was_seen_once(data: Path, tmp_path: Path, task: str) -> None:
    study, test, accounts = studied(data, tmp_path, f"tiny/{task}")
    runner = Runner(str(tmp_path / "cache"), gpu=False, threads=1)
    round_ = runner.run_round(study, 0, proposals_of(task))
    assert all(head.error is None and head.value is not None for head in round_.heads)
    score = runner.score(study, round_.heads[0], test[round_.heads[0].readout])
    assert score.n == 24
    receipts = {bank.split: accounts.of(bank) for bank in accounts.banks()}
    assert {split: sum(receipt.seen for receipt in of_split) for split, of_split in receipts.items()} == {"train": 36, "val": 18, "test": 24}
    assert all(receipt.status == "ok" for of_split in receipts.values() for receipt in of_split)


def test_a_round_needs_no_test_shards(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = tiny.build(root)
    study, test, _ = studied(root, tmp_path, "tiny/object-linear-streamed")
    for shard in folder.glob("test-*.tar"):
        shard.unlink()
    assert "test-000.tar" not in repr(study)
    runner = Runner(str(tmp_path / "cache"), gpu=False, threads=1)
    round_ = runner.run_round(study, 0, [("cls", 0.1)])
    assert round_.heads[0].value is not None
    score = runner.score(study, round_.heads[0], test["cls"])
    assert score.values[0].value is None, "nothing could be seen"


def test_a_broken_image_costs_that_sample_and_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = tiny.build(root)
    break_image(folder, 5)
    study, _, accounts = studied(root, tmp_path, "tiny/object-linear-streamed")
    round_ = Runner(str(tmp_path / "cache"), gpu=False, threads=1).run_round(study, 0, [("cls", 0.1)])
    assert round_.heads[0].value is not None
    (train,) = [bank for bank in accounts.banks() if bank.split == "train"]
    receipts = accounts.of(train)
    assert (receipts[0].status, receipts[0].seen, receipts[0].failed) == ("incomplete", 11, 1)
    assert receipts[0].reasons == {"broken image": ["train-00005"]}
    assert [receipt.status for receipt in receipts[1:]] == ["ok", "ok"]


@pytest.mark.parametrize("task", TASKS)
def test_without_a_val_split_a_tenth_of_train_is_held_out(
    data: Path, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    study, _, accounts = studied(data, tmp_path, f"noval/{task}")
    assert study.holds_out
    trained: set[str] = set()
    for kind in TRAINERS:
        before = kind.draw
        monkeypatch.setattr(kind, "draw", lambda self, sample, rng, before=before: (trained.add(sample.key), before(self, sample, rng))[1])
    runner = Runner(str(tmp_path / "cache"), gpu=False, threads=1)
    round_ = runner.run_round(study, 0, proposals_of(task))
    assert all(head.value is not None for head in round_.heads)
    held = StreamFeed(BankStore(str(tmp_path / "cache")), compute).held_out(study)
    assert len(held) == 3  # round(0.1 × 14), and of 13 twice
    assert not held & trained
    assert len(trained) == 37
    (train,) = [bank for bank in accounts.banks() if bank.split == "train"]
    assert sum(receipt.seen for receipt in accounts.of(train)) == 40


def test_a_rate_that_diverges_costs_its_own_head_alone(data: Path, tmp_path: Path) -> None:
    study, _, _ = studied(data, tmp_path, "tiny/object-linear-streamed")
    round_ = Runner(str(tmp_path / "cache"), gpu=False, threads=1).run_round(study, 0, [("cls", 0.1), ("cls", 1e38)])
    assert round_.heads[0].value is not None
    assert round_.heads[1].value is None
    assert "search below it" in (round_.heads[1].error or "")


def test_a_study_is_known_by_what_it_reads_and_not_by_where(data: Path, tmp_path: Path) -> None:
    def id_of(root: Path, folder: str, **protocol: Any) -> str:
        return studied(root, tmp_path / folder, "tiny/object-linear-streamed", **protocol)[0].id

    first = id_of(data, "a")
    tiny.build(tmp_path / "copy")
    assert id_of(tmp_path / "copy", "b") == first
    tiny.build(tmp_path / "other", seed=1)
    assert id_of(tmp_path / "other", "c") != first
    assert id_of(data, "d", augment="none") != first
    assert math.isfinite(len(first))
