"""What a dry run tells before anything runs: counted by hand, from real shards, real accounts, and honest where nothing is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import sweep as command
from harness.config import load_sweep
from harness.core import Reading, Sample
from harness.data.manifest import load_manifest
from harness.encoders import load
from harness.features.bank import BankStore, Receipt, ShardRows
from harness.features.device import Compute, device_type
from harness.features.extract import Extractor
from harness.plan.cost import Cost, Glance, cost_lines, cost_of, duration, peek, rounds_of, size
from harness.plan.plan import Plan, make_plan
from harness.plan.speed import Speed, timed
from harness.probes.segmentation import PROBE, SegmentationFields, windows_of
from tests.helpers import tiny

HERE = device_type(False)
TIMED = timed
IMAGES = {"train": 36, "val": 18, "test": 24}
PARTS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    tiny.build(root)
    tiny.build(root, name="noval", splits={"train": 40, "test": 12})
    return root


@pytest.fixture
def planned(shards: Path, tmp_path: Path) -> Callable[..., Plan]:
    def plan(device: str = HERE, **settings: Any) -> Plan:
        (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(shards, **settings))
        return make_plan(load_sweep(tmp_path / "sweep.yaml"), tmp_path, device, "float32")

    return plan


@pytest.fixture
def store(tmp_path: Path) -> BankStore:
    return BankStore(str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def four_images_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed but where a test is about that."""
    monkeypatch.setattr("harness.plan.speed.timed", lambda *_: Speed(images_per_second=4.0, basis="timed by the test"))


# --- how much there is to do ------------------------------------------------------------------------------------------


def test_banks_count_items_and_not_images(planned: Callable[..., Plan], store: BankStore) -> None:
    cost = cost_of(planned(tasks=["tiny/object-knn", "tiny/part-knn"]), store, actors=1)
    (items,) = set(cost.items.values())
    assert items == PARTS
    assert cost.passes == {"tiny_vit": sum(IMAGES.values()) * (1 + PARTS)}


def test_an_image_that_a_view_fails_on_is_not_counted() -> None:
    def view(sample: Sample) -> list[int]:
        return [1] * (6 // int(sample.key))

    samples = [Sample(key=key, image=np.zeros((2, 2, 3), np.uint8)) for key in "012"]
    assert Glance(samples=samples).items(view) == (6 + 3) / 2  # type: ignore[arg-type]
    assert Glance(samples=samples[:1]).items(view) == 1.0  # type: ignore[arg-type]


def test_a_stated_range_or_bound_moves_the_banks_and_one_that_is_not_stated_none(shards: Path, planned: Callable[..., Plan]) -> None:
    def keys() -> set[str]:
        plan = planned(tasks=["noval/object-knn"])
        return {bank.key for study in plan.studies for banks in study.banks.values() for bank in banks.values() if bank.dataset == "noval"}

    path = shards / "noval" / "manifest.json"
    plain, text = keys(), path.read_text()
    try:
        for stated in ({"range": [0, 4095]}, {"range": [0, 4096]}, {"max_pixels": 10**9}):
            path.write_text(json.dumps({**json.loads(text), **stated}))
            assert not keys() & plain
            path.write_text(json.dumps({**json.loads(text), **dict.fromkeys(stated)}))  # null states nothing
            assert keys() == plain
    finally:
        path.write_text(text)


def test_bytes_are_those_of_the_features_that_are_written(planned: Callable[..., Plan], store: BankStore) -> None:
    """To the byte: what the extractor makes of the same shards, its label maps among them."""
    plan = planned(tasks=["tiny/object-knn", "tiny/part-knn", "tiny/object-segmentation", "tiny/object-attentive"])
    compute = Compute("float32", False, 1)
    encoder = load(plan.encoders["tiny_vit"])
    extractor = Extractor(compute, lambda _: encoder, batch_size=8, decode_threads=1)
    written = 0
    for work in plan.shard_work:
        for _, rows, _ in extractor.run(work, node="here", attempts=1):
            written += sum(array.nbytes for array in itertools.chain(rows.features, *rows.masks.values()))
    assert cost_of(plan, store, actors=1).bank_bytes == written


def test_what_is_in_the_cache_is_not_counted_again(planned: Callable[..., Plan], store: BankStore) -> None:
    plan = planned(tasks=["tiny/object-knn"], protocol={"readouts": ["cls"]})
    before = cost_of(plan, store, actors=1)
    work = plan.shard_work[0]
    account(store, plan, seconds=1.0, only=work.shard.file)
    after = cost_of(plan, store, actors=1)
    assert before.passes["tiny_vit"] - after.passes["tiny_vit"] == work.shard.samples


def test_a_streamed_linear_probe_counts_epochs_selection_and_test(planned: Callable[..., Plan], store: BankStore) -> None:
    plan = planned(tasks=["tiny/object-linear-streamed"], protocol={"epochs": 7}, search={"trials": 2, "stack": 3})
    (cost,) = cost_of(plan, store, actors=1).streams
    assert cost.passes == cost.decoded == 2 * (7 * IMAGES["train"] + IMAGES["val"]) + IMAGES["test"]


def test_without_a_val_split_a_tenth_is_held_out_and_looked_for_in_all_of_train(planned: Callable[..., Plan], store: BankStore) -> None:
    plan = planned(tasks=["noval/object-linear-streamed"], protocol={"epochs": 7}, search={"trials": 1, "stack": 3})
    (cost,) = cost_of(plan, store, actors=1).streams
    assert cost.passes == 7 * 36 + 4 + 12
    assert cost.decoded == 7 * 36 + 40 + 12


def test_streamed_segmentation_counts_crops_and_windows_by_their_pixels(planned: Callable[..., Plan], store: BankStore) -> None:
    """Images of 48 × 48, brought to 96 × 96, in windows of 64 at a stride of 32: two a side, and four times the pixels of an input of 32 each."""
    protocol = {"iterations": 10, "batch_size": 8, "crop": 64, "train_scale": [96, 96], "test_scale": [96, 96], "stride": 32}
    encoder = {"name": "tiny_vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 32}}
    plan = planned(
        encoders=[encoder], tasks=["tiny/object-segmentation-streamed@paper"], protocol=protocol, search={"trials": 1, "stack": 3, "lr": [1e-3, 1e-2]}
    )
    (cost,) = cost_of(plan, store, actors=1).streams
    assert cost.passes == 4 * (10 * 8 + 4 * IMAGES["val"] + 4 * IMAGES["test"])
    assert cost.decoded == 10 * 8 + IMAGES["val"] + IMAGES["test"]


def test_fine_tuning_counts_the_rungs_of_its_heads_and_three_passes_an_image(planned: Callable[..., Plan], store: BankStore) -> None:
    """Nine heads for 1 epoch, three of them for 2 more, one for 6 more: 9 + 6 + 6 epochs, and 13 scorings on val."""
    protocol = {"epochs": 9, "rungs": 3, "eta": 3}
    plan = planned(tasks=["tiny/finetune"], protocol=protocol, search={"trials": 1, "stack": 9, "lr": [1e-4, 1e-3]})
    (cost,) = cost_of(plan, store, actors=1).streams
    assert cost.passes == 3 * 21 * IMAGES["train"] + 13 * IMAGES["val"] + IMAGES["test"]


@pytest.mark.parametrize(
    ("task", "settings", "rounds"),
    [
        ("object-linear", {}, 2),
        ("object-linear", {"search": {"trials": 2, "stack": 3, "lr": [0.1, 0.1]}}, 1),
        ("object-linear@published", {}, 1),
        ("object-knn", {}, 1),
        ("object-retrieval@paper-cls", {}, 0),
        ("object-retrieval@paper-projection", {}, 0),
    ],
)
def test_rounds_of_search_are_those_that_there_is_something_to_choose_in(
    planned: Callable[..., Plan], task: str, settings: dict[str, Any], rounds: int
) -> None:
    plan = planned(tasks=[f"tiny/{task}"], **settings)
    assert [rounds_of(plan, study) for study in plan.studies] == [rounds]


def test_one_fixed_learning_rate_trains_one_stream(planned: Callable[..., Plan], store: BankStore) -> None:
    plan = planned(tasks=["tiny/object-linear-streamed"], protocol={"epochs": 7}, search={"trials": 2, "stack": 3, "lr": [0.1, 0.1]})
    (cost,) = cost_of(plan, store, actors=1).streams
    assert cost.passes == 7 * IMAGES["train"] + IMAGES["val"] + IMAGES["test"]


def test_a_streamed_study_that_has_read_its_test_split_is_not_counted(planned: Callable[..., Plan], store: BankStore) -> None:
    plan = planned(tasks=["tiny/object-linear-streamed"])
    bank = next(iter(plan.studies[0].banks["test"].values()))
    for number, (file, digest, samples) in enumerate(bank.shards):
        assert len(cost_of(plan, store, actors=1).streams) == 1, f"{number} of {len(bank.shards)} shards are read"
        store.write_part(bank, ShardRows(), receipt(bank.key, file, samples, sha256=digest, images=samples, seconds=1.0))
    assert cost_of(plan, store, actors=1).streams == []


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(512, 683, 2), (512, 512, 1), (400, 400, 1), (300, 1200, 6)],  # fitted into 2048 × 512: 683, 512, 512 and 2048 px wide
)
def test_windows_of_an_image_are_counted_as_the_test_lays_them(height: int, width: int, count: int) -> None:
    fields = SegmentationFields()
    assert windows_of(height, width, fields) == count
    reading = Reading(train=0, chosen_on=0, read_to_choose=0, heads=1, input_size=(512, 256), sizes=((height, width), (512, 512)))
    assert PROBE.passes(fields, reading).encoded_per_test_image == 2 * (count + 1) / 2  # a crop has twice the pixels of the encoder's input


# --- a look at the shards ---------------------------------------------------------------------------------------------


def test_a_shard_that_cannot_be_read_leaves_one_item_an_image_and_says_so(shards: Path, tmp_path: Path) -> None:
    manifest = load_manifest(str(shards), "tiny")
    shard = manifest.split("train").shards[0]
    glance = peek(str(tmp_path), manifest, shard)
    assert glance.samples == ()
    assert "cannot be read" in glance.basis
    assert "one item per image is assumed" in glance.basis


def test_a_look_takes_some_images_and_leaves_the_rest(shards: Path) -> None:
    manifest = load_manifest(str(shards), "tiny")
    glance = peek(str(shards), manifest, manifest.split("train").shards[0])
    assert len(glance.samples) == 12  # the shard has no more
    assert glance.seconds > 0
    assert glance.basis == "from the first 12 images of train-000.tar"


# --- how fast it goes -------------------------------------------------------------------------------------------------


def receipt(key: str, file: str, samples: int, *, images: int, seconds: float, sha256: str = "0" * 64) -> Receipt:
    cost_lines = {"bank_key": key, "shard": file, "expected": samples, "seen": samples, "failed": 0, "duplicates": 0, "reasons": {}, "sha256": sha256}
    return Receipt(**cost_lines, attempts=1, node="here", rows=images, images=images, seconds=seconds)


def account(store: BankStore, plan: Plan, *, seconds: float, only: str | None = None) -> None:
    """Parts of every bank of a plan's shards, each with this time for its images."""
    for bank in plan.banks():
        store.describe(bank)
    for work in plan.shard_work:
        for job in (job for encoder_pass in work.passes for job in encoder_pass.banks if only in (None, work.shard.file)):
            rows = ShardRows(keys=["a"], groups=["a"], targets=[0], features=[np.zeros(2, np.float32)])
            cost_lines = receipt(
                job.bank.key, work.shard.file, work.shard.samples, images=work.shard.samples, seconds=seconds, sha256=work.shard.sha256
            )
            store.write_part(job.bank, rows, cost_lines)


def test_an_earlier_run_of_the_architecture_tells_the_speed(planned: Callable[..., Plan], store: BankStore) -> None:
    """Of other weights, another task and another data set."""
    other = {"name": "other", "architecture": "test_vit", "random": True, "seed": 7, "preprocessing": {"size": 64}}
    earlier = planned(encoders=[other], tasks=["noval/object-knn"], protocol={"readouts": ["cls"]})
    account(store, earlier, seconds=2.0)
    images = sum(work.shard.samples for work in earlier.shard_work)
    speed = cost_of(planned(tasks=["tiny/part-knn"]), store, actors=1).speeds["tiny_vit"]
    assert speed.images_per_second == pytest.approx(images / (2.0 * len(earlier.shard_work)))
    assert speed.basis == f"from the accounts of {images} images in the cache"


@pytest.mark.parametrize(
    "change",
    [{"encoders": [{"name": "x", "architecture": "test_vit", "random": True, "preprocessing": {"size": 96}}]}, {"resources": {"threads": 2}}],
)
def test_accounts_of_another_size_or_of_more_threads_tell_nothing(planned: Callable[..., Plan], store: BankStore, change: dict[str, Any]) -> None:
    account(store, planned(tasks=["tiny/object-knn"], **change), seconds=2.0)
    assert cost_of(planned(tasks=["tiny/part-knn"]), store, actors=1).speeds["tiny_vit"].basis == "timed by the test"


def test_accounts_of_another_device_tell_nothing_and_time_is_then_unknown(planned: Callable[..., Plan], store: BankStore) -> None:
    account(store, planned(tasks=["tiny/object-knn"]), seconds=2.0)
    elsewhere = planned(device="cpu:unheard of", tasks=["tiny/part-knn"])
    cost = cost_of(elsewhere, store, actors=1)
    assert (cost.speeds["tiny_vit"].images_per_second, cost.encoding, cost.seconds) == (None, None, None)
    lines = list(cost_lines(elsewhere, cost, actors=1))
    assert lines[-1] == "estimated time: unknown, as the speed of an encoder is"
    assert any("no earlier run on cpu:unheard of" in line for line in lines)


def test_encoders_of_one_architecture_are_timed_once(planned: Callable[..., Plan], store: BankStore, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr("harness.plan.speed.timed", lambda spec, *_: timed.append(spec.name) or Speed(images_per_second=1.0, basis=""))
    twins = [{"name": name, "architecture": "test_vit", "random": True, "seed": place} for place, name in enumerate("abc")]
    cost = cost_of(planned(encoders=twins, tasks=["tiny/object-knn"]), store, actors=1)
    assert set(cost.speeds) == {"a", "b", "c"}
    assert timed == ["a"]


def test_timing_encodes_real_batches_and_tells_how_many(planned: Callable[..., Plan], store: BankStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.plan.speed.timed", TIMED)
    speed = cost_of(planned(tasks=["tiny/object-knn"]), store, actors=1).speeds["tiny_vit"]
    assert speed.images_per_second is not None
    assert speed.images_per_second > 0
    assert speed.basis.startswith("timed just now on ")


def test_a_damaged_account_in_the_cache_is_passed_over(planned: Callable[..., Plan], store: BankStore, tmp_path: Path) -> None:
    for place, text in enumerate(("", "[]", "{}", '{"identity": 3, "shards": 4}')):
        folder = tmp_path / "cache" / f"{place:032x}"
        folder.mkdir(parents=True)
        (folder / "bank.json").write_text(text)
    assert cost_of(planned(tasks=["tiny/object-knn"]), store, actors=1).speeds["tiny_vit"].basis == "timed by the test"


# --- time, and what is printed ----------------------------------------------------------------------------------------


def test_time_is_passes_over_speed_shared_by_the_actors(planned: Callable[..., Plan], store: BankStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.plan.cost.peek", lambda *_: Glance(seconds=0.001, basis="looked at by the test"))
    plan = planned(tasks=["tiny/object-knn"])
    alone, shared = (cost_of(plan, store, actors=actors) for actors in (1, 3))
    assert alone.seconds == alone.encoding == sum(IMAGES.values()) / 4.0
    assert shared.seconds == pytest.approx(sum(IMAGES.values()) / 4.0 / 3)


def test_where_decoding_takes_longer_it_decides(planned: Callable[..., Plan], store: BankStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.plan.cost.peek", lambda *_: Glance(seconds=10.0, basis="looked at by the test"))
    plan = planned(tasks=["tiny/object-knn"], resources={"batch_size": 8, "decode_threads": 5})
    cost = cost_of(plan, store, actors=1)
    assert cost.seconds == cost.decoding == sum(IMAGES.values()) * 10.0 / 5


def test_a_dry_run_prints_the_plan_and_runs_nothing(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text(tiny.sweep_text(shards, tasks=["tiny/object-knn", "tiny/part-knn", "tiny/object-linear-streamed"]))
    arguments = [str(tmp_path / "sweep.yaml"), "--dry-run", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        "1 encoders × 3 tasks = 3 studies, 4 rounds of search",
        "7 shards, 7 of them to encode: 78 images to decode, 390 forward passes of items",  # of each image, and of its four parts
        "tiny/test: 4.0 items per image, from the first 12 images of test-000.tar",
        "feature banks to write: about",
        "1 streamed study: 420 images to decode, 420 passes",
        "tiny_vit: 4 images/s per actor, timed by the test",
        "estimated time: about",
        "not counted: training and scoring of heads",
    ):
        assert words in printed
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_the_cost_of_bags_is_said_in_passes_of_their_patches(planned: Callable[..., Plan], store: BankStore) -> None:
    plan = planned(tasks=["tiny/bag-knn"], protocol={"patches": 4, "draws": 2, "bag_sizes": [4]})
    cost = cost_of(plan, store, actors=1)
    assert f"{sum(IMAGES.values()):,} images to decode, {8 * sum(IMAGES.values()):,} forward passes of items" in "\n".join(
        cost_lines(plan, cost, actors=1)
    )


def test_nothing_left_to_do_is_said(planned: Callable[..., Plan], store: BankStore) -> None:
    plan = planned(tasks=["tiny/object-knn"])
    account(store, plan, seconds=1.0)
    cost = cost_of(plan, store, actors=1)
    assert isinstance(cost, Cost)
    assert list(cost_lines(plan, cost, actors=1))[-1] == "estimated time: nothing is left to encode"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (5400, "1 h 30 min"), (12_000, "3 h 20 min"), (1_051_200, "12 days 4 h")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(("count", "words"), [(0, "0 bytes"), (1536, "1.5 KiB"), (12 * 2**20, "12 MiB"), (3 * 2**40, "3.0 TiB")])
def test_sizes_in_words(count: int, words: str) -> None:
    assert size(count) == words
