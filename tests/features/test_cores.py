"""Cores that a process may use: quotas of control groups as the kernel, Docker, Kubernetes and Slurm write them, made by hand."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.cluster import cluster
from harness.features import cores

V1, V2 = "1:cpu,cpuacct:{}\n2:memory:/elsewhere\n", "0::{}\n"


def machine(root: Path, membership: str | None, files: Mapping[str, str]) -> Path:
    """A root folder with /proc/self/cgroup, and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    if membership is not None:
        (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        (V2.format("/"), {"cpu.max": "150000 100000\n"}, 1.5),
        (V2.format("/"), {"cpu.max": "max 100000\n"}, math.inf),
        (V2.format("/user.slice/job"), {"user.slice/job/cpu.max": "300000 100000\n", "user.slice/cpu.max": "max 100000\n"}, 3.0),
        (V2.format("/kubepods/pod/box"), {"kubepods/pod/box/cpu.max": "max 100000", "kubepods/pod/cpu.max": "400000 100000"}, 4.0),
        (V2.format("/kubepods/pod/box"), {"kubepods/pod/box/cpu.max": "800000 100000", "kubepods/pod/cpu.max": "400000 100000"}, 4.0),
        (V2.format("/../../outside"), {"cpu.max": "200000 100000\n"}, 2.0),
        (V2.format("/docker/of-the-host"), {"cpu.max": "50000 100000\n"}, 0.5),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        (
            V1.format("/slurm/job_7"),
            {"cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "700000", "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000"},
            7.0,
        ),
        (V1.format("/docker/x"), {"cpu/docker/cpu.cfs_quota_us": "20000", "cpu/docker/cpu.cfs_period_us": "10000"}, 2.0),
        (
            V1.format("/") + V2.format("/x"),
            {"unified/x/cpu.max": "max 100000", "cpu/cpu.cfs_quota_us": "90000", "cpu/cpu.cfs_period_us": "30000"},
            3.0,
        ),
        (V2.format("/"), {"cpu.max": "garbage"}, math.inf),
        (V2.format("/"), {"cpu.max": "0 0"}, math.inf),
        ("no colons here\n\n", {}, math.inf),
        (None, {}, math.inf),
        (None, {"cpu.max": "100000 100000"}, 1.0),
    ],
)
def test_the_smallest_quota_of_a_group_and_those_above_it_counts(
    tmp_path: Path, membership: str | None, files: Mapping[str, str], quota: float
) -> None:
    assert cores.quota(machine(tmp_path, membership, files)) == quota


@pytest.mark.parametrize(("quota", "affinity", "available"), [("max", 6, 6), ("250000", 6, 2), ("250000", 1, 1), ("99999", 6, 1), ("1000", 6, 1)])
def test_cores_are_whole_at_least_one_and_within_both_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, affinity: int, available: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    root = machine(tmp_path, V2.format("/"), {"cpu.max": f"{quota} 100000"})
    assert cores.available(root) == available


def test_a_run_has_the_cores_that_its_quota_pays_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, V2.format("/"), {"cpu.max": "300000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    available = cores.available
    monkeypatch.setattr(cores, "available", lambda: available(root))
    assert cluster.local_cores() == 3
