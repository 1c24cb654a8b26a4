"""A sweep to the least work: which shards pass which encoders, for which views and readouts, and which studies read what comes out."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.config import Sweep
from harness.core import EncoderInfo, Task, View
from harness.data.images import Decoder, decoder_version
from harness.data.manifest import Manifest, Rules, shard_url
from harness.data.shards import Source
from harness.encoders import EncoderSpec, describe
from harness.errors import RequestError
from harness.features.bank import BankSpec, BankStore, ShardList
from harness.features.device import Precision
from harness.features.extract import BankJob, Pass, ShardWork
from harness.features.index import ReadParts
from harness.features.readouts import parse_readout, unavailable
from harness.plan.roles import POOLED, manifests_by_role, roles_of, split_of, view_of
from harness.tasks import select, with_metrics
from harness.versions import EXTRACTION_VERSION, STREAM_VERSION

NOT_IN_RUN_ID: Mapping[str, Any] = {"resources": {"actors", "decode_threads", "lease_timeout", "checkpoint_seconds"}, "shards": True}
"""Fields of a sweep that are in no run's id, since no value depends on them."""
_HASHED_PACKAGES = ("torch", "torchvision", "timm", "pillow")


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyPlan:
    """The search over one (encoder, task), and the banks that it reads."""

    encoder: EncoderInfo
    task: Task
    banks: Mapping[str, Mapping[str, BankSpec]]
    """Role (one of `roles.ROLES`) to readout to bank; roles that the data set does not have or the study does not need are absent."""
    selected_on: str
    """The split that heads are chosen on: `val`, or `train/10` (a stratified tenth of train) where the data set has no val, or `nothing` where there
    is nothing to choose."""
    undefined: str | None = None
    """Why this encoder can have no value here, if so."""
    sources: Mapping[str, Source] = field(default_factory=dict)
    """Role to shards, where the study streams its images; its banks then hold the accounts alone."""

    @property
    def scored(self) -> tuple[str, ...]:
        """The roles whose rows are scored together: `test`, and what else the pool has."""
        return tuple(role for role in self.banks if role == "test" or role.startswith(POOLED))

    @property
    def split(self) -> str:
        """The splits that are scored, as a record names them."""
        return "+".join(split_of(role, self.task) for role in self.scored)

    @property
    def specs(self) -> Iterator[BankSpec]:
        for readouts in self.banks.values():
            yield from readouts.values()


@dataclass(kw_only=True, eq=False)
class Plan:
    """All that a sweep asks for."""

    sweep: Sweep
    encoders: dict[str, EncoderSpec]
    infos: dict[str, EncoderInfo]
    manifests: dict[str, Manifest]
    studies: list[StudyPlan]
    device_type: str
    precision: Precision
    shard_work: list[ShardWork] = field(default_factory=list)
    """Every shard with every pass over it, whether or not its banks are there already."""
    _shard_lists: dict[tuple[str, str], ShardList] = field(default_factory=dict, init=False)

    def precision_of(self, info: EncoderInfo) -> Precision:
        """What the encoder computes in: the run's precision, or float32 for networks that lose too much in any other."""
        return "float32" if info.float32_only else self.precision

    def rules_of(self, manifest: Manifest) -> Rules:
        """What the samples of a data set are held to, and decoded with."""
        return replace(manifest.rules, decoder=self.sweep.resources.decoder)

    @property
    def run_id(self) -> str:
        """Names what is asked for: the same request has the same id, wherever and however often it runs."""
        request = {
            "sweep": self.sweep.model_dump(exclude=_not_in_run_id(self.sweep)),
            "weights": {name: info.weights_sha256 for name, info in self.infos.items()},
            "data": {name: manifest.to_json() for name, manifest in self.manifests.items()},
            "device": [self.device_type, self.precision],
        }
        return f"{self.sweep.name}-{hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]}"

    def banks(self) -> Iterator[BankSpec]:
        """Every bank that a study reads, once."""
        yield from {bank.key: bank for study in self.studies for bank in study.specs}.values()

    def source(self, dataset: str, split: str) -> Source:
        """The shards of a split."""
        return _source(self, self.manifests[dataset], split)

    def shard_list(self, manifest: Manifest, split: str) -> ShardList:
        """The shards of a split as the keys of its banks hash them: one list for all of these."""
        name = (manifest.dataset, split)
        if name not in self._shard_lists:
            self._shard_lists[name] = ShardList((shard.file, shard.sha256, shard.samples) for shard in manifest.split(split).shards)
        return self._shard_lists[name]

    def splits_read(self, dataset: str) -> set[str]:
        """The splits of a data set that the studies read and that are not empty."""
        read = {bank.split for study in self.studies if study.undefined is None for bank in study.specs if bank.dataset == dataset}
        return {split for split in read if self.manifests[dataset].split(split).samples}

    def missing(self, store: BankStore | ReadParts) -> list[ShardWork]:
        """The work that no complete bank part answers yet: passes cut down to the readouts that are missing."""
        shards: dict[str, list[str]] = {}
        leased = {job.bank.key: job.bank for work in self.shard_work for one in work.passes for job in one.banks}
        for work in self.shard_work:
            for key in {job.bank.key for one in work.passes for job in one.banks}:
                shards.setdefault(key, []).append(work.shard.file)
        complete = {key: store.complete(bank, shards[key]) for key, bank in leased.items()}
        todo = []
        for work in self.shard_work:
            passes = []
            for encoder_pass in work.passes:
                banks = tuple(job for job in encoder_pass.banks if work.shard.file not in complete[job.bank.key])
                if banks:
                    passes.append(replace(encoder_pass, banks=banks))
            if passes:
                todo.append(replace(work, passes=tuple(passes)))
        return todo


def make_plan(
    sweep: Sweep,
    base: Path,
    device_type: str,
    precision: Precision,
    *,
    specs: Mapping[str, EncoderSpec] | None = None,
    info_of: Callable[[EncoderSpec], EncoderInfo] = describe,
) -> Plan:
    """What `sweep` asks for; of the encoders `specs`, by name, in place of those that it lists, if given, of which `info_of` says what they are.

    Raises RequestError where the sweep asks for what cannot be.
    """
    tasks, manifests = select(sweep.tasks, sweep.shards, sweep.protocol)
    tasks = with_metrics(tasks, sweep.metrics, {pattern.partition("@")[0] for pattern in sweep.tasks})
    encoders = _encoder_specs(sweep, base) if specs is None else dict(specs)
    infos = {name: info_of(spec) for name, spec in encoders.items()}
    plan = Plan(sweep=sweep, encoders=encoders, infos=infos, manifests=manifests, studies=[], device_type=device_type, precision=precision)
    for info in infos.values():
        suited = {(task.name, task.protocol.name): task for task in (_suited(candidate, info) for candidate in tasks)}
        plan.studies += [_study(plan, info, task, manifests_by_role(task, manifests)) for task in suited.values()]
    plan.shard_work = list(_shard_work(plan))
    return plan


def _encoder_specs(sweep: Sweep, base: Path) -> dict[str, EncoderSpec]:
    specs: dict[str, EncoderSpec] = {}
    for entry in sweep.encoders:
        spec = EncoderSpec.parse(entry, base=base)
        if spec.name in specs:
            raise RequestError(f"encoders: expected names that differ, got {spec.name!r} twice; give one of them a `name`")
        specs[spec.name] = spec
    return specs


def _suited(task: Task, info: EncoderInfo) -> Task:
    """The task, or what stands in for it where the encoder cannot see its view."""
    return task.instead if task.instead is not None and _refusal(task, info) else task


def _refusal(task: Task, info: EncoderInfo) -> str | None:
    return task.view.alteration.refuses(info) if task.view.alteration is not None else None


def _study(plan: Plan, info: EncoderInfo, task: Task, manifests: Mapping[str, Manifest]) -> StudyPlan:
    """`manifests` by role."""
    for role in ("train", "test"):
        if role not in manifests and (role == "test" or task.probe.needs_train):
            manifest = plan.manifests[task.dataset if role == "test" else task.train_dataset or task.dataset]
            split, splits = split_of(role, task), ", ".join(manifest.splits)
            raise RequestError(
                f"{task.name}: expected a split {split!r} in {manifest.dataset}, got {splits}; name one of its splits so in its manifest.json"
            )
    refusal = _refusal(task, info)
    reasons = {readout: refusal or unavailable(parse_readout(readout), info) for readout in task.readouts}
    readouts = [readout for readout, reason in reasons.items() if reason is None]
    if reason := task.probe.refuses(task.protocol.fields, info, _samples(manifests.get("train"))):
        reasons |= dict.fromkeys(task.readouts, reason)
        readouts = []
    readouts = readouts if task.chooses_readout else readouts[:1]
    roles, selected_on = roles_of(task, readouts, manifests)
    _refuse_empty_splits(task, [role for role in roles if not role.startswith(POOLED)] if readouts else [], manifests)
    return StudyPlan(
        encoder=info,
        task=task,
        banks={role: {readout: _bank(plan, info, task, readout, manifests[role], role) for readout in readouts} for role in roles},
        sources={role: _source(plan, manifests[role], role) for role in roles} if task.feed == "streamed" else {},
        selected_on=selected_on,
        undefined=None if readouts else refusal or "; ".join(f"{readout}: {reason}" for readout, reason in reasons.items()),
    )


def _refuse_empty_splits(task: Task, roles: Sequence[str], manifests: Mapping[str, Manifest]) -> None:
    """Raises RequestError for a split that a study needs and of which the manifest has no samples."""
    for role in roles:
        split, manifest = split_of(role, task), manifests[role]
        if not manifest.split(split).samples:
            spared = (
                "; take it out of manifest.json, and heads are chosen on a tenth of train" if role == "val" else "; build it, or leave the task out"
            )
            raise RequestError(f"{task.name}: expected samples in the split {split!r} of {manifest.dataset}, got 0{spared}")


def _samples(manifest: Manifest | None) -> int:
    """Those of train; 0 where there is none."""
    return manifest.split("train").samples if manifest is not None and "train" in manifest.splits else 0


def _source(plan: Plan, manifest: Manifest, split: str) -> Source:
    shards = manifest.split(split).shards
    return Source(shards=tuple((shard_url(plan.sweep.shards, manifest.dataset, shard), shard) for shard in shards), rules=plan.rules_of(manifest))


def _not_in_run_id(sweep: Sweep) -> dict[str, Any]:
    """What of a sweep is in no run's id: beside `NOT_IN_RUN_ID`, fields that came later and say nothing, so that ids stay."""
    resources = {*NOT_IN_RUN_ID["resources"], *(("decoder",) if sweep.resources.decoder == "pillow" else ())}
    return {**NOT_IN_RUN_ID, "resources": resources, **({} if sweep.metrics else {"metrics": True})}


def _decoder(decoder: Decoder) -> dict[str, str]:
    """What of a bank's identity says which other package than Pillow decoded it."""
    version_of_it = decoder_version(decoder)
    return {} if version_of_it is None else {"decoder": f"{decoder} {version_of_it}"}


@functools.cache
def _versions() -> Mapping[str, str]:
    return {package: version(package) for package in _HASHED_PACKAGES}


def _bank(plan: Plan, info: EncoderInfo, task: Task, readout: str, manifest: Manifest, role: str) -> BankSpec:
    resources, view, split = plan.sweep.resources, view_of(task, role), split_of(role, task)
    identity: dict[str, Any] = {
        "weights_sha256": info.weights_sha256,
        "architecture": info.architecture,
        "family": info.family,
        "notes": info.notes,
        "preprocessing": asdict(info.preprocessing),
        "fit": view.fit,
        "precision": plan.precision_of(info),
        "batch_size": resources.batch_size,
        "threads": resources.threads,
        "device_type": plan.device_type,
        "extraction_version": EXTRACTION_VERSION,
        **({"memory_format": "channels_last"} if info.channels_last else {}),
        **_decoder(resources.decoder),
        **manifest.decoding,
        **_versions(),
    }
    if task.feed == "streamed":
        identity |= {"task": task.name, "protocol": task.protocol.fields.to_json(), "seed": plan.sweep.search.seed, "stream_version": STREAM_VERSION}
        readout = "stream"  # one pass gives all readouts
    return BankSpec(
        dataset=manifest.dataset,
        split=split,
        shards=plan.shard_list(manifest, split),
        readout=readout,
        view=view.identity,
        identity=tuple(sorted(identity.items())),
    )


def _shard_work(plan: Plan) -> Iterator[ShardWork]:
    """One piece of work per shard: every pass that any study needs, once per encoder and distinct view."""
    passes_of: dict[tuple[str, str], dict[tuple[str, str], tuple[View, dict[str, BankSpec]]]] = {}
    for study in plan.studies:
        for role, banks in study.banks.items() if study.task.feed == "banked" else ():
            view = view_of(study.task, role)
            for readout, bank in banks.items():
                passes = passes_of.setdefault((bank.dataset, bank.split), {})
                _, jobs = passes.setdefault((study.encoder.name, view.identity), (view, {}))
                jobs[readout] = bank
    for (dataset, split), passes in passes_of.items():
        manifest = plan.manifests[dataset]
        whole = tuple(
            Pass(
                encoder=encoder,
                view=view,
                banks=tuple(BankJob(readout=readout, bank=bank.leased) for readout, bank in jobs.items()),
                precision=plan.precision_of(plan.infos[encoder]),
            )
            for (encoder, _), (view, jobs) in passes.items()
        )
        for shard in manifest.split(split).shards:
            yield ShardWork(
                dataset=dataset,
                split=split,
                url=shard_url(plan.sweep.shards, dataset, shard),
                shard=shard,
                rules=plan.rules_of(manifest),
                passes=whole,
            )
