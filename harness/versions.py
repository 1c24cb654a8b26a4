"""The counters that decide whether what an earlier run left is used again. Raise one, and what it governs is made anew, or refused.

A change that moves none of these promises that whatever was made before is, byte for byte, what would be made now.
"""

from __future__ import annotations

from collections.abc import Mapping

EXTRACTION_VERSION = 2
"""Of feature banks, in every bank's key. Raise it when code that reads, views, prepares, encodes or pools could change a byte of a bank."""

STREAM_VERSION = 2
"""Of streamed studies, in the keys of their accounts. Raise it when code that augments, orders or trains on a stream could change a value."""

SCORING_VERSION = 3
"""Of searches and values, in every study's id. Raise it when code of probes, metrics, selection or intervals could change a value.

Not for a new probe, metric or task: no study of an earlier run has it.
"""

SCHEMA_VERSION = 1
"""Of the tables, in their metadata. Raise it when a column changes its type or its meaning, or goes: other versions then refuse the table.

Not when a column is added: a reader takes a missing column as null, and leaves out one that it does not know.
"""


def counters() -> Mapping[str, int]:
    """Every counter, as a record names it."""
    return {"extraction": EXTRACTION_VERSION, "stream": STREAM_VERSION, "scoring": SCORING_VERSION, "tables": SCHEMA_VERSION}
