"""Classifiers among the trained probes: what tells an item's class, from rows of banks or from a stream of images.

Shape legend: N rows, B batch, D features, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from harness.core import Passes, Predictions, Proposal, Reading, Rows, Sample, State, StreamProbe, StreamSetting
from harness.errors import ProbeError
from harness.probes.fields import learning_rates
from harness.probes.heads import AnnealedFields, Examples, Head, HeadStack, NormedFields, TrainedProbe, copied
from harness.probes.lib.augmented import CropFields
from harness.probes.lib.features import CHUNK_ROWS, Features, Normaliser, checked_features, checked_targets, on_device
from harness.probes.lib.pictures import Pictured, Pictures, Pooled
from harness.probes.lib.schedule import annealed
from harness.probes.lib.softmax import most_probable


class ClassifierFields(NormedFields, AnnealedFields):
    """Of a classifier of feature rows. Defaults: the linear probe of Zhu et al., TMLR 2023 (arXiv 2301.11915)."""


A = TypeVar("A", bound=AnnealedFields)


@dataclass(frozen=True, kw_only=True)
class ClassifierProbe(TrainedProbe[A], StreamProbe[A]):
    """A trained probe that tells an item's class, from feature rows [N, D] unless it says otherwise, banked or streamed."""

    def checked(self, rows: Rows, width: int | None = None) -> Features:
        """The features. Raises ProbeError where they are of another shape or width, or not finite."""
        return checked_features(self.name, rows, width=width)

    def inputs(self, features: torch.Tensor, normaliser: Normaliser, device: torch.device) -> torch.Tensor:
        """What a head sees of features [B, ...]."""
        return normaliser(features.to(device))

    def target(self, labels: torch.Tensor, classes: int, device: torch.device) -> Any:
        """What a head compares its outputs with, of classes, int64 [B]."""
        return labels.to(device)

    def rows_at_once(self, fields: A) -> int:
        """Banked rows that are predicted in one go."""
        return CHUNK_ROWS

    def factor(self, step: int, steps: int, fields: A) -> float:
        """A cosine to 0."""
        return annealed(step, steps, epochs=fields.epochs, anneal=fields.anneal)

    def examples(self, rows: Rows, classes: int, fields: A, device: torch.device) -> Examples:
        features, labels = self.checked(rows), checked_targets(self.name, rows, classes)
        normaliser = Normaliser.fit(fields.norm, features, device)
        features = on_device(features, device)

        def batch(chosen: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return self.inputs(features[chosen.to(features.device)], normaliser, device), self.target(labels[chosen], classes, device)

        return Examples(width=features.shape[-1], normaliser=normaliser, batch=batch)

    def predict(self, stack: HeadStack[A], rows: Rows, head: int) -> Predictions:
        """The most probable class of each row (the lowest of equals) and its probability."""
        features, size = self.checked(rows, self.head.shape(stack.heads[head].tensors())[0]), self.rows_at_once(stack.fields)
        parts = [self.probabilities(stack, features[start : start + size], head).cpu() for start in range(0, len(rows), size)]
        return most_probable(rows, torch.cat(parts))

    @torch.inference_mode()
    def probabilities(self, stack: HeadStack[A], features: torch.Tensor, head: int) -> torch.Tensor:
        """float32 [B, C] of features [B, ...], on the head's device. Raises ProbeError where the head's training diverged."""
        fitted = stack.heads[head]
        probabilities = fitted.logits(self.inputs(features, stack.normaliser, fitted.device)).softmax(dim=1)
        if not (fitted.is_finite() and bool(probabilities.isfinite().all())):
            raise stack.diverged(head)
        return probabilities

    def trainer(self, setting: StreamSetting[A], proposals: Sequence[Proposal]) -> StreamedHeads[A]:
        return StreamedHeads(self, setting, proposals)

    def scorer(self, setting: StreamSetting[A], heads: Sequence[tuple[str, State]]) -> StreamedPredictions[A]:
        return StreamedPredictions(self, setting, heads)

    def passes(self, fields: A, reading: Reading) -> Passes:
        """Every epoch is a pass over train, for all heads at once."""
        trained = fields.epochs * reading.train
        return Passes(decoded=trained + reading.read_to_choose, encoded=trained + reading.chosen_on)


class StreamedHeads(Generic[A]):
    """A classifier's heads in training, for all readouts at once; they share each batch's features and nothing else."""

    def __init__(self, probe: ClassifierProbe[A], setting: StreamSetting[A], proposals: Sequence[Proposal]) -> None:
        self._probe, self._setting, self._proposals = probe, setting, list(proposals)
        self._fields = setting.protocol
        self._pictures, self._normaliser = Pictures(setting, CropFields.of(setting.protocol)), Normaliser(kind=self._fields.norm)
        self._rates = learning_rates(probe.name, [rate for _, rate in proposals])
        self._pooled = Pooled(setting.encoder, [readout for readout, _ in proposals])
        self._heads: tuple[Head[A, Any], ...] = ()
        self.batch_size = self._fields.batch_size
        self.epochs: int | None = self._fields.epochs

    def steps(self, per_epoch: int) -> int:
        return self._fields.epochs * per_epoch

    def draw(self, sample: Sample, generator: np.random.Generator) -> Pictured:
        """A random crop, or the encoder's own view where the protocol says so."""
        return self._pictures.drawn(sample, generator)

    def step(self, batch: Sequence[Pictured], step: int, steps: int) -> None:
        """One step of every head."""
        setting, device = self._setting, self._setting.encoder.device
        inputs = {name: self._probe.inputs(features, self._normaliser, device) for name, features in self._pooled(batch).items()}
        self._start({name: rows.shape[-1] for name, rows in inputs.items()})
        target = self._probe.target(torch.tensor([picture.target for picture in batch]), setting.classes, device)
        factor = self._probe.factor(step, steps, self._fields)
        for head, (readout, _), rate in zip(self._heads, self._proposals, self._rates, strict=True):
            head.step(inputs[readout], target, rate * factor, (setting.seed, step))

    def state(self) -> list[dict[str, torch.Tensor]]:
        return [head.state() for head in self._heads]

    def load(self, states: Sequence[State]) -> None:
        self._start({readout: self._probe.head.shape(state)[0] for (readout, _), state in zip(self._proposals, states, strict=True)})
        for head, state in zip(self._heads, states, strict=True):
            head.load(state)

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        stack = HeadStack(
            probe=self._probe, fields=self._fields, rates=self._rates, heads=self._heads, normaliser=self._normaliser, seed=self._setting.seed
        )
        return [stack.state(number) for number in range(len(self._heads))]

    def _start(self, widths: Mapping[str, int]) -> None:
        """Make the heads, as the banked probe does for each readout."""
        if not self._heads:
            self._heads = tuple(self._fresh(widths[readout]) for readout, _ in self._proposals)

    def _fresh(self, width: int) -> Head[A, Any]:
        setting, head = self._setting, self._probe.head
        drawn = head.drawn(width, setting.classes, self._fields, torch.Generator().manual_seed(setting.seed))
        return head(copied(drawn, setting.encoder.device), self._fields)


class StreamedPredictions(Generic[A]):
    """A classifier's fitted heads on the encoder's own resize and centre crop."""

    def __init__(self, probe: ClassifierProbe[A], setting: StreamSetting[A], heads: Sequence[tuple[str, State]]) -> None:
        self._probe, self._pictures = probe, Pictures(setting, CropFields.of(setting.protocol))
        self._pooled = Pooled(setting.encoder, [readout for readout, _ in heads])
        how: dict[str, Any] = {"classes": setting.classes, "protocol": setting.protocol, "seed": setting.seed, "device": setting.encoder.device}
        self._stacks = [(readout, probe.restore(state, None, **how)) for readout, state in heads]

    def view(self, sample: Sample) -> Pictured:
        return self._pictures.plain(sample)

    def inputs(self, example: Pictured) -> int:
        return 1

    def predict(self, keys: Sequence[str], batch: Sequence[Pictured]) -> list[Predictions | ProbeError]:
        """One a head; all of `batch` is one batch, where the protocol normalises by a test batch's statistics."""
        pooled = self._pooled(batch)
        rows = Rows(
            keys=keys,
            groups=[picture.group for picture in batch],
            targets=np.array([picture.target for picture in batch], np.int64),
            features=np.zeros((len(batch), 0), np.float32),
        )
        return [self._predicted(stack, rows, pooled[readout]) for readout, stack in self._stacks]

    def _predicted(self, stack: HeadStack[A], rows: Rows, features: torch.Tensor) -> Predictions | ProbeError:
        try:
            return most_probable(rows, self._probe.probabilities(stack, features, 0).cpu())
        except ProbeError as error:
            diverged = error
        try:  # it may be the features and not the head
            self._probe.checked(replace(rows, features=features.cpu().numpy()))
        except ProbeError as error:
            return error
        return diverged
