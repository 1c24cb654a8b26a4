"""Clusters that say nothing on the terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from harness.cluster.cluster import Cluster
from harness.config import Resources
from harness.progress import Progress


def new(**resources: Any) -> Cluster:
    return Cluster(None, Resources(**resources), dashboard=False, progress=Progress(Console(file=io.StringIO())))
