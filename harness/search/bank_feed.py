"""Heads that are fitted and scored on rows of banks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from harness.core import FittedStack, Proposal, Rows, State
from harness.errors import HarnessError, is_of_the_place
from harness.features.bank import BankStore
from harness.features.rows import hold_out, joined_rows
from harness.probes import probe, row_probe
from harness.probes.fields import epoch_of, mask_of
from harness.probes.retrieval import GalleryFields, neighbours
from harness.search.propose import HeadScore
from harness.search.study import BankRef, Candidate, Predicted, Study

GALLERY_QUERIES = 64
GALLERY_DEPTH = 10


class BankFeed:
    """Feeds studies on one device; keeps the rows that it read last, since the rounds of one study read the same ones."""

    def __init__(self, store: BankStore, device: torch.device) -> None:
        self._store, self._device = store, device
        self._rows: dict[tuple[str, str | None, tuple[str, ...]], Rows] = {}

    def stacks(self, proposals: Sequence[Proposal]) -> list[list[int]]:
        """Positions in `proposals`: the heads of one readout are a stack, since they read the same rows."""
        by_readout: dict[str, list[int]] = {}
        for position, (readout, _) in enumerate(proposals):
            by_readout.setdefault(readout, []).append(position)
        return list(by_readout.values())

    def candidates(self, study: Study, index: int, proposals: Sequence[Proposal]) -> list[Candidate]:
        """Fit one stack on the rows of train, and score every head on those of the selection split.

        Raises HarnessError where the rows cannot be fitted.
        """
        readout, rates = proposals[0][0], [rate for _, rate in proposals]
        train, selection = self.training_rows(study, readout), self.selection_rows(study, readout)
        if epoch_of(study.protocol) == "best":
            best = _BestEpochs(study, selection, len(rates))
            row_probe(study.probe).fit(train, rates, **self._settings(study) | {"after_epoch": best})
            return best.candidates
        stack = row_probe(study.probe).fit(train, rates, **self._settings(study))
        return [_candidate(study, stack, position, selection) for position in range(len(rates))]

    def clear(self, study: Study, index: int) -> None:
        """Nothing: a round on banks leaves no checkpoint."""

    def predictions(self, study: Study, head: HeadScore, state: State, test: BankRef) -> Predicted:
        """The head on the rows of its readout's bank of test, as it is: no refit."""
        rows = joined_rows([self._read(study, ref) for ref in (test, *test.more)])
        if test.reference is not None:
            rows = replace(rows, reference=self._read(study, test.reference))
        train = self.training_rows(study, head.readout)
        stack = row_probe(study.probe).restore(state, train, **self._settings(study))
        return Predicted(
            predictions=stack.predict(rows, 0) if len(rows) else None,
            trained=trained_labels(study, train),
            neighbours=_gallery(study, rows) if len(rows) and probe(study.probe).neighbours else [],
        )

    def training_rows(self, study: Study, readout: str) -> Rows | None:
        """What heads are fitted on; None for probes that train on nothing."""
        if not probe(study.probe).needs_train:
            return None
        rows = self._read(study, study.train[readout])
        return hold_out(rows, seed=study.seed)[0] if study.holds_out else rows

    def selection_rows(self, study: Study, readout: str) -> Rows:
        """What heads are chosen on."""
        if study.holds_out:
            return hold_out(self._read(study, (study.val or study.train)[readout]), seed=study.seed)[1]
        return self._read(study, study.val[readout])

    def _settings(self, study: Study) -> dict[str, Any]:
        return {"classes": study.classes, "protocol": study.protocol, "seed": study.seed, "device": self._device}

    def _read(self, study: Study, ref: BankRef) -> Rows:
        key = (ref.bank.key, mask_of(study.protocol), ref.without)
        if key not in self._rows:
            if len(self._rows) >= 2 * len(study.readouts) + 1:
                self._rows.clear()
            self._rows[key] = self._store.rows(ref.bank, mask=key[1], without=key[2])
        return self._rows[key]


class _BestEpochs:
    """Scores every head after every epoch, and keeps the best of each: the first of equals."""

    def __init__(self, study: Study, selection: Rows, heads: int) -> None:
        self._study, self._selection, self._epochs = study, selection, 0
        self.candidates = [Candidate(value=None)] * heads

    def __call__(self, stack: FittedStack) -> None:
        self._epochs += 1
        for position, before in enumerate(self.candidates):
            value, error = _merit(self._study, stack, position, self._selection)
            if value is not None and (before.value is None or value > before.value):
                state = {name: tensor.clone() for name, tensor in stack.state(position).items()}
                self.candidates[position] = Candidate(value=value, state=state, epochs=self._epochs)
            elif before.value is None:
                self.candidates[position] = Candidate(value=None, error=error)


def _candidate(study: Study, stack: FittedStack, position: int, selection: Rows) -> Candidate:
    value, error = _merit(study, stack, position, selection)
    return Candidate(value=value, error=error, state={} if value is None else stack.state(position))


def _merit(study: Study, stack: FittedStack, position: int, selection: Rows) -> tuple[float | None, str | None]:
    """A head's merit on the selection split, or why it has none."""
    try:
        return study.merit(study.searched.counts(stack.predict(selection, position), study.classes).sum(axis=0) if len(selection) else None)
    except HarnessError as error:
        if is_of_the_place(error):
            raise
        return None, str(error)


def trained_labels(study: Study, train: Rows | None) -> frozenset[int] | None:
    """The labels that training rows have, or their label maps where the study is about these; None without training rows."""
    if train is None:
        return None
    if mask_of(study.protocol) is None:
        return frozenset(np.unique(train.targets).tolist())
    total = np.zeros(0, np.int64)
    for mask in train.masks if train.masks is not None else ():
        counts = np.bincount(mask.ravel(), minlength=len(total))
        counts[: len(total)] += total
        total = counts
    return frozenset(np.flatnonzero(total).tolist())


def _gallery(study: Study, test: Rows) -> list[dict[str, Any]]:
    """The nearest neighbours of evenly spread queries: what the report draws."""
    queries = np.unique(np.linspace(0, len(test) - 1, min(GALLERY_QUERIES, len(test))).round().astype(np.int64))
    exclude = study.protocol.exclude if isinstance(study.protocol, GalleryFields) else "query"
    index, similarity = neighbours(test, top=GALLERY_DEPTH, queries=queries, exclude=exclude)
    return [
        {
            "query": test.keys[query],
            "rank": rank + 1,
            "neighbour": test.keys[nearest],
            "similarity": float(similarity[row, rank]),
            "relevant": bool(test.targets[nearest] == test.targets[query]),
        }
        for row, query in enumerate(queries)
        for rank, nearest in enumerate(index[row])
        if nearest >= 0
    ]
