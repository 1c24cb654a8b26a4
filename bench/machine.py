"""The machine, the versions and the commit that measurements are of."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harness.features.cores import available
from harness.results.provenance import provenance

PEERS = ("faiss-cpu", "scikit-learn", "torchcodec")
"""Packages that only benchmarks compare with; those of the harness are in its provenance."""


def machine() -> dict[str, Any]:
    """`name`, a slug for file names; processor, cores that this process may use, memory in GiB, GPU (None without), system."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    about = {
        "processor": _processor(),
        "cores": available(),
        "memory_gib": _memory_gib(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"name": slug(f"{about['processor']} {about['cores']} cores {gpu or ''}"), **about}


def versions() -> dict[str, str]:
    recorded = provenance()["versions"]
    assert isinstance(recorded, dict)
    installed = {name: str(number) for name, number in recorded.items()}
    for peer in PEERS:
        try:
            installed[peer] = version(peer)
        except PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The commit of this checkout, with `+` where the harness differs from it."""
    recorded = provenance()["git_commit"]
    return recorded if isinstance(recorded, str) else None


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|processor|cpu\b|@.*?hz", "", text.lower())).strip("-")


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    if about.exists():
        for line in about.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
