"""The key of an item: which sample a view made it of, and which of that sample's items it is.

It is a text in banks and predictions; this module alone knows how it is written:

    <sample>                    the whole image
    <sample>#<number>            a kept crop, a bag (by its draw) or a token
    <sample>#<number>.<patch>    a patch of the bag of that draw
    <sample>#<number>:<part>     the patch around a keypoint of that part
    <sample>#<part>             whatever else a view tells its items apart by
"""

from __future__ import annotations

import re
from typing import NamedTuple

MARK = "#"
"""What no key of a sample holds: the reader refuses those that do (`harness.data.shards.unusable`)."""
_FORM = re.compile(r"#(0|[1-9][0-9]{0,17})(?:\.(0|[1-9][0-9]{0,17})|:(.*))?\Z", re.DOTALL)


class ItemKey(NamedTuple):
    """A view or a probe makes one and writes `str(key)`; `parse` reads it back, and `str(parse(text))` is `text` for every text."""

    sample: str
    number: int | None = None
    """From 0: the crop, the draw of a bag, the token in the order of the grid, or the keypoint among those that are selected."""
    patch: int | None = None
    """From 0, within a bag."""
    part: str | None = None

    @staticmethod
    def parse(text: str) -> ItemKey:
        """The sample's key ends at the first `#` behind which all the rest is a number with its patch or part; if none is, at the first `#`.

        So a sample's key that itself holds `#`, as it may where no reader was asked, is told from the suffix wherever that can be done.
        """
        match = _FORM.search(text)
        if match is not None:
            number, patch, part = match.groups()
            return ItemKey(text[: match.start()], int(number), None if patch is None else int(patch), part)
        sample, mark, rest = text.partition(MARK)
        return ItemKey(sample, part=rest if mark else None)

    def __str__(self) -> str:
        if self.number is None:
            return self.sample if self.part is None else f"{self.sample}{MARK}{self.part}"
        detail = f".{self.patch}" if self.patch is not None else f":{self.part}" if self.part is not None else ""
        return f"{self.sample}{MARK}{self.number}{detail}"

    @property
    def draw(self) -> int | None:
        """The number of a key that has nothing else: which of the draws of its sample it is."""
        return self.number if self.patch is None and self.part is None else None


def sample_of(text: str) -> str:
    """The key of the sample that the item of a key was made of: `ItemKey.parse(text).sample`."""
    return ItemKey.parse(text).sample if MARK in text else text
