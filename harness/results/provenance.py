"""The software that computed a value: versions of the packages, and the commit of this code."""

from __future__ import annotations

import functools
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

PACKAGES = ("partwise", "torch", "torchvision", "timm", "ray", "webdataset", "accelerate", "optuna", "pyarrow", "numpy", "pillow")


@functools.cache
def provenance() -> dict[str, object]:
    """`versions` of Python and of the packages that could move a number, and `git_commit`."""
    return {"versions": _versions(), "git_commit": _git_commit()}


def _versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with `+` where files of the code are changed or new; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        differs = ["git", "-C", str(here), "status", "--porcelain", "--", "harness", "shards", "pyproject.toml"]
        dirty = subprocess.run(differs, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if dirty.strip() else "")
