"""The number of cores that this process may use: those that it may run on, within the quota of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Cores of this process, at least 1: a batch system's or a container's share of a machine, not all of it. `root` is where /proc and /sys lie."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(affinity, quota(root))))


def quota(root: Path = Path("/")) -> float:
    """CPUs' worth of time that the control group of this process and those above it allow, infinite where none sets a limit.

    A quota covers all groups below its own, so the smallest one counts. Version 2: `cpu.max`, "<quota or max> <period>" in microseconds; version 1:
    `cpu.cfs_quota_us`, -1 for none, and `cpu.cfs_period_us`. Source: the kernel's admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst.
    """
    return min(map(_quota_of, _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control groups, each with those above it.

    A container sees its own group as the root of the file system, whatever path /proc names, so the root is always included.
    """
    mount = root / "sys/fs/cgroup"
    yield mount
    for controllers, path in _memberships(root):
        places = [mount] if controllers == "" else [mount / controllers, *(mount / name for name in controllers.split(","))]
        places += [mount / "unified"] if controllers == "" else []
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for place in places:
            for depth in range(len(steps) + 1):
                yield place.joinpath(*steps[:depth])


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """(controllers, path) of every line of /proc/self/cgroup that can limit CPU time; version 2 names no controllers."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if colon and (controllers == "" or "cpu" in controllers.split(",")):
            yield controllers, path


def _quota_of(group: Path) -> float:
    numbers = _words(group / "cpu.max")
    if len(numbers) != 2:
        numbers = [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
    try:
        limit, period = map(int, numbers)
    except ValueError:  # "max", or no such files
        return math.inf
    return limit / period if limit > 0 and period > 0 else math.inf


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
