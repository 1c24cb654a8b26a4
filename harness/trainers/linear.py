"""The linear probe on a stream.

Shape legend: B images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.functional import one_hot

from harness.core import Predictions, Rows, Sample
from harness.errors import ProbeError
from harness.probes import linear
from harness.probes.augmented import AugmentedFields
from harness.probes.features import Normaliser
from harness.probes.fields import learning_rates
from harness.probes.linear import LinearFields
from harness.probes.pictures import Pictured, Pictures, Pooled
from harness.probes.schedule import annealed
from harness.probes.softmax import SoftmaxStack, restored
from harness.probes.streaming import Proposal, Setting, State


class LinearTrainer:
    """The linear probe's heads, for all readouts at once."""

    def __init__(self, setting: Setting, proposals: Sequence[Proposal]) -> None:
        self._fields = LinearFields.read(linear.NAME, setting.protocol)
        own = AugmentedFields.read(linear.NAME, setting.protocol)
        self._pictures = Pictures(setting, own)
        self._normaliser = Normaliser(kind=own.feature_norm)
        self._setting = setting
        self._proposals = list(proposals)
        self._rates = learning_rates(linear.NAME, [rate for _, rate in proposals])
        self._rows = Pooled(setting.network, [readout for readout, _ in proposals])
        self._heads: list[linear.Head] = []
        self.batch_size = self._fields.batch_size
        self.epochs: int | None = self._fields.epochs

    def steps(self, per_epoch: int) -> int:
        return self._fields.epochs * per_epoch

    def draw(self, sample: Sample, generator: np.random.Generator) -> Pictured:
        """A random crop, or the encoder's own view where the protocol says so."""
        return self._pictures.drawn(sample, generator)

    def step(self, batch: Sequence[Pictured], step: int, steps: int) -> None:
        """One step of every head."""
        rows, device = {name: self._normaliser(each) for name, each in self._rows(batch).items()}, self._setting.network.device
        self._start({name: each.shape[1] for name, each in rows.items()})
        onehot = one_hot(torch.tensor([one.target for one in batch]), self._setting.classes).T.to(device, torch.float32).contiguous()
        for head, (readout, _), rate in zip(self._heads, self._proposals, self._rates, strict=True):
            head.step(rows[readout], onehot, rate * annealed(step, steps, epochs=self._fields.epochs, anneal=self._fields.anneal))

    def state(self) -> list[dict[str, torch.Tensor]]:
        return [head.state() for head in self._heads]

    def load(self, states: Sequence[State]) -> None:
        self._start({readout: state["weight"].shape[1] for (readout, _), state in zip(self._proposals, states, strict=True)})
        for head, state in zip(self._heads, states, strict=True):
            head.load(state)

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        return [
            SoftmaxStack(
                probe=linear.NAME,
                knob=linear.KNOB,
                values=(rate,),
                weights=(head.weight_CD,),
                biases=(head.bias_C1[:, 0],),
                normaliser=self._normaliser,
            ).state(0)
            for head, rate in zip(self._heads, self._rates, strict=True)
        ]

    def _start(self, widths: Mapping[str, int]) -> None:
        """Make the heads, as the banked probe does for each readout."""
        if self._heads:
            return
        first = {
            readout: torch.empty(self._setting.classes, width).normal_(
                0, self._fields.init_std, generator=torch.Generator().manual_seed(self._setting.seed)
            )
            for readout, width in widths.items()
        }
        self._heads = [
            linear.Head(
                first[readout].to(self._setting.network.device, copy=True), momentum=self._fields.momentum, weight_decay=self._fields.weight_decay
            )
            for readout, _ in self._proposals
        ]


class LinearScorer:
    """Fitted softmax classifiers on the encoder's own resize and centre crop."""

    def __init__(self, setting: Setting, heads: Sequence[tuple[str, State]]) -> None:
        own = AugmentedFields.read(linear.NAME, setting.protocol)
        self._pictures = Pictures(setting, own)
        self._rows = Pooled(setting.network, [readout for readout, _ in heads])
        self._heads = [
            (
                readout,
                restored(state, probe=linear.NAME, knob=linear.KNOB, norm=own.feature_norm, classes=setting.classes, device=setting.network.device),
            )
            for readout, state in heads
        ]

    def view(self, sample: Sample) -> Pictured:
        return self._pictures.plain(sample)

    def inputs(self, example: Pictured) -> int:
        return 1

    def predict(self, keys: Sequence[str], batch: Sequence[Pictured]) -> list[Predictions | ProbeError]:
        features = {name: each.cpu().numpy() for name, each in self._rows(batch).items()}
        targets = np.array([one.target for one in batch], np.int64)
        groups = [one.group for one in batch]
        found: list[Predictions | ProbeError] = []
        for readout, stack in self._heads:
            try:
                found.append(stack.predict(Rows(keys=keys, groups=groups, targets=targets, features=features[readout]), 0))
            except ProbeError as error:
                found.append(error)
        return found
