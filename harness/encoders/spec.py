"""An encoder's entry in a sweep file, checked."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from harness.core import Preprocessing
from harness.errors import EncoderError, nearest
from harness.files import file_name

MAX_NAME = 110
"""Characters of an encoder's name as a file name; tables and figures add characters of their own."""
Option = str | int | float | bool | tuple[int, int] | None

KEYS = ("name", "encoder", "architecture", "checkpoint", "prefix", "rename", "drop", "options", "random", "seed", "preprocessing")
OPTIONS = (
    "attn_type",
    "class_token",
    "depth",
    "embed_dim",
    "fc_norm",
    "final_norm",
    "global_pool",
    "img_size",
    "init_values",
    "mlp_ratio",
    "no_embed_class",
    "num_heads",
    "patch_size",
    "pos_embed",
    "pre_norm",
    "qk_norm",
    "qkv_bias",
    "reg_tokens",
    "scale_mlp",
    "swiglu_mlp",
    "use_abs_pos_emb",
    "use_fc_norm",
    "use_rel_pos_bias",
    "use_rot_pos_emb",
    "use_shared_rel_pos_bias",
    "window_size",
)
"""Architecture options that may be given to timm's constructors: none of them reads a file or runs code."""


@dataclass(frozen=True, kw_only=True)
class PreprocessingOverride:
    """Fields of an encoder's own preprocessing that the sweep file replaces; None keeps the encoder's."""

    size: tuple[int, int] | None = None
    resize: int | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def apply(self, base: Preprocessing) -> Preprocessing:
        """`base` with the given fields in place. A new size without a new resize keeps the crop share of the resized image.

        Raises EncoderError where the crop would be larger than the resized image.
        """
        given = {field.name: value for field in dataclasses.fields(self) if (value := getattr(self, field.name)) is not None}
        if self.size is not None and self.resize is None:
            given["resize"] = max(min(self.size), round(base.resize * min(self.size) / min(base.size)))
        merged = dataclasses.replace(base, **given)
        if merged.resize < min(merged.size):
            raise EncoderError(
                f"preprocessing: expected resize of at least the crop's shorter side {min(merged.size)}, got {merged.resize}; raise resize"
            )
        return merged


_PREPROCESSING_KEYS = tuple(field.name for field in dataclasses.fields(PreprocessingOverride))


def refuse_unknown_keys(value: object) -> None:
    """Raise EncoderError, with the nearest match, for a key that an encoder's entry, its preprocessing or its options cannot have.

    Checks nothing else, so that a misspelt key is reported before its consequences.
    """
    if not isinstance(value, Mapping):
        return
    titles = (value.get(key) for key in ("name", "encoder", "architecture"))
    title = f"encoder {next((text[:60] for text in titles if isinstance(text, str) and text.strip()), 'without a name')}"
    for mapping, keys, where, noun in (
        (value, KEYS, title, "key"),
        (value.get("preprocessing"), _PREPROCESSING_KEYS, f"{title}: preprocessing", "key"),
        (value.get("options"), OPTIONS, title, "option"),
    ):
        for key in mapping if isinstance(mapping, Mapping) else ():
            if key not in keys:
                raise EncoderError(f"{where}: unknown {noun} {key!r}; known {noun}s: {', '.join(keys)}{nearest(str(key), keys)}")


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """One encoder of a sweep: hashable, picklable, with absolute paths."""

    name: str
    """Unique label in the results."""
    encoder: str | None = None
    """A registered name, `timm:<model>` or `hf-hub:<id>`; None where an architecture is given instead."""
    architecture: str | None = None
    """A timm architecture."""
    checkpoint: str | None = None
    prefix: str | None = None
    """Where in the checkpoint the encoder's keys begin; None: it is detected."""
    rename: tuple[tuple[str, str], ...] = ()
    """(old, new) text in the checkpoint's own keys, after the prefix is taken off."""
    drop: tuple[str, ...] = ()
    """Beginnings of keys (after prefix and rename) that are left out on purpose."""
    options: tuple[tuple[str, Option], ...] = ()
    """Architecture options, such as num_heads."""
    random: bool = False
    seed: int = 0
    preprocessing: PreprocessingOverride = PreprocessingOverride()

    @classmethod
    def parse(cls, value: object, *, base: Path | str = ".") -> EncoderSpec:
        """The spec of a sweep file's entry: a name, or a mapping with the keys of `KEYS`. Relative paths are relative to `base`.

        Raises EncoderError, with the nearest match, for an unknown key, name or architecture, for a value of a wrong type and for keys that
        contradict each other. Reads no checkpoint.
        """
        from harness.encoders import check_known  # the registry imports this module

        spec = _from_name(value) if isinstance(value, str) else _from_mapping(value, Path(base))
        check_name(spec.name)
        check_known(spec)
        return spec


def read_by_file(repository: str) -> str:
    """What to do about a repository of transformers."""
    return (
        f"fetch its weights (hf download {repository} model.safetensors config.json preprocessor_config.json) "
        "and give {architecture: <timm model>, checkpoint: model.safetensors}"
    )


def check_name(name: str) -> None:
    """Raise EncoderError unless a name can be printed and can name folders and files."""
    if not name.isprintable() or len(file_name(name)) > MAX_NAME:
        shown = repr(name) if len(name) <= 40 else f"{name[:40]!r}… of {len(name)}"
        raise EncoderError(
            f"an encoder's name must be one line of at most {MAX_NAME} plain characters (any other counts as three per byte), got {shown}; "
            f"give it a shorter `name`"
        )


def _from_name(value: str) -> EncoderSpec:
    if not value.strip():
        raise EncoderError(
            "an encoder's name is empty: expected a name such as timm:vit_small_patch16_224.dino; python -m harness.encoders lists them"
        )
    return EncoderSpec(name=value, encoder=value)


def _from_mapping(value: object, base: Path) -> EncoderSpec:
    if not isinstance(value, Mapping):
        raise EncoderError(f"an encoder is a name or a mapping, got {type(value).__name__} {value!r}; write e.g. timm:vit_small_patch16_224.dino")
    refuse_unknown_keys(value)
    label = _label(value)
    reader = _Reader(value, f"encoder {label}")
    encoder, architecture, checkpoint = reader.text("encoder"), reader.text("architecture"), reader.text("checkpoint")
    random = reader.boolean("random")
    _check_combination(label, encoder, architecture, checkpoint, random, "seed" in value)
    if checkpoint is not None and "://" in checkpoint:
        raise EncoderError(f"encoder {label}: checkpoint must be a file on this machine, got {checkpoint}; download it and give its path")
    for key in ("prefix", "rename", "drop"):
        if checkpoint is None and value.get(key):
            raise EncoderError(f"encoder {label}: {key} is about the keys of a checkpoint; give checkpoint: FILE or leave {key} out")
    return EncoderSpec(
        name=label,
        encoder=encoder,
        architecture=architecture,
        checkpoint=os.path.abspath(base / Path(checkpoint).expanduser()) if checkpoint is not None else None,  # links stay: files lie beside them
        prefix=reader.text("prefix", empty=True),
        rename=reader.rename(),
        drop=reader.texts("drop"),
        options=reader.options(),
        random=random,
        seed=reader.integer("seed", 0, 2**63 - 1) or 0,
        preprocessing=parse_preprocessing(value.get("preprocessing"), f"encoder {label}: preprocessing"),
    )


def _label(value: Mapping[Any, Any]) -> str:
    """The entry's name, else what it is made of."""
    if "name" in value:
        name = value["name"]
        if not isinstance(name, str) or not name.strip():
            raise EncoderError(f"an encoder's name must be text, got {name!r}; give it a name such as mine")
        return name
    made_of = value.get("encoder") or value.get("architecture")
    if not isinstance(made_of, str):
        raise EncoderError(
            "an encoder has neither name, encoder nor architecture; give it e.g. {name: mine, encoder: timm:vit_small_patch16_224.dino}"
        )
    return f"{made_of} random" if value.get("random") is True else made_of


def _check_combination(label: str, encoder: str | None, architecture: str | None, checkpoint: str | None, random: bool, seeded: bool) -> None:
    if encoder is None and architecture is None:
        raise EncoderError(f"encoder {label}: expected `encoder` or `architecture`, got neither; python -m harness.encoders lists them")
    if encoder is not None and architecture is not None:
        raise EncoderError(f"encoder {label}: both encoder {encoder} and architecture {architecture}; keep one of them")
    if encoder is not None and encoder.startswith("hf-hub:") and checkpoint is not None:
        raise EncoderError(
            f"encoder {label}: {encoder} has weights of its own; leave checkpoint out, or give {{architecture: <timm model>, checkpoint: FILE}}"
        )
    if encoder is None and checkpoint is None and not random:
        raise EncoderError(
            f"encoder {label}: architecture {architecture} has no weights: give checkpoint: FILE or random: true, or encoder: timm:{architecture}"
        )
    if seeded and not random:
        raise EncoderError(f"encoder {label}: seed is for random weights only; give random: true or leave seed out")
    if random and checkpoint is not None and encoder is None:
        raise EncoderError(f"encoder {label}: both checkpoint and random: true; keep one of them")


def parse_preprocessing(value: object, title: str) -> PreprocessingOverride:
    """`preprocessing` of an encoder's entry, called `title` in errors. Raises EncoderError for values of a wrong type."""
    if value is None:
        return PreprocessingOverride()
    if not isinstance(value, Mapping):
        raise EncoderError(f"{title}: expected a mapping of {', '.join(_PREPROCESSING_KEYS)}, got {value!r}")
    reader = _Reader(value, title)
    return PreprocessingOverride(
        size=reader.size(),
        resize=reader.integer("resize", 1, 8192),
        interpolation=cast(Literal["bicubic", "bilinear"] | None, reader.one_of("interpolation", ("bicubic", "bilinear"))),
        mean=reader.triple("mean", lambda number: math.isfinite(number), "three finite numbers"),
        std=reader.triple("std", lambda number: math.isfinite(number) and number > 0, "three positive numbers"),
    )


class _Reader:
    """Typed reading of a mapping's values; what is absent is None."""

    def __init__(self, mapping: Mapping[Any, Any], title: str) -> None:
        self._mapping = mapping
        self._title = title

    def _fail(self, key: str, expected: str) -> EncoderError:
        return EncoderError(f"{self._title}: {key} must be {expected}, got {self._mapping[key]!r}")

    def text(self, key: str, *, empty: bool = False) -> str | None:
        value = self._mapping.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or (not value.strip() and not empty) or "\0" in value:
            raise self._fail(key, "text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._mapping.get(key)
        if value is None:
            return ()
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(item, str) and item for item in listed):
            raise self._fail(key, "a list of texts")
        return tuple(listed)

    def boolean(self, key: str) -> bool:
        value = self._mapping.get(key, False)
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def integer(self, key: str, low: int, high: int) -> int | None:
        value = self._mapping.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._fail(key, f"a whole number from {low} to {high}")
        return value

    def one_of(self, key: str, choices: Iterable[str]) -> str | None:
        value = self.text(key)
        choices = tuple(choices)
        if value is not None and value not in choices:
            raise EncoderError(f"{self._title}: {key} must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}")
        return value

    def size(self, key: str = "size") -> tuple[int, int] | None:
        value = self._mapping.get(key)
        if value is None:
            return None
        pair = [value, value] if isinstance(value, int) else value
        valid = isinstance(pair, list | tuple) and len(pair) == 2
        if not valid or any(isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= 8192 for side in pair):
            raise self._fail(key, "a side, or [height, width], in pixels from 1 to 8192")
        return (pair[0], pair[1])

    def triple(self, key: str, valid: Callable[[float], bool], expected: str) -> tuple[float, float, float] | None:
        value = self._mapping.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 3 or not all(_is_number(number) and valid(number) for number in value):
            raise self._fail(key, expected)
        return (float(value[0]), float(value[1]), float(value[2]))

    def rename(self) -> tuple[tuple[str, str], ...]:
        value = self._mapping.get("rename")
        if value is None:
            return ()
        if not isinstance(value, Mapping) or not all(isinstance(old, str) and old and isinstance(new, str) for old, new in value.items()):
            raise self._fail("rename", "a mapping of old to new text")
        return tuple(value.items())

    def options(self) -> tuple[tuple[str, Option], ...]:
        value = self._mapping.get("options")
        if value is None:
            return ()
        if not isinstance(value, Mapping):
            raise self._fail("options", f"a mapping of {', '.join(OPTIONS)}")
        options = dict(value)
        for key, scalar in value.items():
            if key == "img_size":
                size = _Reader(value, f"{self._title}: option").size("img_size")
                options[key] = scalar if isinstance(scalar, int) else size
                continue
            if scalar is not None and not isinstance(scalar, str | bool) and not (_is_number(scalar) and math.isfinite(scalar)):
                raise EncoderError(f"{self._title}: option {key} must be a number, text, true, false or null, got {scalar!r}")
        return tuple(sorted(options.items()))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
