"""The harness: what did a vision encoder learn?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.data.preprocess import prepare
    from harness.encoders import load
    from harness.local import Score, evaluate

    __version__: str

__all__ = ["Score", "__version__", "evaluate", "load", "prepare"]
_HOMES = {"Score": "harness.local", "evaluate": "harness.local", "load": "harness.encoders", "prepare": "harness.data.preprocess"}


def __getattr__(name: str) -> Any:
    """The face of the package, imported when it is first asked for: torch and timm take seconds."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("partwise")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
