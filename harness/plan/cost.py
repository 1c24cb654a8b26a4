"""What a plan will cost, estimated before anything runs: images to encode, bytes of banks, time, and what every figure rests on.

Speeds come from the accounts of earlier runs in the cache, where the same architecture ran on this device type at this precision; otherwise from a
few batches timed here, where this machine has that device type; otherwise they are unknown, and so is the time. How many items a view makes of an
image, how many windows it has and how long it takes to decode come from a look at the first images of a split.

Counted is what passes an encoder, or the decoding where that takes longer. Not counted: training and scoring of heads, retrieval, intervals,
augmentation, starting Ray.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from harness.core import EncoderInfo, Reading, Sample, View
from harness.data.manifest import Manifest, Shard, shard_url
from harness.data.shards import ShardAudit, attempt, read_samples
from harness.data.views.whole import Whole
from harness.errors import HarnessError, ShardError
from harness.features.bank import BankStore
from harness.features.extract import ShardWork
from harness.features.readouts import parse_readout
from harness.plan.plan import Plan, StudyPlan
from harness.plan.rates import is_searched, rates_at_once
from harness.plan.speed import Speed, Speeds
from harness.probes import is_decided, stream_probe
from harness.probes.fields import lr_bounds_of

HELD_OUT_SHARE = 0.1
"""Share of train that heads are chosen on where there is no val."""
_GLANCED = 16


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What the first images of a split say about the rest."""

    samples: Sequence[Sample] = ()
    seconds: float = 0.0
    """To read and decode one image, on one thread."""
    basis: str = ""

    def items(self, view: View) -> float:
        """Items that `view` makes of an image, on average; 1 where there was no image to look at."""
        items = [attempt(partial(view, sample)) for sample in self.samples]
        usable = [len(made) for made in items if not isinstance(made, ShardError)]
        return sum(usable) / len(usable) if usable else 1.0


@dataclass(frozen=True, kw_only=True)
class StreamCost:
    """What a streamed study has its encoder do."""

    study: StudyPlan
    decoded: float
    """Images that are read, each as often as it is."""
    passes: float
    """Of the encoder, in images of its own input size: larger ones count by their pixels, training ones as several."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What is left to do of a plan."""

    work: Sequence[ShardWork]
    """Shards to encode."""
    items: Mapping[tuple[str, str, str], float]
    """(data set, split, view) to items per image, for the views whose number of items depends on the image."""
    bases: Mapping[tuple[str, str], str]
    """(data set, split) to what those numbers rest on."""
    passes: Mapping[str, float]
    """Encoder to items that it encodes for banks."""
    streams: Sequence[StreamCost]
    bank_bytes: int
    free_bytes: int | None
    """Room in the cache, where that is a folder on this machine."""
    speeds: Mapping[str, Speed]
    """Of every encoder that has something to do."""
    decoding: float
    """Seconds of one actor's decoding threads, for banks and streams."""
    encoding: float | None
    """Seconds of one actor's encoders, for banks and streams; None where a speed is unknown."""
    seconds: float | None
    """Of all actors side by side; None where a speed is unknown."""


def cost_of(plan: Plan, store: BankStore, *, actors: int) -> Cost:
    """What is left to do of `plan`; times encoders for some seconds each, where no earlier run gives their speed."""
    work = plan.missing(store)
    todo = [study for study in plan.studies if study.task.feed == "streamed" and study.undefined is None and not is_scored(study, store)]
    glances = _Glances(plan)
    items = _Items(glances, work)
    streams = [_stream_cost(plan, study, glances) for study in todo]
    passes: dict[str, float] = {}
    for shard in work:
        for encoder_pass in shard.passes:
            passes[encoder_pass.encoder] = passes.get(encoder_pass.encoder, 0.0) + shard.shard.samples * items.of(shard, encoder_pass.view)
    needed = dict.fromkeys([*passes, *(stream.study.encoder.name for stream in streams)])
    speeds = Speeds(plan, store).of_all(needed)
    decode = {key: glance.seconds / plan.sweep.resources.decode_threads for key, glance in glances.seen.items()}
    # decoding and encoding go on side by side: whichever takes longer decides, for banks and for each stream
    banks_decode = sum(shard.shard.samples * decode[shard.dataset, shard.split] for shard in work)
    banks_encode = _encode_seconds(passes, speeds)
    parts = [(banks_decode, banks_encode)]
    for stream in streams:
        encoding = _encode_seconds({stream.study.encoder.name: stream.passes}, speeds)
        parts.append((stream.decoded * decode[learnt_from(stream.study), "train"], encoding))
    timed = [(decoding, encoding) for decoding, encoding in parts if encoding is not None]
    is_timed = len(timed) == len(parts)
    return Cost(
        work=work,
        items=items.counts,
        bases={(shard.dataset, shard.split): glances.of(shard.dataset, shard.split).basis for shard in work},
        passes=passes,
        streams=streams,
        bank_bytes=bytes_of_banks(plan, work, items.of),
        free_bytes=store.free_bytes,
        speeds=speeds,
        decoding=sum(decoding for decoding, _ in parts),
        encoding=sum(encoding for _, encoding in timed) if is_timed else None,
        seconds=sum(max(pair) for pair in timed) / actors if is_timed else None,
    )


def is_scored(study: StudyPlan, store: BankStore) -> bool:
    """Whether a streamed study has read its test split to the end, which is the last thing that it does."""
    bank = next(iter(study.banks["test"].values()))
    return all(store.receipt(bank, file) is not None for file, _, _ in bank.shards)


def rounds_of(plan: Plan, study: StudyPlan) -> int:
    """Rounds that its search takes: none where nothing is to be chosen, one where there is one learning rate or none."""
    if study.undefined is not None or is_decided(study.task.probe, tuple(study.banks["test"]), study.task.protocol.fields):
        return 0
    return plan.sweep.search.trials if study.task.probe.has_learning_rate and is_searched(_rates(plan, study)) else 1


def _rates(plan: Plan, study: StudyPlan) -> Sequence[float]:
    return lr_bounds_of(study.task.protocol.fields) or plan.sweep.search.lr


def learnt_from(study: StudyPlan) -> str:
    """The data set that a study trains on."""
    return study.task.train_dataset or study.task.dataset


def _encode_seconds(passes: Mapping[str, float], speeds: Mapping[str, Speed]) -> float | None:
    total = 0.0
    for encoder, count in passes.items():
        speed = speeds[encoder].images_per_second
        if speed is None:
            return None
        total += count / speed
    return total


# --- how much there is to do ------------------------------------------------------------------------------------------


class _Glances:
    """The first images of each split, looked at once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.seen: dict[tuple[str, str], Glance] = {}

    def of(self, dataset: str, split: str) -> Glance:
        if (dataset, split) not in self.seen:
            manifest = self._plan.manifests[dataset]
            shards = [shard for shard in manifest.split(split).shards if shard.samples]
            self.seen[dataset, split] = peek(self._plan.sweep.shards, manifest, shards[0]) if shards else Glance(basis="it is empty")
        return self.seen[dataset, split]


def peek(root: str, manifest: Manifest, shard: Shard) -> Glance:
    """The first images of a shard; a glance without images, and why, where none can be read."""
    audit = ShardAudit(shard=shard.file, expected=shard.samples)
    samples: list[Sample] = []
    start = time.perf_counter()
    try:
        with contextlib.closing(read_samples(shard_url(root, manifest.dataset, shard), shard, manifest.rules, audit)) as records:  # type: ignore[type-var]
            for _, decode in records:
                with contextlib.suppress(ShardError):
                    samples.append(decode())
                if len(samples) == _GLANCED:
                    break
    except (HarnessError, OSError) as error:
        return Glance(basis=f"{shard.file} cannot be read ({' '.join(str(error).split())[:120]}), so one item per image is assumed")
    if not samples:
        return Glance(basis=f"{shard.file} has no image that decodes, so one item per image is assumed")
    basis = f"from the first {len(samples)} images of {shard.file}"
    return Glance(samples=samples, seconds=(time.perf_counter() - start) / len(samples), basis=basis)


class _Items:
    """Items per image of every (split, view)."""

    def __init__(self, glances: _Glances, work: Sequence[ShardWork]) -> None:
        self._glances = glances
        self.counts: dict[tuple[str, str, str], float] = {}
        for shard in work:
            glances.of(shard.dataset, shard.split)

    def of(self, work: ShardWork, view: View) -> float:
        if isinstance(view, Whole):
            return 1.0
        key = (work.dataset, work.split, view.identity)
        if key not in self.counts:
            self.counts[key] = self._glances.of(work.dataset, work.split).items(view)
        return self.counts[key]


def _stream_cost(plan: Plan, study: StudyPlan, glances: _Glances) -> StreamCost:
    """All rounds of a streamed study as they are planned from the beginning, whatever checkpoints have of it, and the scoring of the chosen head."""
    task, rounds = study.task, rounds_of(plan, study)
    glance = glances.of(learnt_from(study), "train")
    samples, test = study.sources["train"].samples, study.sources["test"].samples
    held = 0.0 if "val" in study.sources else samples * HELD_OUT_SHARE
    # without a val split, the whole of train is read to find the tenth of it
    read_to_choose = samples if held else study.sources["val"].samples
    heads = rates_at_once(_rates(plan, study), plan.sweep.search.stack) * len(study.banks["test"])
    reading = Reading(
        train=samples - held,
        chosen_on=held or read_to_choose,
        read_to_choose=read_to_choose,
        heads=heads,
        input_size=study.encoder.preprocessing.size,
        sizes=tuple(sample.image.shape[:2] for sample in glance.samples),
    )
    cost = stream_probe(task.probe.name).passes(task.protocol.fields, reading)
    return StreamCost(study=study, decoded=rounds * cost.decoded + test, passes=rounds * cost.encoded + cost.encoded_per_test_image * test)


def least_bytes(plan: Plan, work: Sequence[ShardWork]) -> int:
    """What the banks of `work` will take on disk if no sample fails.

    Views whose images tell how many items there are, and alterations, which may drop tokens, count for nothing.
    """

    def items(_: ShardWork, view: View) -> float:
        is_told = isinstance(view, Whole) or view.items > 1
        return float(view.items) if is_told and view.alteration is None else 0.0

    return bytes_of_banks(plan, work, items)


def bytes_of_banks(plan: Plan, work: Sequence[ShardWork], items: Callable[[ShardWork, View], float]) -> int:
    """About what the banks of `work` will take on disk: features, and the label maps that lie beside token grids; keys and targets are left out.

    `items` per image.
    """
    total = 0.0
    for shard in work:
        masks = _mask_bytes(plan.manifests[shard.dataset])
        for encoder_pass in shard.passes:
            info = plan.infos[encoder_pass.encoder]
            rows = shard.shard.samples * items(shard, encoder_pass.view)
            total += sum(rows * _row_bytes(plan, info, job.readout, masks) for job in encoder_pass.banks)
    return round(total)


def _row_bytes(plan: Plan, info: EncoderInfo, text: str, masks: int) -> int:
    """Bytes of one item of a readout: float32, or half of that for tokens where the encoder computes in less. `masks` is bytes per pixel."""
    readout = parse_readout(text)
    block = readout.block_index(info)
    width = info.embed_dim if block is None else info.block_dims[block]
    if not readout.is_dense:
        return 4 * {"cls+mean": 2 * width, "projection": info.projection_dim or 0}.get(readout.pooling, width)
    tokens = math.prod(info.grid) + (readout.pooling == "all" and info.has_cls)
    beside = masks * math.prod(info.preprocessing.size) if readout.has_masks else 0
    return tokens * width * (4 if plan.precision_of(info) == "float32" else 2) + beside


def _mask_bytes(manifest: Manifest) -> int:
    """Bytes per pixel of all label maps together: 1 each, or 2 where there are more than 256 labels."""
    return sum(2 if len(names) > 256 else 1 for names in manifest.mask_classes.values())


# --- in words ---------------------------------------------------------------------------------------------------------


def cost_lines(plan: Plan, cost: Cost, *, actors: int) -> Iterator[str]:
    """The plan and what it costs, line by line."""
    tasks = max(1, len(plan.studies) // len(plan.infos))
    trials = sum(rounds_of(plan, study) for study in plan.studies)
    yield f"{len(plan.infos)} encoders × {tasks} tasks = {len(plan.studies)} studies, {trials} rounds of search"
    for study in plan.studies:
        undefined = f"  undefined: {study.undefined}" if study.undefined else ""
        name = f"{study.encoder.name}  {study.task.name}@{study.task.protocol.name}"
        yield f"  {name}  readouts {', '.join(study.banks['test']) or 'none'}{undefined}"
    samples = sum(shard.shard.samples for shard in cost.work)
    passes = sum(cost.passes.values())
    yield f"{len(plan.shard_work)} shards, {len(cost.work)} of them to encode: {samples:,} images to decode, {passes:,.0f} forward passes of items"
    for (dataset, split, view), count in cost.items.items():
        yield f"  {dataset}/{split}: {count:.1f} items per image, {cost.bases[dataset, split]}; {view}"
    free = "" if cost.free_bytes is None else f", {size(cost.free_bytes)} free in the cache"
    yield f"feature banks to write: about {size(cost.bank_bytes)}{free}"
    if cost.free_bytes is not None and cost.bank_bytes > cost.free_bytes:
        yield "  that is more than there is room for: free some, choose another --cache, or ask for fewer readouts"
    yield from _stream_lines(cost)
    yield f"device {plan.device_type}, precision {plan.precision}, {actors} actor{'s' if actors > 1 else ''}"
    yield from _time_lines(cost, actors)


def _stream_lines(cost: Cost) -> Iterator[str]:
    if cost.streams:
        decoded, passes = sum(stream.decoded for stream in cost.streams), sum(stream.passes for stream in cost.streams)
        count = f"{len(cost.streams)} streamed stud{'y' if len(cost.streams) == 1 else 'ies'}"
        yield f"{count}: {decoded:,.0f} images to decode, {passes:,.0f} passes of images of the encoders' own size"
        for stream in cost.streams:
            study = stream.study
            yield f"  {study.encoder.name}  {study.task.name}@{study.task.protocol.name}: {stream.decoded:,.0f} decoded, {stream.passes:,.0f} passes"


def _time_lines(cost: Cost, actors: int) -> Iterator[str]:
    if not cost.work and not cost.streams:
        yield "estimated time: nothing is left to encode"
        return
    for name, speed in cost.speeds.items():
        rate = "unknown" if speed.images_per_second is None else f"{speed.images_per_second:,.3g} images/s per actor"
        yield f"  {name}: {rate}, {speed.basis}"
    if cost.seconds is None or cost.encoding is None:
        yield "estimated time: unknown, as the speed of an encoder is"
        return
    decoding = f"{duration(cost.decoding)} of decoding beside it" if cost.decoding else "decoding not looked at"
    yield (
        f"estimated time: about {duration(cost.seconds)} with {actors} actor{'s' if actors > 1 else ''} "
        f"(one actor: {duration(cost.encoding)} of encoding, {decoding})"
    )
    yield "  not counted: training and scoring of heads, retrieval, intervals, augmentation, starting Ray"


def size(count: float) -> str:
    """Bytes in words: `12 MiB`, `1.4 TiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `12 min`, `3 h 20 min`, `12 days 4 h`."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} days {hours} h"
