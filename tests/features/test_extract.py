"""One decode an image, one forward a view, and rows that do not depend on their company."""

from __future__ import annotations

import json
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFile

import harness.data.shards
from harness.cluster.actors import ActorSettings, EncoderActor
from harness.cluster.ledger import longest_first
from harness.core import Encoder, View
from harness.data.manifest import Rules, Shard, load_manifest
from harness.data.preprocess import prepare
from harness.data.shards import ShardAudit, read_samples
from harness.data.views.augmented import RandomCrops
from harness.data.views.bag import Bag
from harness.data.views.keypoint_patch import KeypointPatch
from harness.data.views.whole import Whole
from harness.encoders import EncoderSpec, load
from harness.errors import BankError, ShardError
from harness.features.bank import BankSpec, BankStore, Receipt, ShardRows
from harness.features.device import Compute, Precision, device_type
from harness.features.extract import BankJob, Extractor, Pass, ShardWork
from tests.helpers import tiny

ENCODER = {"name": "vit", "architecture": "test_vit", "random": True, "preprocessing": {"size": 32}}
TWIN = {**ENCODER, "name": "twin", "seed": 1}
RULES = Rules(
    annotations=frozenset({"label", "keypoints", "object"}), classes=len(tiny.CLASSES), parts=frozenset(tiny.PARTS), mask_values={"object": 2}
)


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encoder]:
    return {entry["name"]: load(EncoderSpec.parse(entry)) for entry in (ENCODER, TWIN)}


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, Shard]:
    folder = tiny.build(tmp_path, splits={"test": 7})
    return folder / "test-000.tar", load_manifest(str(tmp_path), "tiny").split("test").shards[0]


def bank(readout: str, view: View, encoder: str = "vit", shard: Shard | None = None) -> BankSpec:
    shards = ((shard.file, shard.sha256, shard.samples),) if shard else ()
    return BankSpec(dataset="tiny", split="test", shards=shards, readout=readout, view=view.identity, identity=(("encoder", encoder),))


def work(path: Path, shard: Shard, *passes: tuple[str, View, tuple[str, ...]], precision: Precision = "float32") -> ShardWork:
    return ShardWork(
        dataset="tiny",
        split="test",
        url=str(path),
        shard=shard,
        rules=RULES,
        passes=tuple(
            Pass(
                encoder=name,
                view=view,
                banks=tuple(BankJob(readout=readout, bank=bank(readout, view, name, shard)) for readout in readouts),
                precision=precision,
            )
            for name, view, readouts in passes
        ),
    )


def extract(
    encoders: dict[str, Encoder], job: ShardWork, batch_size: int = 4, threads: int = 2, precision: Precision = "float32"
) -> list[tuple[BankSpec, ShardRows, Receipt]]:
    extractor = Extractor(Compute(precision, False, 1), encoders.__getitem__, batch_size=batch_size, decode_threads=threads)
    return extractor.run(job, node="here", attempts=1)


def test_rows_are_what_the_encoder_gives_for_each_image(encoders: dict[str, Encoder], shard: tuple[Path, Shard]) -> None:
    path, entry = shard
    parts = extract(encoders, work(path, entry, ("vit", Whole(), ("cls", "mean", "cls+mean", "mean@-1", "tokens"))))
    audit = ShardAudit(shard=entry.file, expected=entry.samples)
    samples = [decode() for _, decode in read_samples(str(path), entry, RULES, audit)]
    encoder = encoders["vit"]
    images = torch.stack([prepare(sample.image, encoder.info.preprocessing, "crop") for sample in samples])
    with torch.inference_mode():
        tokens = encoder.encode(images, blocks=(len(encoder.info.block_dims) - 1,))
    last = tokens.blocks[len(encoder.info.block_dims) - 1].patches
    assert tokens.cls is not None
    expected = {
        "cls": tokens.cls,
        "mean": tokens.patches.mean((1, 2)),
        "cls+mean": torch.cat([tokens.cls, tokens.patches.mean((1, 2))], 1),
        "mean@-1": last.mean((1, 2)),
        "tokens": tokens.patches,
    }
    for spec, rows, receipt in parts:
        assert rows.keys == rows.groups == [sample.key for sample in samples]
        assert rows.targets == [sample.label for sample in samples]
        np.testing.assert_allclose(np.stack(rows.features), expected[spec.readout].numpy(), rtol=1e-4, atol=1e-5)
        assert receipt.status == "ok"
        assert bool(rows.masks) == (spec.readout == "tokens")


def test_an_image_is_decoded_once_and_each_view_encoded_once(
    encoders: dict[str, Encoder], shard: tuple[Path, Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, forwards = [], []
    real = harness.data.shards.decode_sample
    monkeypatch.setattr(harness.data.shards, "decode_sample", lambda key, *rest: decoded.append(key) or real(key, *rest))
    for name, encoder in encoders.items():
        encode = encoder.encode
        monkeypatch.setattr(encoder, "encode", lambda images, _name=name, _encode=encode, **rest: forwards.append(_name) or _encode(images, **rest))
    patches = KeypointPatch(parts=tiny.PARTS)
    passes = [(name, view, readouts) for name in encoders for view, readouts in ((Whole(), ("cls", "mean", "tokens")), (patches, ("mean",)))]
    extract(encoders, work(*shard, *passes), batch_size=4)
    assert len(decoded) == len(set(decoded)) == 7
    assert sorted(forwards) == sorted(list(encoders) * (2 + 7)), "7 images and 28 patches in batches of 4"


def test_rows_depend_neither_on_threads_nor_on_the_other_passes(encoders: dict[str, Encoder], shard: tuple[Path, Shard]) -> None:
    alone = extract(encoders, work(*shard, ("vit", Whole(), ("mean",))), threads=1)[0][1]
    crowded = extract(encoders, work(*shard, ("twin", Whole(), ("cls",)), ("vit", Whole(), ("cls", "mean"))), threads=4)[2][1]
    np.testing.assert_array_equal(np.stack(alone.features), np.stack(crowded.features))


VIEWS = {
    "whole": (Whole(), 1),
    "crops": (RandomCrops(count=8), 8),
    "bag": (Bag(patches=4, side=64, draws=3), 12),
    "keypoint patches": (KeypointPatch(parts=tiny.PARTS), 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_shard_counts_every_item_of_a_view_that_knows_how_many_it_makes(shard: tuple[Path, Shard], name: str) -> None:
    view, count = VIEWS[name]
    job = work(*shard, ("vit", Whole(), ("cls",)), ("twin", view, ("cls",)))
    assert job.items == 7 * (1 + count)
    (_, decode), *_ = read_samples(str(shard[0]), shard[1], RULES, ShardAudit(shard="", expected=7))
    assert name == "keypoint patches" or len(view(decode())) == count


def test_work_on_many_crops_is_leased_before_work_on_more_images(shard: tuple[Path, Shard]) -> None:
    path, entry = shard
    images, crops = (
        work(path, entry.model_copy(update={"samples": 20}), ("vit", Whole(), ("cls",))),
        work(path, entry, ("vit", RandomCrops(count=8), ("cls",))),
    )
    assert longest_first([images, crops]) == [crops, images]


def test_batch_sizes_agree_to_rounding(encoders: dict[str, Encoder], shard: tuple[Path, Shard]) -> None:
    first, second = (np.stack(extract(encoders, work(*shard, ("vit", Whole(), ("mean",))), batch_size=size)[0][1].features) for size in (2, 16))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float32) - expected) / np.linalg.norm(expected))


READOUTS = ("cls", "mean", "tokens")


def test_bf16_is_what_the_encoder_computes_in(encoders: dict[str, Encoder], shard: tuple[Path, Shard]) -> None:
    """Features differ from float32's by bf16's rounding, and the matrix products themselves are in bf16."""
    job = work(*shard, ("vit", Whole(), READOUTS))
    exact = extract(encoders, job)
    seen: set[torch.dtype] = set()
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        for module in encoders["vit"].module.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    half = extract(encoders, work(*shard, ("vit", Whole(), READOUTS), precision="bf16"), precision="bf16")
    for handle in handles:
        handle.remove()
    assert seen == {torch.bfloat16}
    for (spec, rows, _), (_, expected, _) in zip(half, exact, strict=True):
        assert 1e-4 < relative(np.stack(rows.features), np.stack(expected.features)) < 0.02, spec.readout
        assert rows.features[0].dtype == (np.float16 if spec.readout == "tokens" else np.float32)


def test_an_actor_encodes_in_the_precision_of_its_run(encoders: dict[str, Encoder], shard: tuple[Path, Shard], tmp_path: Path) -> None:
    job = work(*shard, ("vit", Whole(), READOUTS), precision="bf16")
    settings = ActorSettings(
        cache=str(tmp_path / "cache"), precision="bf16", batch_size=4, threads=1, decode_threads=1, gpus=0, cpus=1, device_type=device_type(False)
    )
    actor = EncoderActor(settings, {"vit": EncoderSpec.parse(ENCODER)})
    actor.start()
    assert actor.encode(job, attempt=1) == 3 * 7
    store = BankStore(settings.cache)
    for spec, expected, _ in extract(encoders, job, precision="bf16"):
        np.testing.assert_array_equal(store.rows(spec).features, np.stack(expected.features))


def test_a_bank_gives_back_what_was_written(encoders: dict[str, Encoder], shard: tuple[Path, Shard], tmp_path: Path) -> None:
    store = BankStore(str(tmp_path / "cache"))
    for spec, rows, receipt in extract(encoders, work(*shard, ("vit", Whole(), ("mean", "tokens")))):
        store.write_part(spec, rows, receipt)
        read = store.rows(spec, mask="object" if spec.readout == "tokens" else None)
        assert list(read.keys) == rows.keys
        np.testing.assert_array_equal(read.features, np.stack(rows.features))
        assert store.receipt(spec, shard[1].file) == receipt
        if spec.readout == "tokens":
            assert read.masks is not None
            np.testing.assert_array_equal(read.masks, np.stack(rows.masks["object"]))
            with pytest.raises(BankError, match="label maps"):
                store.rows(spec, mask="part")


def test_samples_that_fail_in_every_way_are_lost_alone_and_their_part_is_written(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = [tiny.members(rng, f"test-{index:05d}", 0) for index in range(9)]
    thin = tiny.encode(np.full((3000, 1, 3), 90, np.uint8), "PNG")
    grey = tiny.encode(np.arange(2304, dtype=np.uint16).reshape(48, 48), "PNG")
    about = json.dumps({"label": 0}).encode()
    made[1][0] = ("test-00001.jpg", tiny.encode(np.zeros((48, 48, 3), np.uint8), "TIFF")[:-1])
    made[2][1] = ("test-00002.json", json.dumps({"label": 0, "group": "\ud800"}).encode())
    made[3] = [(name.replace("test-00003", "caf\udce9"), contents) for name, contents in made[3]]
    made[4] = [("test-00004.png", thin), ("test-00004.json", about), ("test-00004.object.png", tiny.encode(np.ones((3000, 1), np.uint8), "PNG"))]
    made[5][0] = ("test-00005.png", grey)
    made[6][0] = ("test-00006.cls", b"1")
    entry = tiny.write_tar(tmp_path / "a.tar", made)
    shard = Shard.model_validate(entry)
    store = BankStore(str(tmp_path / "cache"))
    for spec, rows, receipt in extract(encoders, work(tmp_path / "a.tar", shard, ("vit", Whole(), READOUTS))):
        store.write_part(spec, rows, receipt)
        assert store.receipt(spec, shard.file) == receipt
        assert list(store.rows(spec).keys) == [f"test-{index:05d}" for index in (0, 4, 7, 8)]
        assert (receipt.seen, receipt.failed) == (4, 5)
        assert receipt.reasons == {
            "broken image": ["test-00001"],
            "group that is not UTF-8": ["test-00002"],
            "key that is not UTF-8": ["caf\\xe9"],
            "16-bit grey within 0 to 4095: state `range: [0, 4095]` in the manifest": ["test-00005 (0 to 2303)"],
            "missing member: image; members are cls, json, object.png; the image is read from jpg, jpeg, png or webp": ["test-00006"],
        }


def test_the_first_complete_part_stays_and_an_incomplete_one_is_replaced(tmp_path: Path) -> None:
    store, spec = BankStore(str(tmp_path)), bank("mean", Whole())

    def part(value: float, attempts: int, reasons: dict[str, list[str]]) -> None:
        audit = ShardAudit(shard="a.tar", expected=1, seen=1, reasons=reasons)
        receipt = Receipt.of(audit, bank_key=spec.key, attempts=attempts, node="", rows=1, seconds=0.0, images=1)
        rows = ShardRows(keys=["k"], groups=["k"], targets=[0], features=[np.full(3, value, np.float32)])
        store.write_part(spec, rows, receipt)

    part(1.0, 1, {"sha256": ["x"]})
    part(2.0, 2, {})
    part(3.0, 3, {})
    receipt = store.receipt(spec, "a.tar")
    assert receipt is not None
    assert receipt.attempts == 2


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_a_damaged_part_counts_as_absent_and_cannot_be_read(
    encoders: dict[str, Encoder], shard: tuple[Path, Shard], tmp_path: Path, damage: object
) -> None:
    store = BankStore(str(tmp_path / "cache"))
    ((spec, rows, receipt),) = extract(encoders, work(*shard, ("vit", Whole(), ("mean",))))
    store.write_part(spec, rows, receipt)
    (path,) = (tmp_path / "cache").glob("*/*.arrow")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert store.receipt(spec, shard[1].file) is None
    with pytest.raises(BankError, match="run the sweep again"):
        store.rows(spec)
    store.write_part(spec, rows, receipt)
    assert store.receipt(spec, shard[1].file) == receipt, "the sweep that is run again mends it"
    np.testing.assert_array_equal(store.rows(spec).features, np.stack(rows.features))


def test_of_a_remote_part_the_account_alone_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store, spec = BankStore("memory://accounts"), bank("mean", Whole())
    rows = ShardRows(keys=["k"], groups=["k"], targets=[0], features=[np.zeros(2**20, np.float32)])
    receipt = Receipt.of(ShardAudit(shard="a.tar", expected=1, seen=1), bank_key=spec.key, attempts=1, node="", rows=1, seconds=0.0, images=1)
    store.write_part(spec, rows, receipt)
    read: list[int] = []
    plain = MemoryFile.read

    def counted(self: MemoryFile, size: int = -1) -> bytes:
        data = plain(self, size)
        read.append(len(data))
        return data

    monkeypatch.setattr(MemoryFile, "read", counted)
    assert store.receipt(spec, "a.tar") == receipt
    assert 0 < sum(read) < 2**16, "of four megabytes"


def test_a_store_on_any_file_system() -> None:
    store, spec = BankStore("memory://cache"), bank("mean", Whole())
    audit = ShardAudit(shard="a.tar", expected=1, seen=1)
    rows = ShardRows(keys=["k"], groups=["k"], targets=[0], features=[np.arange(3, dtype=np.float32)])
    spec = BankSpec(**{**{name: getattr(spec, name) for name in spec.__dataclass_fields__}, "shards": (("a.tar", "", 1),)})
    store.write_part(spec, rows, Receipt.of(audit, bank_key=spec.key, attempts=1, node="", rows=1, seconds=0.0, images=1))
    np.testing.assert_array_equal(store.rows(spec).features, [[0, 1, 2]])
    store.discard(spec.key)
    assert store.receipt(spec, "a.tar") is None


@pytest.mark.parametrize("root", ["", "memory://repeated"])
def test_items_of_a_sample_that_shards_before_have_are_left_out(tmp_path: Path, root: str) -> None:
    files = {"a.tar": ["k#0", "k#1", "l#0"], "b.tar": ["m#0", "l#1", "l#2"], "c.tar": ["l#0", "m#7"], "d.tar": ["n#0"]}
    plain = bank("mean", Whole())
    spec = replace(plain, shards=tuple((file, "", len(keys)) for file, keys in files.items()))
    store = BankStore(root or str(tmp_path))
    assert store.repeated(spec) == {}
    for place, (file, keys) in enumerate(files.items()):
        audit = ShardAudit(shard=file, expected=len(keys), seen=len(keys))
        features = [np.full(3, 10 * place + row, np.float32) for row in range(len(keys))]
        rows = ShardRows(keys=keys, groups=keys, targets=[0] * len(keys), features=features)
        store.write_part(spec, rows, Receipt.of(audit, bank_key=spec.key, attempts=1, node="", rows=len(keys), seconds=0.0, images=0))
    assert store.repeated(spec) == {"b.tar": {"l": "a.tar"}, "c.tar": {"l": "a.tar", "m": "b.tar"}}
    stored = store.rows(spec)
    assert list(stored.keys) == ["k#0", "k#1", "l#0", "m#0", "n#0"]
    np.testing.assert_array_equal(stored.features[:, 0], [0, 1, 2, 10, 30])
    assert store.repeated(spec, without=("a.tar",)) == {"c.tar": {"l": "b.tar", "m": "b.tar"}}
    assert list(store.rows(spec, without=("a.tar",)).keys) == ["m#0", "l#1", "l#2", "n#0"]


def test_everything_that_could_change_a_byte_changes_the_key() -> None:
    base = bank("mean", Whole())
    plain = {name: getattr(base, name) for name in base.__dataclass_fields__}
    changes = [
        {"dataset": "other"},
        {"split": "train"},
        {"readout": "cls"},
        {"view": "other"},
        {"shards": (("a.tar", "00", 3),)},
        {"identity": (("encoder", "twin"),)},
    ]
    keys = {BankSpec(**{**plain, **change}).key for change in changes}
    assert len(keys | {base.key}) == len(changes) + 1
    assert base.key == BankSpec(**plain).key


# --- shards in flight -------------------------------------------------------------------------------------------------


def shards_of(tmp_path: Path, count: int) -> list[tuple[Path, Shard]]:
    folder = tiny.build(tmp_path, splits={"test": 9 * count}, per_shard=9)
    return [(folder / shard.file, shard) for shard in load_manifest(str(tmp_path), "tiny").split("test").shards]


def test_shards_that_follow_each_other_give_what_each_gives_alone(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    jobs = [work(*shard, ("vit", Whole(), ("mean",)), ("twin", RandomCrops(count=2), ("cls",))) for shard in shards_of(tmp_path, 4)]
    extractor = Extractor(Compute("float32", False, 1), encoders.__getitem__, batch_size=4, decode_threads=2)
    together = list(extractor.each(jobs, node="here"))
    assert [job for job, _ in together] == jobs
    for job, begun in together:
        for (spec, rows, receipt), (_, alone, wanted) in zip(begun.result(), extract(encoders, job), strict=True):
            assert rows.keys == alone.keys, spec.readout
            np.testing.assert_array_equal(np.stack(rows.features), np.stack(alone.features))
            assert replace(receipt, seconds=0.0) == replace(wanted, seconds=0.0)


def test_a_shard_that_cannot_be_read_costs_neither_the_one_before_nor_the_one_behind(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    first, second, third = shards_of(tmp_path, 3)
    second[0].unlink()
    jobs = [work(*shard, ("vit", Whole(), ("mean",))) for shard in (first, second, third)]
    outcomes = [
        begun for _, begun in Extractor(Compute("float32", False, 1), encoders.__getitem__, batch_size=4, decode_threads=2).each(jobs, node="")
    ]
    assert isinstance(outcomes[1].exception(), ShardError)
    assert [outcomes[index].result()[0][2].status for index in (0, 2)] == ["ok", "ok"]


def test_an_encoder_that_fails_on_a_shard_leaves_the_next_one_alone(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    jobs = [work(*shard, (name, Whole(), ("mean",))) for shard, name in zip(shards_of(tmp_path, 2), ("nobody", "vit"), strict=True)]
    first, second = (
        begun for _, begun in Extractor(Compute("float32", False, 1), encoders.__getitem__, batch_size=4, decode_threads=2).each(jobs, node="")
    )
    assert isinstance(first.exception(), KeyError)
    assert second.result()[0][2].status == "ok"


def test_whoever_stops_waits_for_no_more_than_a_batch(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    jobs = [work(*shard, ("vit", Whole(), ("mean",))) for shard in shards_of(tmp_path, 4)]
    extractor = Extractor(Compute("float32", False, 1), encoders.__getitem__, batch_size=4, decode_threads=2)
    works = extractor.each(jobs, node="here")
    next(works)
    works.close()
    with pytest.raises(CancelledError, match="given up"):
        extractor.run(jobs[3], node="here", attempts=1)


def test_what_an_actor_expects_it_encodes_once(shard: tuple[Path, Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = work(*shard, ("vit", Whole(), ("mean",)))
    settings = ActorSettings(
        cache=str(tmp_path / "cache"), precision="float32", batch_size=4, threads=1, decode_threads=1, gpus=0, cpus=1, device_type=device_type(False)
    )
    actor = EncoderActor(settings, {"vit": EncoderSpec.parse(ENCODER)})
    actor.start()
    decoded: list[str] = []
    real = harness.data.shards.decode_sample
    monkeypatch.setattr(harness.data.shards, "decode_sample", lambda key, *more: decoded.append(key) or real(key, *more))
    actor.expect(job, 1)
    assert actor.encode(job, attempt=1) == 7
    actor.expect(job, 1)  # a call that comes late begins nothing
    assert len(decoded) == 7
