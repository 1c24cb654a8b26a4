"""What a trial does that streams its images: one encoder pass over train serves all heads of the stack, then one over the selection split.

It owns its encoder, keeps a checkpoint, and publishes the account of every shard as a bank part without rows, so that the ledger and the records
treat a stream as they treat a bank. `run_round` is given no test split, and `score` trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import fsspec
import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from harness.core import Encoder, Metric, Predictions, Proposal, Rows, Scorer, State, StreamEncoder, StreamSetting, Trainer
from harness.data.epochs import Epoch, merged
from harness.data.shards import ShardAudit, Source, label_and_group, read_records
from harness.encoders import EncoderSpec, load
from harness.errors import HarnessError, ProbeError, RunError, ShardError, is_of_the_place
from harness.features.bank import BankStore, PartRows, Receipt
from harness.features.device import Compute, Precision
from harness.features.rows import hold_out
from harness.probes import stream_probe
from harness.probes.lib.streaming import PaddedEncoder
from harness.search.halving import Halving, RungJob, RungResult
from harness.search.propose import HeadScore
from harness.search.study import BankRef, Round, Score, Study, StudyRunner, labels_place, scored
from harness.search.training import Position, Training, stream_of, worst_of


class StreamedRunner:
    """Runs rounds and scores of streamed studies in one process; keeps the encoder that it loaded last."""

    def __init__(
        self, cache: str, compute: Compute, clock: Callable[[], float] = time.monotonic, *, load_encoder: Callable[[EncoderSpec], Encoder] = load
    ) -> None:
        self._store = BankStore(cache)
        self._heads = StudyRunner(cache, compute.device)
        self._compute = compute
        self._clock = clock
        self._load_encoder = load_encoder
        self._loaded: tuple[EncoderSpec, Any] | None = None
        self._held: dict[str, frozenset[str]] = {}

    def run_round(self, study: Study, index: int, proposals: Sequence[Proposal]) -> Round:
        """Train `proposals` (readout, learning rate) as one stack on the train stream, and score every head on the selection split."""
        halving = Halving.planned(study.probe, study.protocol, index, proposals)
        if halving is not None:
            return self._run_halving(study, index, halving)
        start = time.perf_counter()
        states: dict[str, torch.Tensor] = {}
        try:
            fitted, train = self._train(study, index, proposals)
            self._note_labels(study, index, train.labels)
            values = self._select(study, proposals, fitted, train)
            for number, state in enumerate(fitted):
                states |= {f"{number}/{name}": tensor.contiguous() for name, tensor in state.items() if values[number][0] is not None}
        except HarnessError as error:
            if is_of_the_place(error):
                raise  # no answer: to be tried again
            values = [(None, str(error)) for _ in proposals]
        self._publish(study, index, states)
        self._store.discard(*_checkpoint(study, index))
        heads = tuple(
            HeadScore(round=index, head=number, lr=rate, readout=readout, value=value, error=error)
            for number, ((readout, rate), (value, error)) in enumerate(zip(proposals, values, strict=True))
        )
        return Round(index=index, heads=heads, seconds=time.perf_counter() - start)

    def score(self, study: Study, chosen: HeadScore, held_back: BankRef) -> Score:
        """The chosen head on the test stream, as it is: no refit."""
        start = time.perf_counter()
        setting = replace(self._setting(study), scored_classes=len(study.counterparts))
        scorer = stream_probe(study.probe).scorer(setting, [(chosen.readout, self._heads.state(study, chosen))])
        epoch = Epoch(source=_source(held_back), threads=stream_of(study).decode_threads)
        found: list[Predictions] = []
        for (one,) in predictions_of(scorer, epoch, stream_probe(study.probe).together(setting)):
            if isinstance(one, ProbeError):
                raise one
            found.append(one)
        self._account(held_back, epoch.audits, setting.encoder, starts=1)
        score = scored(study, chosen, _joined(found) if found else None, self._heads.trained(study, chosen))
        return replace(score, seconds=time.perf_counter() - start)

    @property
    def precision(self) -> Precision:
        """What its encoder computes in."""
        return self._compute.precision

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self, study: Study, index: int, proposals: Sequence[Proposal]) -> tuple[list[dict[str, torch.Tensor]], _Account]:
        """What each head is scored from, and the account of train."""
        setting = self._setting(study)
        trainer = stream_probe(study.probe).trainer(setting, proposals)
        training = self._training(study, setting, trainer, proposals, _checkpoint(study, index))
        try:
            training.run()
        except ProbeError:
            account = _account_of(training.progress, setting.encoder)
            if account.audits and not any(audit.seen for audit in account.audits):  # a record of this study says why
                account.publish(self._store, _any(study.train))
            raise
        return trainer.fitted(), _account_of(training.progress, setting.encoder)

    def _training(
        self, study: Study, setting: StreamSetting, trainer: Trainer[Any], proposals: Sequence[Proposal], place: tuple[str, str]
    ) -> Training:
        """The training of `proposals`, to be gone on with where the checkpoint in `place` left it."""
        _summed(study)  # said before anything is trained
        return Training(
            study=study,
            source=_source(_any(study.train)),
            held=self.held_out(study),
            trainer=trainer,
            progress=self._resumed(place, proposals, trainer),
            save=lambda progress: self._save(place, progress, trainer, setting.encoder),
            clock=self._clock,
        )

    def _resumed(self, place: tuple[str, str], proposals: Sequence[Proposal], trainer: Trainer[Any]) -> Position:
        """Where the checkpoint says that this very training is, the heads being brought there; the beginning, where there is none."""
        fresh = Position(proposals=[list(one) for one in proposals], starts=1)
        data = self._store.read_bytes(*place)
        if data is None:
            return fresh
        tensors = load_tensors(data)
        progress = Position(**json.loads(bytes(tensors.pop("progress").tolist())))
        if progress.proposals != fresh.proposals:
            return fresh
        trainer.load([_of_head(tensors, number) for number in range(len(proposals))])
        return replace(progress, starts=progress.starts + 1)

    def _save(self, place: tuple[str, str], progress: Position, trainer: Trainer[Any], encoder: StreamEncoder) -> None:
        told = replace(progress, images=progress.images + encoder.images, seconds=progress.seconds + encoder.seconds)
        tensors = {f"{number}/{name}": tensor.contiguous() for number, state in enumerate(trainer.state()) for name, tensor in state.items()}
        tensors["progress"] = torch.tensor(list(json.dumps(asdict(told)).encode()), dtype=torch.uint8)
        self._store.publish(place, save_tensors(tensors), replace=True)

    def _publish(self, study: Study, index: int, states: State) -> None:
        """The states of a round's heads, each under its number: what a head is scored from."""
        self._store.publish(("studies", study.id, f"round-{index}.safetensors"), save_tensors(dict(states)), replace=True)

    def _note_labels(self, study: Study, index: int, labels: Sequence[int]) -> None:
        """Keep the labels that a round was trained on, for its score to tell which tested ones are not among them."""
        self._store.publish(labels_place(study, index), json.dumps(list(labels)).encode(), replace=True)

    def held_out(self, study: Study) -> frozenset[str]:
        """Keys of the stratified tenth of train that heads are chosen on; none where there is a val split."""
        if not study.holds_out:
            return frozenset()
        ref = _any(study.train)
        if ref.bank.key not in self._held:
            found: dict[str, tuple[int | None, str]] = {}
            for key, label, group in labels_of(_source(ref)):
                found.setdefault(key, (label, group))
            targets = np.array([-1 if label is None else label for label, _ in found.values()], np.int64)
            groups = [group for _, group in found.values()]
            rows = Rows(keys=list(found), groups=groups, targets=targets, features=np.zeros((len(found), 0), np.float32))
            self._held[ref.bank.key] = frozenset(hold_out(rows, seed=study.seed)[1].keys)
        return self._held[ref.bank.key]

    # --- successive halving -------------------------------------------------------------------------------------------

    def climb(self, study: Study, index: int, proposals: Sequence[Proposal], climb: RungJob) -> RungResult:
        """Train one head of a round on to the end of a rung, and score it on the selection split; known from then on, and not done again.

        The climbs of one rung may run in different processes that share the cache.
        """
        place, key = _climb(study, index, climb), {"proposal": list(proposals[climb.head])}
        data = self._store.read_bytes(*place)
        kept = None if data is None else json.loads(data)
        if kept is not None and kept["key"] == key:
            return RungResult.from_json(kept["climbed"])
        start = time.perf_counter()
        try:
            found = self._climbed(study, index, proposals[climb.head], climb)
        except HarnessError as error:
            if is_of_the_place(error):
                raise
            found = RungResult(value=None, error=str(error), epochs=0)
        found = replace(found, seconds=time.perf_counter() - start)
        self._store.publish(place, json.dumps({"key": key, "climbed": found.to_json()}).encode(), replace=True)
        return found

    def _run_halving(self, study: Study, index: int, halving: Halving) -> Round:
        """Climb what is not climbed yet, rung by rung; keep the networks of those that came to the end, and the account of train."""
        done: dict[tuple[int, int], RungResult] = {}
        while climbs := halving.open(done):
            for climb in climbs:
                done[climb.rung, climb.head] = self.climb(study, index, halving.proposals, climb)
        start = time.perf_counter()
        heads = halving.heads(done)
        finished = [head for head in heads if head.value is not None and not head.stopped]
        fresh = any(self._store.read_bytes(*_checkpoint(study, index, head.head)) is not None for head in finished)
        if fresh or not self._heads.has_state(study, index):
            self._publish(study, index, self._networks(study, index, halving, finished))
        self._account_of_climbs(study, done)
        for head in heads:
            self._store.discard(*_checkpoint(study, index, head.head))
        seconds = sum(one.seconds for one in done.values()) + time.perf_counter() - start
        return Round(index=index, heads=tuple(heads), seconds=seconds)

    def _climbed(self, study: Study, index: int, proposal: Proposal, climb: RungJob) -> RungResult:
        training, encoder, error = self._trained(study, index, climb.head, proposal, climb.epochs)
        progress = training.progress
        account = {
            "audits": progress.audits,
            "lost": {},
            "starts": progress.starts - climb.rung,  # each rung begins with what the one below it left
            "images": progress.images + encoder.images,
            "seconds": progress.seconds + encoder.seconds,
        }
        if error is not None:
            return RungResult(value=None, error=error, epochs=progress.epoch, account=account)
        fitted = training.trainer.fitted()
        del training  # room for the one that is scored
        ((value, error),), account["lost"] = self._measured(study, [proposal], fitted)
        return RungResult(value=value, error=error, epochs=climb.epochs, account=account)

    def _trained(self, study: Study, index: int, head: int, proposal: Proposal, epochs: int) -> tuple[Training, StreamEncoder, str | None]:
        """One head at the end of so many epochs, the encoder of its stream, and why it did not come to that end, if so."""
        setting = self._setting(study)
        trainer = stream_probe(study.probe).trainer(setting, [proposal])
        training = self._training(study, setting, trainer, [proposal], _checkpoint(study, index, head))
        training.until = epochs
        try:
            training.run()
        except ProbeError as error:
            return training, setting.encoder, str(error)
        return training, setting.encoder, None

    def _networks(self, study: Study, index: int, halving: Halving, finished: Sequence[HeadScore]) -> dict[str, torch.Tensor]:
        """The whole networks of those that came to the end; what the cache has lost is trained again, to the same bits."""
        states: dict[str, torch.Tensor] = {}
        for head in finished:
            training, _, _ = self._trained(study, index, head.head, halving.proposals[head.head], halving.ends[-1])
            states |= {f"{head.head}/{name}": tensor.contiguous() for name, tensor in training.trainer.fitted()[0].items()}
            self._note_labels(study, index, training.progress.labels)  # the same for all: they saw the same images
        return states

    def _account_of_climbs(self, study: Study, done: Mapping[tuple[int, int], RungResult]) -> None:
        """Publish what became of train: of every shard the worst of all heads' epochs."""
        last = {head: one.account for (_, head), one in sorted(done.items())}  # an account holds all that came before it
        worst: list[dict[str, Any]] = []
        for account in last.values():
            if account.get("audits"):
                worst = worst_of(worst, [ShardAudit(**audit) for audit in account["audits"]])
        audits = [ShardAudit(**audit) for audit in worst]
        merged(audits, next((account["lost"] for account in last.values() if account.get("lost")), {}))
        images, seconds, starts = ([account.get(name, 0) for account in last.values()] for name in ("images", "seconds", "starts"))
        _Account(audits=audits, images=sum(images), seconds=sum(seconds), starts=max(starts)).publish(self._store, _any(study.train))

    # --- selection ----------------------------------------------------------------------------------------------------

    def _select(self, study: Study, proposals: Sequence[Proposal], fitted: Sequence[State], train: _Account) -> list[tuple[float | None, str | None]]:
        """Each head's value on the selection split, or why it has none; publishes the accounts of train and of val."""
        values, lost = self._measured(study, proposals, fitted)
        merged(train.audits, lost)
        train.publish(self._store, _any(study.train))
        return values

    def _measured(
        self, study: Study, proposals: Sequence[Proposal], fitted: Sequence[State]
    ) -> tuple[list[tuple[float | None, str | None]], dict[str, dict[str, str]]]:
        """Each head's value, or why it has none, and what of train was lost on the way (shard to key to reason); publishes the account of val."""
        setting = self._setting(study)
        scorer = stream_probe(study.probe).scorer(setting, [(readout, state) for (readout, _), state in zip(proposals, fitted, strict=True)])
        ref = _any(study.train if study.holds_out else study.val)
        held = self.held_out(study)
        epoch = Epoch(source=_source(ref), threads=stream_of(study).decode_threads)
        if study.holds_out:
            epoch.wanted = held.__contains__
        chosen_by = _summed(study)
        sums: list[np.ndarray | None] = [None] * len(proposals)
        errors: list[str | None] = [None] * len(proposals)
        for batch in predictions_of(scorer, epoch, stream_probe(study.probe).together(setting)):
            for number, found in enumerate(batch):
                if isinstance(found, ProbeError):
                    errors[number] = str(found)
                    continue
                counts, before = chosen_by.counts(found, study.classes).sum(axis=0), sums[number]
                sums[number] = counts if before is None else before + counts
        values = [_value(study, total, error) for total, error in zip(sums, errors, strict=True)]
        if study.holds_out:
            return values, epoch.lost_of
        self._account(ref, epoch.audits, setting.encoder, starts=1)
        return values, {}

    # --- what both need -----------------------------------------------------------------------------------------------

    def _setting(self, study: Study) -> StreamSetting:
        stream = stream_of(study)
        if self._loaded is None or self._loaded[0] != stream.encoder:
            self._loaded = None  # room for the next one
            encoder = self._load_encoder(stream.encoder)
            encoder.module.to(self._compute.device)
            self._loaded = (stream.encoder, encoder)
        encoder = self._loaded[1]
        if encoder.info.weights_sha256 != stream.weights_sha256:
            raise RunError(
                f"encoder {stream.encoder.name}: expected weights {stream.weights_sha256[:12]}…, got {encoder.info.weights_sha256[:12]}…; "
                "its checkpoint has changed since the sweep began: run it again"
            )
        padded = PaddedEncoder(encoder, self._compute, stream.batch_size)
        return StreamSetting(encoder=padded, protocol=study.protocol, classes=study.classes, seed=study.seed)

    def _account(self, ref: BankRef, audits: Sequence[ShardAudit], encoder: StreamEncoder, *, starts: int) -> None:
        _Account(audits=list(audits), images=encoder.images, seconds=encoder.seconds, starts=starts).publish(self._store, ref)


@dataclass(kw_only=True)
class _Account:
    """What became of a stream's samples, and what that cost."""

    audits: list[ShardAudit]
    images: int
    seconds: float
    starts: int
    labels: tuple[int, ...] = ()
    """Those that were trained on."""

    def publish(self, store: BankStore, ref: BankRef) -> None:
        """As bank parts without rows; images and seconds are shared out by the shards' samples."""
        total = sum(audit.expected for audit in self.audits) or 1
        for audit in self.audits:
            share = audit.expected / total
            receipt = Receipt.of(
                audit,
                bank_key=ref.bank.key,
                attempts=self.starts,
                node=socket.gethostname(),
                rows=0,
                seconds=self.seconds * share,
                images=round(self.images * share),
            )
            store.write_part(ref.bank, PartRows(), receipt)


def _account_of(progress: Position, encoder: StreamEncoder) -> _Account:
    return _Account(
        audits=[ShardAudit(**audit) for audit in progress.audits],
        images=progress.images + encoder.images,
        seconds=progress.seconds + encoder.seconds,
        starts=progress.starts,
        labels=tuple(progress.labels),
    )


def outdated(store: BankStore, refs: Iterable[BankRef]) -> bool:
    """Whether the account of a stream is gone, or a shard of it that was not what its manifest says has been repaired since."""
    for ref in refs:
        for url, shard in _source(ref).shards:
            receipt = store.receipt(ref.bank, shard.file)
            if receipt is None:
                return True
            if receipt.status != "ok" and receipt.sha256 != shard.sha256 and _sha256(url) == shard.sha256:
                return True
    return False


def _sha256(url: str) -> str | None:
    """Digest of a file, or None where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with fsspec.open(url, "rb") as stream:
            while data := stream.read(1 << 20):
                digest.update(data)
    except Exception:  # each store has errors of its own
        return None
    return digest.hexdigest()


def _summed(study: Study) -> Metric:
    """What heads are chosen by: its counts are summed batch by batch. Raises ProbeError where they cannot be."""
    if not study.searched.additive:
        raise ProbeError(
            f"{study.searched.name}: expected a metric whose counts may be summed over batches, to choose heads on a stream; choose by another one"
        )
    return study.searched


def predictions_of(scorer: Scorer[Any], epoch: Epoch, batch_size: int) -> Iterable[list[Predictions | ProbeError]]:
    """Predictions of every head, some samples at a time."""
    keys: list[str] = []
    batch: list[Any] = []
    for one in epoch.read(scorer.view):
        keys.append(one.key)
        batch.append(one.value)
        if sum(map(scorer.inputs, batch)) >= batch_size:
            yield scorer.predict(keys, batch)
            keys, batch = [], []
    if batch:
        yield scorer.predict(keys, batch)


def _value(study: Study, total: np.ndarray | None, error: str | None) -> tuple[float | None, str | None]:
    if error is not None or total is None:
        return None, error or "the selection split has no such items"
    return study.merit(total)


def _joined(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(
        keys=[key for part in parts for key in part.keys],
        groups=[group for part in parts for group in part.groups],
        targets=np.concatenate([part.targets for part in parts]),
        predictions=np.concatenate([part.predictions for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
    )


def labels_of(source: Source) -> Iterable[tuple[str, int | None, str]]:
    """(key, label, group) of every record, without decoding an image; of a shard that cannot be read, of those before."""
    for url, shard in source.shards:
        audit = ShardAudit(shard=shard.file, expected=shard.samples)
        try:
            for key, members in read_records(url, shard, source.rules, audit):
                label, group = label_and_group(members)
                yield key, label, group or key
        except ShardError as error:
            if is_of_the_place(error):
                raise  # another part of train would be held out


def _of_head(tensors: State, number: int) -> dict[str, torch.Tensor]:
    prefix = f"{number}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _checkpoint(study: Study, index: int, head: int | None = None) -> tuple[str, str]:
    """In the folder of the train stream, so that what discards its accounts discards this. Of one head, where each is trained alone."""
    return _any(study.train).bank.key, f"checkpoint-{study.id}-{index}{'' if head is None else f'-{head}'}.safetensors"


def _climb(study: Study, index: int, climb: RungJob) -> tuple[str, str]:
    """How a climb went, beside the checkpoints; it stays when the round is over."""
    return _any(study.train).bank.key, f"climb-{study.id}-{index}-{climb.rung}-{climb.head}.json"


def _any(refs: Mapping[str, BankRef]) -> BankRef:
    """All readouts of a stream come out of one."""
    return next(iter(refs.values()))


def _source(ref: BankRef) -> Source:
    if ref.source is None:
        raise ProbeError(f"stream {ref.bank.key}: expected its shards, got none; this study reads banks")
    return ref.source
