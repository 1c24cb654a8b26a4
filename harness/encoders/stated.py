"""Preprocessing as others write it in or beside a weight file: timm's `pretrained_cfg`, Hugging Face's image processors, training arguments.

Numbers are checked here; a malformed one is refused with its file, its key, what was expected and what it holds.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from harness.core import Preprocessing
from harness.encoders.files import Checkpoint
from harness.encoders.spec import PreprocessingOverride
from harness.errors import EncoderError

FIELDS = tuple(field.name for field in dataclasses.fields(Preprocessing))
_NESTED = ("pretrained_cfg", "preprocessing", "preprocess_cfg", "preprocessor_config")
"""Keys under which a file's settings may hold the preprocessing's."""
_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_TELLING = ("mean", "std", "input_size", "crop_pct", "image_mean", "image_std")
_ACCOMPANYING = ("interpolation", "resample", "do_normalize", "do_center_crop", "do_resize", "do_rescale", "rescale_factor", "crop_size", "size")
"""Top-level settings of any program's file: those that show that it states a preprocessing, and those that count only beside such a one."""
_INCEPTION = (0.5, 0.5, 0.5)
_LARGEST = 8192
_LONGEST = 100_000
"""Characters of a value in a file's metadata: more are no preprocessing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """What one source says of the preprocessing."""

    where: str
    """In words, e.g. `preprocessor_config.json beside the file`."""
    override: PreprocessingOverride
    crop_share: float | None = None
    """The crop's share of the resized image's shorter side, where it is stated instead of the latter."""
    remark: str = ""
    """What is not followed to the letter."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it decides, a resize that follows from a size among them."""
        named = [name for name in FIELDS if getattr(self.override, name) is not None]
        return tuple(name for name in FIELDS if name in named or (name == "resize" and (self.crop_share is not None or "size" in named)))

    def apply(self, base: Preprocessing) -> Preprocessing:
        """`base` with the stated fields in place. Raises EncoderError where the crop would be larger than the resized image."""
        override = self.override
        if override.resize is None and self.crop_share is not None:
            side = min(override.size or base.size)
            override = dataclasses.replace(override, resize=math.floor(side / self.crop_share))
        try:
            return override.apply(base)
        except EncoderError as error:
            raise EncoderError(f"{self.where}: {error}, or state preprocessing in the sweep") from None


class _Settings:
    """Typed reading of one source's values; what is absent, null or empty is None."""

    def __init__(self, file: str, values: Mapping[str, Any], given: frozenset[str]) -> None:
        self.file = file
        self.values = values
        self.given = given

    def get(self, field: str, *keys: str) -> tuple[str, Any] | None:
        """The first of `keys` that holds something, with its value, unless the sweep gives `field`."""
        if field in self.given:
            return None
        return next(((key, self.values[key]) for key in keys if self.values.get(key) not in (None, "", [], ())), None)

    def fail(self, key: str, expected: str, field: str) -> EncoderError:
        return EncoderError(
            f"{self.file}: {key}: expected {expected}, got {self.values[key]!r}; correct it, or state preprocessing: {{{field}: …}} in the sweep"
        )

    def triple(self, field: str, *keys: str) -> tuple[float, float, float] | None:
        entry = self.get(field, *keys)
        if entry is None:
            return None
        key, value = entry
        numbers = _numbers(value)
        if numbers is None or len(numbers) != 3 or min(numbers) < 0 or max(numbers) > 1 or (field == "std" and min(numbers) == 0):
            least = "positive numbers" if field == "std" else "numbers"
            of_bytes = " (those of values up to 255 are divided by 255)" if numbers is not None and max(numbers) > 1 else ""
            raise self.fail(key, f"three {least}, of red, green and blue in [0, 1]{of_bytes}", field)
        return (numbers[0], numbers[1], numbers[2])

    def size(self, *keys: str) -> tuple[int, int] | None:
        entry = self.get("size", *keys)
        return None if entry is None else self.sides(entry[0])

    def sides(self, key: str) -> tuple[int, int]:
        """Height and width of a side, [height, width], timm's [3, height, width] or Hugging Face's {height, width}."""
        value = self.values[key]
        if isinstance(value, Mapping):
            value = [value.get("height"), value.get("width")]
        sides = _numbers(value)
        if sides is not None and len(sides) == 3 and sides[0] == 3:
            sides = sides[1:]
        sides = sides * 2 if sides is not None and len(sides) == 1 else sides
        if sides is None or len(sides) != 2 or any(side != int(side) or not 1 <= side <= _LARGEST for side in sides):
            raise self.fail(key, f"a side or a height and a width, in pixels from 1 to {_LARGEST}", "size")
        return (int(sides[0]), int(sides[1]))

    def side(self, key: str, value: object) -> int:
        numbers = _numbers(value)
        if numbers is None or len(numbers) != 1 or numbers[0] != int(numbers[0]) or not 1 <= numbers[0] <= _LARGEST:
            raise self.fail(key, f"a shortest edge in pixels from 1 to {_LARGEST}", "resize")
        return int(numbers[0])

    def crop_share(self, *keys: str) -> float | None:
        entry = self.get("resize", *keys)
        if entry is None:
            return None
        key, value = entry
        numbers = _numbers(value)
        if numbers is None or len(numbers) != 1 or not 0.05 <= numbers[0] <= 1:
            raise self.fail(key, "a share of the image's shorter side, from 0.05 to 1", "resize")
        return numbers[0]

    def interpolation(self, *keys: str) -> tuple[Literal["bicubic", "bilinear"] | None, str]:
        """Its name, and a remark where bicubic stands in for another one."""
        entry = self.get("interpolation", *keys)
        if entry is None:
            return None, ""
        key, value = entry
        number = _numbers(value)
        name = _PILLOW.get(int(number[0]), "") if number and len(number) == 1 and number[0] == int(number[0]) else str(value).lower()
        name = name.rpartition(".")[2]  # InterpolationMode.BICUBIC
        if name in ("bicubic", "bilinear"):
            return cast(Literal["bicubic", "bilinear"], name), ""
        if name in (*_PILLOW.values(), "lanczos3", "random"):
            return "bicubic", f"bicubic in place of {name}"
        raise self.fail(key, "bicubic, bilinear or Pillow's number of one of them", "interpolation")


def read_metadata(checkpoint: Checkpoint, given: frozenset[str]) -> Iterator[Statement]:
    """What a safetensors file's metadata says: its values are text, JSON where they are more than words."""
    values = {key: _parsed(text) for key, text in checkpoint.metadata.items()}
    yield from _timm_form(f"metadata of {checkpoint.path}", f"the metadata of {checkpoint.file}", values, given)


def read_args(checkpoint: Checkpoint, given: frozenset[str]) -> Iterator[Statement]:
    """What the training arguments in a torch file say."""
    args = dict(checkpoint.args)
    flag = args.pop("imagenet_default_mean_and_std", None)
    if isinstance(flag, bool):  # BEiT's and its descendants' choice between ImageNet's and Inception's
        for key, default in (("mean", Preprocessing.mean), ("std", Preprocessing.std)):
            args[key] = args.get(key) or (default if flag else _INCEPTION)
    if not args.get("input_size") and args.get("img_size"):
        args["input_size"] = args["img_size"]
    if not args.get("crop_pct") and args.get("eval_crop_ratio"):
        args["crop_pct"] = args["eval_crop_ratio"]
    yield from _timm_form(f"args in {checkpoint.path}", f"the args in {checkpoint.file}", args, given)


def read_processor(file: Path, given: frozenset[str]) -> Iterator[Statement]:
    """What a `preprocessor_config.json` says."""
    values = read_json(file)
    if values is None:
        raise EncoderError(
            f"{file}: expected a JSON object of Hugging Face's image processor, got something else; "
            f"correct or remove it, or state preprocessing: {{{', '.join(FIELDS)}}} in the sweep"
        )
    yield from _processor_form(_Settings(str(file), values, given), f"{file.name} beside the file")


def read_config(file: Path, given: frozenset[str]) -> Iterator[Statement]:
    """What a `config.json` says, where it says anything about preprocessing: it may be any program's."""
    values = read_json(file)
    if values is not None:
        yield from _timm_form(str(file), f"{file.name} beside the file", values, given)


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file, None where it is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _timm_form(file: str, where: str, values: Mapping[str, Any], given: frozenset[str]) -> Iterator[Statement]:
    """mean, std, input_size, crop_pct and interpolation, at the top or under one of the usual names, the nested ones first."""
    for key in (*_NESTED, None):
        inner = values.get(key) if key is not None else values
        if not isinstance(inner, Mapping):
            continue
        settings = _Settings(file, inner if key is not None else _at_top(inner), given)
        if any(name.startswith(("image_", "do_")) or name == "crop_size" for name in settings.values):
            yield from _processor_form(settings, where)
            continue
        interpolation, remark = settings.interpolation("interpolation", "resample")
        statement = Statement(
            where=where,
            override=PreprocessingOverride(
                size=settings.size("input_size", *(("size",) if key is not None else ())),
                resize=settings.side(*entry) if key is not None and (entry := settings.get("resize", "resize")) is not None else None,
                interpolation=interpolation,
                mean=settings.triple("mean", "mean"),
                std=settings.triple("std", "std"),
            ),
            crop_share=settings.crop_share("crop_pct"),
            remark=_join_remarks(remark, _crop_mode(settings.values)),
        )
        if statement.fields:
            yield statement


def _at_top(values: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing's settings among those of any program's file: a `mean` that is a single number is something else."""
    telling = {name: values[name] for name in _TELLING if not (name in ("mean", "std") and _is_number(values.get(name))) and values.get(name)}
    return telling | {name: values[name] for name in _ACCOMPANYING if telling and name in values}


def _processor_form(settings: _Settings, where: str) -> Iterator[Statement]:
    """Hugging Face's: image_mean, image_std, size (a side, {shortest_edge} or {height, width}), crop_size, resample."""
    values = settings.values
    factor = values.get("rescale_factor")
    if values.get("do_rescale", True) and factor is not None and not (_is_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-3)):
        raise settings.fail("rescale_factor", "1/255, of 8-bit values", ", ".join(FIELDS))
    plain = values.get("do_normalize") is False
    mean, std = settings.triple("mean", "image_mean", "mean"), settings.triple("std", "image_std", "std")
    if plain:
        mean, std = ((0.0,) * 3 if "mean" not in settings.given else None), ((1.0,) * 3 if "std" not in settings.given else None)
    interpolation, remark = settings.interpolation("resample", "interpolation")
    size, resize, stretched = _processor_size(settings)
    statement = Statement(
        where=where,
        override=PreprocessingOverride(size=size, resize=resize, interpolation=interpolation, mean=mean, std=std),
        crop_share=settings.crop_share("crop_pct") if resize is None else None,
        remark=_join_remarks(remark, stretched),
    )
    if statement.fields:
        yield statement


def _processor_size(settings: _Settings) -> tuple[tuple[int, int] | None, int | None, str]:
    """The crop's size, the shorter side before it, and a remark where the processor does not keep the aspect ratio."""
    values = settings.values
    cropped = values.get("do_center_crop") is not False and values.get("crop_size") not in (None, "")
    size = values.get("size") if values.get("do_resize") is not False else None
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else (size if cropped else None)
    if cropped:
        crop = settings.size("crop_size")
        if isinstance(size, Mapping) and shortest is None and settings.get("resize", "size") is not None:
            shortest = min(settings.sides("size"))
        return crop, None if shortest is None or "resize" in settings.given else settings.side("size", shortest), ""
    if size is None or settings.get("size", "size") is None:
        return None, None, ""
    if shortest is not None:
        side = settings.side("size", shortest)
        return (side, side), None if values.get("crop_pct") or "resize" in settings.given else side, ""
    height, width = settings.sides("size")
    resize = None if values.get("crop_pct") or "resize" in settings.given else min(height, width)
    return (height, width), resize, "centre-cropped where the processor stretches the whole image"


def _crop_mode(values: Mapping[str, Any]) -> str:
    mode = values.get("crop_mode")
    return f"centre crop in place of {mode}" if isinstance(mode, str) and mode not in ("", "center") else ""


def _join_remarks(*remarks: str) -> str:
    return ", ".join(remark for remark in remarks if remark)


def _parsed(text: str) -> Any:
    """JSON, or Python's literals, as in metadata written by `str(config)`; else the text itself."""
    if len(text) > _LONGEST:
        return text
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return parse(text)
    return text


def _numbers(value: object) -> list[float] | None:
    """Finite numbers of a number, a list of them, or words such as `0.485, 0.456, 0.406`."""
    if isinstance(value, str):
        words = [word for word in re.split(r"[\s,;()\[\]]+", value) if word]
        try:
            value = [float(word) for word in words]
        except ValueError:
            return None
    listed: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    return [float(number) for number in listed] if listed and all(_is_number(number) for number in listed) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
