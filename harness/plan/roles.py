"""Which split and which view each role of a study reads: what it trains on, chooses on, is scored on and retrieves from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.core import Task, View
from harness.data.manifest import Manifest
from harness.errors import RequestError
from harness.probes import is_decided
from harness.probes.fields import pool_of

HELD_OUT = "held out"
"""A second role of train, in the view that heads are chosen on, where there is no val split: a tenth of its images counts."""
ROLES = ("train", "val", HELD_OUT, "test", "reference")
POOLS: Mapping[str, tuple[str, ...]] = {"test": ("test",), "train": ("train",), "all": ("test", "train", "val")}
"""A protocol's `pool` to the splits that are scored."""
POOLED = "pool/"
"""How the roles of a pool's further splits begin; its first split has the role `test`."""


def pool(task: Task) -> tuple[str, ...]:
    """The splits whose rows are scored together, as far as the data set has them: test alone, unless the protocol has another `pool`."""
    return POOLS[pool_of(task.protocol.fields)]


def pooled_roles(task: Task) -> list[str]:
    """The roles of the pool's splits beside the first."""
    return [f"{POOLED}{split}" for split in pool(task)[1:]]


def split_of(role: str, task: Task) -> str:
    """The split that a role reads."""
    if role == "test":
        return pool(task)[0]
    return {"reference": "test", HELD_OUT: "train"}.get(role, role.removeprefix(POOLED))


def view_of(task: Task, role: str) -> View:
    """The view that the rows of a role are of."""
    if role == "reference" and task.reference_view is not None:
        return task.reference_view
    if role in ("val", HELD_OUT) and task.val_view is not None:
        return task.val_view
    return task.train_view if role in ("train", "val") and task.train_view is not None else task.view


def manifests_by_role(task: Task, manifests: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Role to the manifest whose split it reads; roles whose data set has no such split are absent."""
    learnt = manifests[task.train_dataset or task.dataset]
    by_role = {role: learnt if role in ("train", "val", HELD_OUT) else manifests[task.dataset] for role in (*ROLES, *pooled_roles(task))}
    return {role: manifest for role, manifest in by_role.items() if split_of(role, task) in manifest.splits}


def roles_of(task: Task, readouts: Sequence[str], manifests: Mapping[str, Manifest]) -> tuple[list[str], str]:
    """The roles that a study reads, and the split that it chooses on."""
    decided = is_decided(task.probe, readouts, task.protocol.fields)
    chosen_on = "nothing" if decided else "val" if "val" in manifests else "train/10" if "train" in manifests else "nothing"
    is_needed = {
        "train": task.probe.needs_train or chosen_on == "train/10",
        "val": chosen_on == "val",
        HELD_OUT: chosen_on == "train/10" and task.val_view is not None,
        "test": True,
        "reference": task.reference_view is not None,
    }
    if readouts and chosen_on.removesuffix("/10") in pool(task):
        raise RequestError(
            f"{task.name}: expected one readout where the pool has the split that readouts are chosen on ({chosen_on}), got {', '.join(readouts)}; "
            f"set protocol.readouts or ask for a protocol of one"
        )
    return [role for role in (*ROLES, *pooled_roles(task)) if is_needed.get(role, True) and role in manifests], chosen_on
