"""Heads that are trained and scored while images stream through their encoder: one pass over train serves all heads of a stack.

The feed owns its encoder, keeps a checkpoint of what is being trained, and publishes the account of every shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.core import Encoder, Metric, Predictions, Proposal, Rows, Scorer, State, StreamSetting
from harness.data.epochs import Epoch, merged
from harness.data.shards import ShardAudit, Source, label_and_group, read_records
from harness.encoders import EncoderSpec, load
from harness.errors import ProbeError, RunError, ShardError, is_of_the_place
from harness.features.bank import BankStore
from harness.features.device import Compute, Precision
from harness.features.rows import hold_out
from harness.probes import stream_probe
from harness.probes.lib.streaming import PaddedEncoder
from harness.search.halving import Done, RungJob, RungResult
from harness.search.head_store import HeadStore
from harness.search.propose import HeadScore
from harness.search.stream_account import StreamAccount
from harness.search.study import BankRef, Candidate, Predicted, Study
from harness.search.training import Checkpoint, Training, source_of, stream_of, train_ref


class StreamFeed:
    """Feeds studies in one precision; keeps the encoder that it loaded last."""

    def __init__(
        self,
        store: BankStore,
        compute: Compute,
        *,
        load_encoder: Callable[[EncoderSpec], Encoder] = load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load_encoder` gives encoders on the CPU; `clock` says when a checkpoint is due."""
        self._store, self._heads = store, HeadStore(store)
        self._compute, self._clock, self._load_encoder = compute, clock, load_encoder
        self._loaded: tuple[EncoderSpec, Encoder] | None = None
        self._held_out: dict[str, frozenset[str]] = {}

    @property
    def precision(self) -> Precision:
        """What its encoder computes in."""
        return self._compute.precision

    def stacks(self, proposals: Sequence[Proposal]) -> list[list[int]]:
        """Positions in `proposals`: all of them are one stack, since one pass of the encoder serves them all."""
        return [list(range(len(proposals)))]

    def candidates(self, study: Study, index: int, proposals: Sequence[Proposal]) -> list[Candidate]:
        """Train one stack on the train stream, and score every head on the selection split.

        Publishes the accounts of both. Raises HarnessError where the stream cannot be trained on.
        """
        training, setting = self._training(study, proposals, Checkpoint.of(self._store, study, index))
        try:
            training.run()
        except ProbeError:
            account = StreamAccount.of_training(training.progress, setting.encoder)
            if account.audits and not any(audit.seen for audit in account.audits):  # a record of this study says why
                account.publish(self._store, train_ref(study))
            raise
        fitted, account = training.trainer.fitted(), StreamAccount.of_training(training.progress, setting.encoder)
        self._heads.note_labels(study, index, training.progress.labels)
        del training  # room for the heads that are scored
        merits, lost = self._merits(study, proposals, fitted)
        merged(account.audits, lost)
        account.publish(self._store, train_ref(study))
        return [
            Candidate(value=value, error=error, state={} if value is None else state) for state, (value, error) in zip(fitted, merits, strict=True)
        ]

    def clear(self, study: Study, index: int) -> None:
        """Discard the checkpoint of a round whose heads are published."""
        Checkpoint.of(self._store, study, index).discard()

    def predictions(self, study: Study, head: HeadScore, state: State, test: BankRef) -> Predicted:
        """The head on the test stream, as it is: no refit. Raises ProbeError where it diverged; publishes the account of test."""
        probe, setting = stream_probe(study.probe), replace(self._setting(study), scored_classes=len(study.counterparts))
        epoch = Epoch(source=source_of(test), threads=stream_of(study).decode_threads)
        parts: list[Predictions] = []
        for (part,) in predicted(probe.scorer(setting, [(head.readout, state)]), epoch, probe.together(setting)):
            if isinstance(part, ProbeError):
                raise part
            parts.append(part)
        self._publish_account(test, epoch, setting)
        return Predicted(predictions=_joined(parts) if parts else None, trained=self._heads.labels(study, head.round))

    # --- successive halving -------------------------------------------------------------------------------------------

    def rung(self, study: Study, index: int, proposal: Proposal, job: RungJob) -> RungResult:
        """Train one head of a round to the end of a rung, from where the rung below it ended, and score it on the selection split."""
        training, setting, error = self._trained(study, index, job.head, proposal, job.epochs)
        progress = training.progress
        account = {
            "audits": progress.audits,
            "lost": {},
            "starts": progress.starts - job.rung,  # each rung begins with what the one below it left
            "images": progress.images + setting.encoder.images,
            "seconds": progress.seconds + setting.encoder.seconds,
        }
        if error is not None:
            return RungResult(value=None, error=error, epochs=progress.epoch, account=account)
        fitted = training.trainer.fitted()
        del training  # room for the one that is scored
        ((value, error),), account["lost"] = self._merits(study, [proposal], fitted)
        return RungResult(value=value, error=error, epochs=job.epochs, account=account)

    def has_checkpoint(self, study: Study, index: int, head: int) -> bool:
        """Whether a head was trained since the round's heads were last published."""
        return Checkpoint.of(self._store, study, index, head).exists()

    def network(self, study: Study, index: int, head: int, proposal: Proposal, epochs: int) -> State:
        """The whole network of a head at its end; what the cache has lost is trained again, to the same bits."""
        training, _, _ = self._trained(study, index, head, proposal, epochs)
        self._heads.note_labels(study, index, training.progress.labels)  # the same for all heads: they saw the same images
        state: State = training.trainer.fitted()[0]
        return state

    def end_rungs(self, study: Study, index: int, done: Done) -> None:
        """Publish the account of train in all the rungs of a round whose heads are published, and discard their checkpoints."""
        StreamAccount.of_rungs(done).publish(self._store, train_ref(study))
        for head in sorted({head for _, head in done}):
            Checkpoint.of(self._store, study, index, head).discard()

    def _trained(self, study: Study, index: int, head: int, proposal: Proposal, epochs: int) -> tuple[Training, StreamSetting[Any], str | None]:
        """One head at the end of so many epochs, and why it did not come to that end, if so."""
        training, setting = self._training(study, [proposal], Checkpoint.of(self._store, study, index, head))
        training.until = epochs
        try:
            training.run()
        except ProbeError as error:
            return training, setting, str(error)
        return training, setting, None

    # --- training -----------------------------------------------------------------------------------------------------

    def _training(self, study: Study, proposals: Sequence[Proposal], checkpoint: Checkpoint) -> tuple[Training, StreamSetting[Any]]:
        """The training of `proposals`, from where the checkpoint left it."""
        setting = self._setting(study)
        trainer = stream_probe(study.probe).trainer(setting, proposals)
        _summed(study)  # refused before anything is trained
        training = Training(
            study=study,
            source=source_of(train_ref(study)),
            held=self.held_out(study),
            trainer=trainer,
            progress=checkpoint.resume(proposals, trainer),
            save=lambda progress: checkpoint.save(progress, trainer, setting.encoder),
            clock=self._clock,
        )
        return training, setting

    def held_out(self, study: Study) -> frozenset[str]:
        """Keys of the stratified tenth of train that heads are chosen on; none where there is a val split."""
        if not study.holds_out:
            return frozenset()
        ref = train_ref(study)
        if ref.bank.key not in self._held_out:
            first: dict[str, tuple[int | None, str]] = {}
            for key, label, group in labels_of(source_of(ref)):
                first.setdefault(key, (label, group))
            targets = np.array([-1 if label is None else label for label, _ in first.values()], np.int64)
            groups = [group for _, group in first.values()]
            rows = Rows(keys=list(first), groups=groups, targets=targets, features=np.zeros((len(first), 0), np.float32))
            self._held_out[ref.bank.key] = frozenset(hold_out(rows, seed=study.seed)[1].keys)
        return self._held_out[ref.bank.key]

    # --- selection ----------------------------------------------------------------------------------------------------

    def _merits(
        self, study: Study, proposals: Sequence[Proposal], fitted: Sequence[State]
    ) -> tuple[list[tuple[float | None, str | None]], dict[str, dict[str, str]]]:
        """Each head's value on the selection split, or why it has none, and what of train was lost on the way (shard to key to reason).

        Publishes the account of val.
        """
        setting, probe = self._setting(study), stream_probe(study.probe)
        scorer = probe.scorer(setting, [(readout, state) for (readout, _), state in zip(proposals, fitted, strict=True)])
        ref = train_ref(study) if study.holds_out else next(iter(study.val.values()))
        held_out = self.held_out(study)
        epoch = Epoch(source=source_of(ref), threads=stream_of(study).decode_threads)
        if study.holds_out:
            epoch.belongs = held_out.__contains__
        chosen_by = _summed(study)
        sums: list[np.ndarray | None] = [None] * len(proposals)
        errors: list[str | None] = [None] * len(proposals)
        for batch in predicted(scorer, epoch, probe.together(setting)):
            for number, predictions in enumerate(batch):
                if isinstance(predictions, ProbeError):
                    errors[number] = str(predictions)
                    continue
                counts, before = chosen_by.counts(predictions, study.classes).sum(axis=0), sums[number]
                sums[number] = counts if before is None else before + counts
        merits = [study.merit(total) if error is None else (None, error) for total, error in zip(sums, errors, strict=True)]
        if study.holds_out:
            return merits, epoch.lost_of
        self._publish_account(ref, epoch, setting)
        return merits, {}

    # --- what all need ------------------------------------------------------------------------------------------------

    def _setting(self, study: Study) -> StreamSetting[Any]:
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

    def _publish_account(self, ref: BankRef, epoch: Epoch, setting: StreamSetting[Any]) -> None:
        """Of a stream that was scored."""
        encoder = setting.encoder
        StreamAccount(audits=epoch.audits, images=encoder.images, seconds=encoder.seconds, starts=1).publish(self._store, ref)


def _summed(study: Study) -> Metric:
    """What heads are chosen by: its counts are summed batch by batch. Raises ProbeError where they cannot be."""
    if not study.searched.additive:
        raise ProbeError(
            f"{study.searched.name}: expected a metric whose counts may be summed over batches, to choose heads on a stream; choose by another one"
        )
    return study.searched


def predicted(scorer: Scorer[Any], epoch: Epoch, batch_size: int) -> Iterable[list[Predictions | ProbeError]]:
    """Predictions of every head, some samples at a time."""
    keys: list[str] = []
    batch: list[Any] = []
    for sample in epoch.read(scorer.view):
        keys.append(sample.key)
        batch.append(sample.value)
        if sum(map(scorer.inputs, batch)) >= batch_size:
            yield scorer.predict(keys, batch)
            keys, batch = [], []
    if batch:
        yield scorer.predict(keys, batch)


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
