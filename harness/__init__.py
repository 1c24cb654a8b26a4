"""The harness: what did a vision encoder learn?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.local import Score, evaluate

__all__ = ["Score", "evaluate"]


def __getattr__(name: str) -> Any:
    """The face of the package, imported when it is first asked for: torch and timm take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from harness import local

    return getattr(local, name)
