"""An encoder's preprocessing, decided in one place: the sweep's statement, over what is written in or beside the file, over what its family knows.

What decides, first to last, field by field:
1. `preprocessing` of the encoder's entry in the sweep;
2. the weight file itself: a safetensors file's metadata, the `args` of a torch file;
3. `preprocessor_config.json`, then `config.json`, in the file's folder (Hugging Face's and timm's forms);
4. what is known of the weights: their authors' evaluation, their tag in timm, their package;
5. for an architecture alone: ImageNet's mean and standard deviation, bicubic, the shorter side at 256/224 of the input size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.core import Preprocessing
from harness.encoders.files import Checkpoint
from harness.encoders.spec import EncoderSpec
from harness.encoders.stated import FIELDS, Statement, read_args, read_config, read_metadata, read_processor

BESIDE = ("preprocessor_config.json", "config.json")
"""Files in a weight file's folder that may say how its images are prepared, the first over the second."""

IMAGENET = Preprocessing(size=(224, 224), resize=256)
"""Shorter side 256, bicubic, centre crop 224, ImageNet's mean and standard deviation: what most authors of self-supervised encoders evaluate with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """A preprocessing, and where it comes from."""

    values: Preprocessing
    source: str
    """In words; not part of an encoder's fingerprint or of a bank's key."""
    replaced: tuple[str, ...] = ()
    """Fields in which the sweep, or what is written in or beside the file, replaces what is known of the weights."""


def decide(spec: EncoderSpec, base: Preprocessing, source: str, checkpoint: Checkpoint | None = None) -> Chosen:
    """The preprocessing of `spec`'s encoder: `base`, which comes from `source`, with everything that is stated over it.

    Raises EncoderError where a statement in or beside the file is malformed, with its file, key, what was expected and what it holds.
    """
    given = frozenset(name for name in FIELDS if getattr(spec.preprocessing, name) is not None)
    values, origins = base, dict.fromkeys(FIELDS, source)
    for statement in reversed(list(_statements(checkpoint, given))):
        values = statement.apply(values)
        origins |= dict.fromkeys(statement.fields, f"{statement.where} ({statement.remark})" if statement.remark else statement.where)
    values = spec.preprocessing.apply(values)
    origins |= dict.fromkeys(given | ({"resize"} if "size" in given else set()), "the sweep")
    replaced = tuple(name for name in FIELDS if getattr(values, name) != getattr(base, name))
    return Chosen(values=values, source=_words(origins), replaced=replaced)


def at_side(base: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """`base` for crops of another size in pixels, with the same crop share of the resized image: 256/224 of the shorter side for ImageNet's."""
    return dataclasses.replace(base, size=size, resize=round(base.resize * min(size) / min(base.size)))


def differences(values: Preprocessing) -> str:
    """In words, how a preprocessing differs from ImageNet's, apart from its size; empty where it does not."""
    words = [f"{name} {_numbers(getattr(values, name))}" for name in ("mean", "std") if getattr(values, name) != getattr(IMAGENET, name)]
    return ", ".join([*words, *([values.interpolation] if values.interpolation != IMAGENET.interpolation else [])])


def of_family(family: str, values: Preprocessing) -> str:
    """The words for what a family's authors evaluate with, and how it differs from most."""
    other = differences(values)
    return f"as the authors of {family} evaluate" + (f" ({other}, unlike most)" if other else "")


def beside(path: str) -> Iterator[Path]:
    """The files beside a weight file that may state its preprocessing: in the folder of its name, else of the file that the name links to."""
    folders = dict.fromkeys((Path(path).parent, Path(os.path.realpath(path)).parent))
    for name in BESIDE:
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is not None:
            yield file


def _statements(checkpoint: Checkpoint | None, given: frozenset[str]) -> Iterator[Statement]:
    """Statements in and beside the file about fields that the sweep does not give, the most binding first."""
    if checkpoint is None or given == set(FIELDS):
        return
    yield from read_metadata(checkpoint, given)
    yield from read_args(checkpoint, given)
    for file in beside(checkpoint.path):
        yield from (read_processor if file.name == BESIDE[0] else read_config)(file, given)


def _words(origins: Mapping[str, str]) -> str:
    """The source alone where it gives everything, else each source with its fields."""
    if len(set(origins.values())) == 1:
        return next(iter(origins.values()))
    by_source: dict[str, list[str]] = {}
    for name in FIELDS:
        by_source.setdefault(origins[name], []).append(name)
    return "; ".join(f"{', '.join(names)}: {origin}" for origin, names in by_source.items())


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
