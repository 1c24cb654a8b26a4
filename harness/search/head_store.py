"""Fitted heads in the cache, where every process of a run finds them, and a later run too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from harness.core import State
from harness.errors import BankError
from harness.features.bank import BankStore
from harness.search.propose import HeadScore
from harness.search.study import Study


class HeadStore:
    """The heads of every round: `studies/<study>/round-<n>.safetensors`, whose tensors are named `<head>/<tensor>`."""

    def __init__(self, store: BankStore) -> None:
        self._store = store

    def publish(self, study: Study, index: int, states: Mapping[int, State]) -> None:
        """Head to what it is scored from, of a whole round; takes the place of what an earlier run left."""
        tensors = numbered(states)
        self._store.publish(_place(study, index), save_tensors(tensors), replace=True)

    def has_round(self, study: Study, index: int) -> bool:
        return self._store.read_bytes(*_place(study, index)) is not None

    def state(self, study: Study, head: HeadScore) -> dict[str, torch.Tensor]:
        """What a head is scored from, empty for probes that train on nothing. Raises BankError where its round is not in the cache."""
        if study.decided:
            return {}
        data = self._store.read_bytes(*_place(study, head.round))
        if data is None:
            raise BankError(f"study {study.id}: the heads of round {head.round} are not in the cache; run with --fresh to search anew")
        return of_head(load_tensors(data), head.head)

    def note_labels(self, study: Study, index: int, labels: Sequence[int]) -> None:
        """Keep the labels that a round on a stream was trained on, so that its score can say which tested ones are not among them."""
        self._store.publish(_place_of_labels(study, index), json.dumps(list(labels)).encode(), replace=True)

    def labels(self, study: Study, index: int) -> frozenset[int] | None:
        """The labels that a round was trained on; None where they were not noted."""
        data = self._store.read_bytes(*_place_of_labels(study, index))
        return None if data is None else frozenset(json.loads(data))


def numbered(states: Mapping[int, State]) -> dict[str, torch.Tensor]:
    """The tensors of several heads under names of one file, as safetensors takes them."""
    return {f"{head}/{name}": tensor.contiguous() for head, state in states.items() for name, tensor in state.items()}


def of_head(tensors: State, head: int) -> dict[str, torch.Tensor]:
    """What `numbered` was given for a head."""
    prefix = f"{head}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _place(study: Study, index: int) -> tuple[str, str, str]:
    return "studies", study.id, f"round-{index}.safetensors"


def _place_of_labels(study: Study, index: int) -> tuple[str, str, str]:
    return "studies", study.id, f"round-{index}-labels.json"
