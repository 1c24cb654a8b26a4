"""Lists of object and part classes, as a user's file gives them: which of a data set's own names make which class.

A UTF-8 text file with tab-separated columns, one line for each name of the data set that belongs to a class. Empty lines and lines that start
with `#` are ignored:

    class                            an object class with the data set's name of the object
    class <tab> object               an object class
    class <tab> object <tab> part    a part class: that part of that object

Several lines with one class make one class of several names. The classes of either kind are numbered from 1 in the order in which they first come. In
the columns `object` and `part`, `*` stands for any text: `wheel_*`, or `*` alone for any object. A name without `*` takes precedence;
among those with `*` the first line wins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.data.manifest import MaskKind
from harness.errors import RequestError, nearest
from shards import label_maps, official

FIRST = "not listed"
"""The name of label 0."""
REMEDY = "see docs/datasets_segmentation.md for the format"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a list."""

    number: int
    label: int
    object: str
    part: str | None


@dataclass(frozen=True, kw_only=True)
class ClassList:
    """Object and part classes, and the mapping from the data set's own names to them. Pickles."""

    objects: tuple[str, ...]
    """Class i is label i + 1."""
    parts: tuple[str, ...]
    part_of: dict[str, str | None]
    """The object of each part class, by the data set's own name; None where there are several."""
    lines: tuple[Line, ...]
    path: Path
    sha256: str
    """SHA-256 of the file."""

    @property
    def mask_classes(self) -> dict[MaskKind, tuple[str, ...]]:
        """Names of the labels of each mask."""
        names: dict[MaskKind, tuple[str, ...]] = {}
        if self.objects:
            names["object"] = (FIRST, *self.objects)
        if self.parts:
            names["part"] = (FIRST, *self.parts)
        return names

    @property
    def summary(self) -> str:
        """The list in a few words, for a manifest."""
        return f"{len(self.objects)} object classes and {len(self.parts)} part classes of a user's list, sha256 {self.sha256}"

    def object_label(self, name: str) -> int:
        """Label of an object; 0 where the list does not name it."""
        return self._label(line for line in self.lines if line.part is None and matches(line.object, name))

    def part_label(self, owner: str, name: str) -> int:
        """Label of a part of an object; 0 where the list does not name it."""
        return self._label(line for line in self.lines if line.part is not None and matches(line.object, owner) and matches(line.part, name))

    @staticmethod
    def _label(lines: Iterable[Line]) -> int:
        best = min(lines, key=lambda line: (("*" in line.object) + ("*" in (line.part or "")), line.number), default=None)
        return best.label if best else 0

    def check(self, objects: Iterable[str], parts: Iterable[str], couples: Iterable[tuple[str, str]] | None = None) -> None:
        """Raise RequestError for the first line that matches none of the data set's names of objects and of parts.

        `couples`, where known, are all (object, part) pairs, with "" for an object as such.
        """
        objects, parts = sorted(set(objects)), sorted(set(parts))
        couples = None if couples is None else sorted(set(couples))
        for line in self.lines:
            for noun, pattern, names in (("an object", line.object, objects), ("a part", line.part, parts)):
                if pattern is not None and not any(matches(pattern, name) for name in names):
                    raise RequestError(f"{self.path}: line {line.number}: expected {noun} of the data set, got {pattern!r}{nearest(pattern, names)}")
            if couples is not None and line.part is not None:
                of_object = sorted({part for owner, part in couples if part and matches(line.object, owner)})
                if not any(matches(line.part, name) for name in of_object):
                    hint = nearest(line.part, of_object)
                    raise RequestError(f"{self.path}: line {line.number}: expected a part of {line.object!r}, got {line.part!r}{hint}")


def matches(pattern: str, name: str) -> bool:
    """Whether a name matches the pattern, in which `*` stands for any text."""
    if "*" not in pattern:
        return pattern == name
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def read(path: Path) -> ClassList:
    """The list of a file. Raises RequestError where it is missing, has a malformed line, or puts one name in two classes."""
    labels: dict[bool, dict[str, int]] = {False: {}, True: {}}  # is it a part → class → label
    lines: list[Line] = []
    taken: dict[tuple[str, str | None], str] = {}
    for number, text in label_maps.lines(path, REMEDY):
        cells = [cell.strip() for cell in text.split("\t")]
        if len(cells) > 3 or not all(cells):
            raise RequestError(f"{path}: line {number}: expected class, object and part, apart by one tab each, got {text[:80]!r}; {REMEDY}")
        name, owner, part = cells[0], cells[min(1, len(cells) - 1)], cells[2] if len(cells) == 3 else None
        if taken.setdefault((owner, part), name) != name:
            raise RequestError(f"{path}: line {number}: expected {part or owner!r} in one class, got it in {taken[owner, part]!r} and {name!r}")
        of_kind = labels[part is not None]
        lines.append(Line(number=number, label=of_kind.setdefault(name, len(of_kind) + 1), object=owner, part=part))
    owners = {name: {line.object for line in lines if line.part is not None and line.label == label} for name, label in labels[True].items()}
    return ClassList(
        objects=tuple(labels[False]),
        parts=tuple(labels[True]),
        part_of={name: next(iter(objects)) if len(objects) == 1 and "*" not in next(iter(objects)) else None for name, objects in owners.items()},
        lines=tuple(lines),
        path=path,
        sha256=hashlib.sha256(official.read(path, REMEDY)).hexdigest(),
    )
