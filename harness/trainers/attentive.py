"""The attentive probe on a stream.

Shape legend: B images, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from harness.core import Predictions, Rows, Sample
from harness.errors import ProbeError
from harness.probes.attentive import NAME, AttentiveFields, AttentiveProbe, HeadInTraining, fresh_heads, normalised
from harness.probes.augmented import CropFields
from harness.probes.fields import learning_rates
from harness.probes.pictures import Pictured, Pictures, Pooled
from harness.probes.schedule import annealed
from harness.probes.softmax import most_probable
from harness.probes.streaming import Proposal, Setting, State


def scored_together(setting: Setting) -> int:
    """Images that are scored at once: as many as the protocol normalises by the statistics of, if it does; else what the encoder takes."""
    fields = AttentiveFields.read(NAME, setting.protocol)
    return fields.bn_batch if fields.bn_eval == "batch" else setting.network.batch_size


class AttentiveTrainer:
    """The attentive probe's heads, for all readouts at once; they share the tokens of each batch and nothing else."""

    def __init__(self, setting: Setting, proposals: Sequence[Proposal]) -> None:
        self._fields = AttentiveFields.read(NAME, setting.protocol)
        self._pictures = Pictures(setting, CropFields.read(NAME, setting.protocol))
        self._setting = setting
        self._proposals = list(proposals)
        self._rates = learning_rates(NAME, [rate for _, rate in proposals])
        self._tokens = Pooled(setting.network, [readout for readout, _ in proposals])
        self._heads: list[HeadInTraining] = []
        self.batch_size = self._fields.batch_size
        self.epochs: int | None = self._fields.epochs

    def steps(self, per_epoch: int) -> int:
        return self._fields.epochs * per_epoch

    def draw(self, sample: Sample, generator: np.random.Generator) -> Pictured:
        """A random crop, or the encoder's own view where the protocol says so."""
        return self._pictures.drawn(sample, generator)

    def step(self, batch: Sequence[Pictured], step: int, steps: int) -> None:
        """One step of every head. Raises ProbeError where the attention heads do not divide the width."""
        device = self._setting.network.device
        tokens = {name: normalised(each, device) for name, each in self._tokens(batch).items()}
        self._start({name: each.shape[-1] for name, each in tokens.items()})
        targets = torch.tensor([one.target for one in batch], device=device)
        for head, (readout, _), rate in zip(self._heads, self._proposals, self._rates, strict=True):
            head.step(tokens[readout], targets, rate * annealed(step, steps, epochs=self._fields.epochs, anneal=self._fields.anneal))

    def state(self) -> list[dict[str, torch.Tensor]]:
        return [head.state() for head in self._heads]

    def load(self, states: Sequence[State]) -> None:
        self._start({readout: len(state["query"]) for (readout, _), state in zip(self._proposals, states, strict=True)})
        for head, state in zip(self._heads, states, strict=True):
            head.load(state)

    def fitted(self) -> list[dict[str, torch.Tensor]]:
        return [head.fitted(rate) for head, rate in zip(self._heads, self._rates, strict=True)]

    def _start(self, widths: Mapping[str, int]) -> None:
        """Make the heads, as the banked probe does for each readout."""
        if not self._heads:
            self._heads = [self._fresh(widths[readout]) for readout, _ in self._proposals]

    def _fresh(self, width: int) -> HeadInTraining:
        setting = self._setting
        generator = torch.Generator().manual_seed(setting.seed)
        (head,) = fresh_heads(1, width, setting.classes, self._fields, generator, setting.network.device)
        return head


class AttentiveScorer:
    """Fitted heads on all tokens of the encoder's own resize and centre crop."""

    def __init__(self, setting: Setting, heads: Sequence[tuple[str, State]]) -> None:
        self._pictures = Pictures(setting, CropFields.read(NAME, setting.protocol))
        self._tokens = Pooled(setting.network, [readout for readout, _ in heads])
        device = setting.network.device
        self._heads = [
            (readout, AttentiveProbe().restore(state, None, classes=setting.classes, protocol=setting.protocol, seed=setting.seed, device=device))
            for readout, state in heads
        ]
        self._device = device

    def view(self, sample: Sample) -> Pictured:
        return self._pictures.plain(sample)

    def inputs(self, example: Pictured) -> int:
        return 1

    def predict(self, keys: Sequence[str], batch: Sequence[Pictured]) -> list[Predictions | ProbeError]:
        """One a head; all of `batch` is one batch, where the protocol normalises by a test batch's statistics."""
        tokens = {name: normalised(each, self._device) for name, each in self._tokens(batch).items()}
        rows = Rows(
            keys=keys,
            groups=[one.group for one in batch],
            targets=np.array([one.target for one in batch], np.int64),
            features=np.zeros((len(batch), 0), np.float32),
        )
        found: list[Predictions | ProbeError] = []
        for readout, stack in self._heads:
            try:
                found.append(most_probable(rows, stack.probabilities(tokens[readout], 0).cpu()))
            except ProbeError as error:
                found.append(error)
        return found
