"""A data set's manifest: `<root>/<data set>/manifest.json`, read once, checked whole, never changed.

The manifest is all that the harness knows about a data set: which splits it has, which shards hold them, what their samples carry, and the
size and digest that every shard must have.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import fsspec
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from harness.data.images import MAX_PIXELS, Decoder, Range
from harness.errors import ManifestError, nearest

SCHEMA = 1
FILE_NAME = "manifest.json"
MAX_BYTES = 64 * 2**20
"""Maximum size of a manifest: a hundred thousand shards take about 16 MiB."""

REMEDY = "correct this file, or build the data set again if a recipe wrote it (docs/datasets.md says what belongs in it)"

Annotation = Literal["label", "boxes", "keypoints", "object", "part"]
ANNOTATIONS: tuple[str, ...] = get_args(Annotation)
MaskKind = Literal["object", "part"]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]

_OPTIONAL = ("range", "max_pixels")
"""Fields that a manifest's text has only where it states them: manifests older than the fields keep their text."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_COMPRESSED = re.compile(r"\.(tar\.[a-z0-9]{1,4}|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\.tar")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules that every sample of a data set must meet."""

    annotations: frozenset[str]
    classes: int
    """Labels are below this."""
    parts: frozenset[str]
    mask_values: Mapping[str, int]
    """Kind of label map → its labels are below this. Kinds whose labels have no names may hold any."""
    value_range: Range | None = None
    """Black and white of grey values wider than 8 bits; None where the data set does not state it."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image or a label map."""
    decoder: Decoder = "pillow"
    """What decodes JPEGs: a property of the run that reads the data set, not of the data set."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)


class Shard(_Frozen):
    """One tar: its path below the data set's folder, and what it must hold."""

    file: str
    samples: Count
    bytes: Count
    sha256: Digest

    @model_validator(mode="after")
    def _file_stays_in_its_folder(self) -> Shard:
        if _COMPRESSED.search(self.file):
            raise ValueError(
                f"expected a plain .tar, got the compressed {_shown(self.file)}; decompress it and write its new name, bytes and sha256 here"
            )
        if not _PLAIN_FILE.fullmatch(self.file):
            raise ValueError(f"expected a .tar below the data set's folder, of letters, digits, '_', '-' and '.', got {_shown(self.file)}")
        return self


class Split(_Frozen):
    """A split and its shards, in the order in which their samples count."""

    samples: Count
    official: Text | None = None
    """The data set's own name of this split, where it differs."""
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _counts_add_up(self) -> Split:
        held = sum(shard.samples for shard in self.shards)
        if held != self.samples:
            raise ValueError(f"expected shards of {self.samples} samples in all, got {held}")
        return self


class Manifest(_Frozen):
    """Everything that is known about a data set before a shard is opened."""

    schema_version: Literal[1] = Field(alias="schema")
    dataset: Name
    version: Text
    license: Text
    source: Text
    classes: tuple[Text, ...]
    """Names of the labels: label i is `classes[i]`."""
    parts: tuple[Text, ...] = ()
    """Names of the parts, in the order in which tasks count them."""
    part_of: dict[str, Text | None] = Field(default_factory=dict)
    """The object that a part belongs to; None where it belongs to no single one."""
    annotations: tuple[Annotation, ...]
    """What the samples hold besides the image."""
    mask_classes: dict[MaskKind, tuple[Text, ...]] = Field(default_factory=dict)
    """Names of the values of a label map: value i is `mask_classes[kind][i]`."""
    levels: dict[Name, tuple[Count, ...]] = Field(default_factory=dict)
    """Coarser levels of the labels by name: label i lies in class `levels[name][i]` of that level."""
    counterparts: dict[Name, tuple[tuple[Count, ...], ...]] = Field(default_factory=dict)
    """Name of another data set → for label i, the labels `counterparts[name][i]` with the same meaning there; empty where there is none."""
    range: tuple[Number, Number] | None = None
    """The values of black and of white in grey pictures of more than 8 bits; None where 16-bit pictures use the full range of their type."""
    max_pixels: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Maximum number of pixels of an image or a label map; None for `images.MAX_PIXELS`."""
    splits: dict[Name, Split]

    @model_validator(mode="after")
    def _range_has_a_width(self) -> Manifest:
        if self.range is not None and not 0 < self.range[1] - self.range[0] < math.inf:
            raise ValueError(f"expected range to be [low, high], low below high, got {list(self.range)}")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = dump(self)
        return {name: value for name, value in plain.items() if value is not None or name not in _OPTIONAL}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for field, names in (("classes", self.classes), ("parts", self.parts), ("annotations", self.annotations)):
            _no_duplicates(field, names)
        for needed, field, names in (("label", "classes", self.classes), ("keypoints", "parts", self.parts)):
            if needed in self.annotations and not names:
                raise ValueError(f"annotations name {needed!r}, so expected at least one of {field}, got none")
        for part in self.part_of:
            if part not in self.parts:
                raise ValueError(f"part_of names {_shown(part)}, which is not one of parts{nearest(part, self.parts)}")
        for kind in self.mask_classes:
            if kind not in self.annotations:
                raise ValueError(f"mask_classes names {kind!r}, which is not one of annotations")
        for field, tables in (("levels", self.levels), ("counterparts", self.counterparts)):
            for name, table in tables.items():
                if len(table) != len(self.classes):
                    raise ValueError(f"expected {field}.{name} to have an entry for each of {len(self.classes)} classes, got {len(table)}")
        if not self.splits:
            raise ValueError("expected at least one split, got none")
        _no_duplicates("shard files", [shard.file for split in self.splits.values() for shard in split.shards])
        return self

    @property
    def rules(self) -> Rules:
        """The rules that every sample must meet."""
        return Rules(
            annotations=frozenset(self.annotations),
            classes=len(self.classes),
            parts=frozenset(self.parts),
            mask_values={kind: len(names) for kind, names in self.mask_classes.items()},
            value_range=self.range,
            max_pixels=MAX_PIXELS if self.max_pixels is None else self.max_pixels,
        )

    @property
    def decoding(self) -> dict[str, Any]:
        """The manifest's statements on how pictures are decoded: part of the identity of everything made from them. Empty where there are none."""
        stated = {"range": self.range and list(self.range), "max_pixels": self.max_pixels}
        return {f"decoded_{name}": value for name, value in stated.items() if value is not None}

    def split(self, name: str) -> Split:
        """The split called `name`. Raises ManifestError where there is none."""
        if name not in self.splits:
            listed = ", ".join(self.splits)
            raise ManifestError(f"{self.dataset}: expected one of the splits {listed}, got {_shown(name)}{nearest(name, self.splits)}")
        return self.splits[name]

    def to_json(self) -> str:
        """The manifest as its file holds it: the same text for equal manifests."""
        return self.model_dump_json(by_alias=True, indent=2, exclude_none=False) + "\n"


def dataset_url(root: str, dataset: str) -> str:
    """Path or URL of a data set's folder below `root`."""
    return root + dataset if root.endswith("/") else f"{root}/{dataset}"


def shard_url(root: str, dataset: str, shard: Shard) -> str:
    """Path or URL of a shard."""
    return f"{dataset_url(root, dataset)}/{shard.file}"


def load_manifest(root: str, dataset: str) -> Manifest:
    """The manifest of `dataset` below `root`, a local folder or any URL that fsspec knows.

    Raises ManifestError where it is missing, too large, malformed, of another schema, of another data set, names a shard outside its folder or twice,
    or has counts that do not add up.
    """
    if not _NAME.fullmatch(dataset):
        raise ManifestError(f"data set: expected a name of letters, digits, '_', '-' and '.', got {_shown(dataset)}")
    url = f"{dataset_url(root, dataset)}/{FILE_NAME}"
    manifest = parse_manifest(_read(root, dataset, url), url)
    if manifest.dataset != dataset:
        raise ManifestError(f"{url}: expected the manifest of {dataset!r}, got that of {manifest.dataset!r}; name the folder after its data set")
    return manifest


def parse_manifest(text: bytes, url: str) -> Manifest:
    """A manifest from its JSON text; `url` is its name in errors. Raises ManifestError as `load_manifest` does."""
    text = text.removeprefix(codecs.BOM_UTF8)  # as some editors write
    try:
        plain = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{url}: expected JSON, got {_one_line(error)}; {REMEDY}") from None
    if not isinstance(plain, dict):
        raise ManifestError(f"{url}: expected a JSON object, got {type(plain).__name__}; {REMEDY}")
    if "schema" not in plain or plain["schema"] != SCHEMA or isinstance(plain["schema"], bool | float):
        got = _shown(plain.get("schema", "none"))
        raise ManifestError(f"{url}: expected manifest schema {SCHEMA}, got {got}; {_schema_remedy(plain)}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise ManifestError(f"{url}: {_first(error)}; {REMEDY}") from None


def _schema_remedy(plain: Mapping[str, Any]) -> str:
    return REMEDY if "schema" in plain else f'write "schema": {SCHEMA} into it'


def _read(root: str, dataset: str, url: str) -> bytes:
    try:
        with fsspec.open(url, "rb").open() as file:
            text: bytes = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ManifestError(f"{url}: no such file; expected a data set's manifest{_neighbours(root, dataset)}") from None
    except Exception as error:  # every file system has its own errors, which all mean the same here
        raise ManifestError(f"{url}: expected a readable manifest, got {type(error).__name__}: {_one_line(error)}") from None
    if len(text) > MAX_BYTES:
        raise ManifestError(f"{url}: expected at most {MAX_BYTES} bytes, got more; is this a manifest?")
    return text


def _neighbours(root: str, dataset: str) -> str:
    """Which data sets `root` does hold, for an error message."""
    try:
        system, path = fsspec.core.url_to_fs(root)
        held = sorted(str(file).rsplit("/", 2)[-2] for file in system.glob(f"{path.rstrip('/')}/*/{FILE_NAME}"))
    except Exception:  # only a hint: the fault itself is already reported
        return ""
    if not held:
        return f"; {root} holds no data set"
    return f"; {root} holds {', '.join(held[:10])}{', …' if len(held) > 10 else ''}{nearest(dataset, held)}"


def _object(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    _no_duplicates("keys of an object", [key for key, _ in pairs])
    return dict(pairs)


def _no_duplicates(noun: str, names: tuple[str, ...] | list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"expected {noun} that differ, got {_shown(name)} twice")
        seen.add(name)


def _first(error: ValidationError) -> str:
    """The first of pydantic's complaints, in one line: place, expected, got."""
    first = error.errors(include_url=False)[0]
    where = _one_line(".".join(str(step) for step in first["loc"])) or "manifest"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(first['loc'][-1]), _keys())}"
    if first["type"] == "missing":
        return f"{where}: expected this key, got none{_HOW_TO_FILL.get(str(first['loc'][-1]), '')}"
    message = _one_line(first["msg"].removeprefix("Value error, "))
    return f"{where}: {message}" if first["type"] == "value_error" else f"{where}: {message}, got {_shown(first['input'])}"


_HOW_TO_FILL = {
    "sha256": " (what `sha256sum FILE` prints)",
    "bytes": " (the file's size: `stat -c %s FILE`)",
    "samples": " (the number of samples)",
    "annotations": f" (a list of {', '.join(ANNOTATIONS)}, as far as samples carry them)",
    "classes": " (the list of class names; label i is the i-th, from 0)",
}


def _keys() -> list[str]:
    return [field.alias or name for model in (Manifest, Split, Shard) for name, field in model.model_fields.items()]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:300]
