"""A picture's bytes → 8-bit RGB, and a label map's bytes → labels: bounded in pixels, and never on a guessed scale.

Any error of Pillow on a file costs the sample that it belongs to, and nothing else.
"""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from harness.errors import HarnessError, RequestError, RunError, SampleError

MAX_PIXELS = 178_956_970
"""Maximum number of pixels of a picture or label map, unless its manifest states `max_pixels`: Pillow's own limit."""
Range = tuple[float, float]
"""The values of black and of white."""
Decoder = Literal["pillow", "torchcodec"]
"""What decodes JPEGs of 8-bit colour or grey; everything else is Pillow's."""

_CONVERTED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), ("RGB",)),
    "La": ("LA", "RGB"),  # Pillow has no direct way
}
"""Pillow's 8-bit modes, and the modes that each is converted to in turn."""


@dataclass(frozen=True, kw_only=True)
class _Grey:
    """A type of grey values wider than 8 bits."""

    name: str
    range: Range | None = None
    """The type's own range, where data sets use the whole of it."""
    is_fraction: bool = False
    """Whether values from 0 to 1 are usual."""
    is_stated: bool = False
    """Whether the file itself states its range, so that dark values are dark."""


_WORDS = _Grey(name="16-bit grey", range=(0, 65535))
_GREYS: Mapping[str, _Grey] = {
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), _WORDS),
    "I": _Grey(name="32-bit grey"),
    "F": _Grey(name="grey in floating point", is_fraction=True),
}
_WORDS_IN_INTEGERS = ("PNG", "PPM")
"""Formats of at most 16 bits, whose grey Pillow may give as mode I."""
_PPM_TOP = 65535
"""Pillow scales a PGM's or PPM's values of more than 8 bits from the file's range to this one; a file that states this range says nothing."""
_REACH = 1 / 4
"""16-bit values are taken to use the type's range if they exceed this share of it: 12 bits in 16, the usual other case, stay far below."""
_PROGRAMS = ("EPS",)
"""Formats that Pillow decodes with external programs."""
PIXELS_AT_ONCE = 2**22
_WHITE_IS_ZERO = 0  # of TIFF's tag PhotometricInterpretation
_WORD_MODES = re.compile(";16[BLN]")  # of Pillow's raw modes: RGB;16B, RGBA;16L, …, but not BGR;16, which is 5, 6 and 5 bits
_opening = threading.Lock()


def decoder_version(decoder: Decoder) -> str | None:
    """The version of a decoder's package, None for Pillow. Raises RequestError where it is not installed."""
    if decoder == "pillow":
        return None
    try:
        return version(decoder)
    except PackageNotFoundError:
        raise RequestError(f"resources.decoder: expected the package {decoder}, which is not installed; pip install 'partwise[{decoder}]'") from None


def decode_rgb(data: bytes, *, value_range: Range | None = None, max_pixels: int = MAX_PIXELS, decoder: Decoder = "pillow") -> np.ndarray:
    """uint8 [H, W, 3] of a JPEG, PNG, WebP or another format that Pillow reads; `value_range` is that of grey values wider than 8 bits.

    Grey, palette and CMYK images become RGB as Pillow converts them, alpha is dropped, and, as in the pipelines that the published numbers come from,
    neither an EXIF rotation nor a colour profile is applied. Raises SampleError where the image is broken, too large, or has values of unknown
    range.
    """
    with decoding("image"), _opened(data, max_pixels) as image:
        if decoder == "torchcodec" and image.format == "JPEG" and image.mode in ("RGB", "L"):
            return _by_torchcodec(data)
        return to_rgb(image, value_range)


def _by_torchcodec(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a JPEG. Raises RunError where this process, unlike the one that planned the run, has no torchcodec."""
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError as error:
        raise RunError(f"resources.decoder: expected torchcodec on every node, got: {error}; pip install 'partwise[torchcodec]'") from error
    pixels: np.ndarray = decode_jpeg(data, mode="RGB").permute(1, 2, 0).numpy()
    return pixels


def decode_labels(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 or uint16 [H, W] of a PNG of one channel, the member `name`. Raises SampleError where it is not one, or too large."""
    with decoding(name), _opened(data, max_pixels, ("PNG",)) as image:
        labels: np.ndarray = np.asarray(image).astype(np.uint16 if image.mode.startswith("I") else np.uint8)
    if labels.ndim != 2:
        raise SampleError(f"{name} of more than one channel")
    return labels


@contextmanager
def decoding(member: str) -> Iterator[None]:
    """Turn any error in the block into a SampleError about one sample's member."""
    try:
        yield
    except HarnessError:
        raise
    except MemoryError as error:
        raise SampleError(f"{member} that does not fit into memory") from error
    except Exception as error:  # a damaged file breaks decoders in many ways: OSError, RuntimeError, TypeError, SystemError, struct.error …
        raise SampleError(f"broken {member}") from error


@contextmanager
def _opened(data: bytes, max_pixels: int, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """An image of which only the header was read, of at most `max_pixels`."""
    with _opening:  # Pillow's limit is global, and its error names neither height nor width
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise SampleError(
                f"too large: {height:,} × {width:,} pixels, at most {max_pixels:,}; state a larger `max_pixels` in the manifest to read it",
                reason=f"too large: more than {max_pixels:,} pixels; state a larger `max_pixels` in the manifest to read it",
                detail=f"{height:,} × {width:,}",
            )
        if not width * height:
            raise SampleError("image without pixels")
        if image.format in _PROGRAMS:
            raise SampleError(f"image of a format that is not read: {image.format}")
        yield image


def to_rgb(image: Image.Image, value_range: Range | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of an image of any of Pillow's modes. Raises SampleError for values whose range is not known."""
    if image.mode in _GREYS:
        return _grey(image, value_range)
    if image.mode not in _CONVERTED:
        raise SampleError(f"image of a mode that is not read: {image.mode}")
    if _halved(image):
        _check_colour(image, value_range)
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for where, strip in _strips(image):
        rgb[where] = np.asarray(_converted(strip))
    return rgb


def _converted(image: Image.Image) -> Image.Image:
    for mode in _CONVERTED[image.mode]:
        image = image if image.mode == mode else image.convert(mode)
    return image


def _strips(image: Image.Image) -> Iterator[tuple[tuple[slice, slice], Image.Image]]:
    """(rows and columns, part) of an image, across its longer side: conversions and copies of a large image would take several times its memory."""
    width, height = image.size
    if width * height <= PIXELS_AT_ONCE:
        yield (slice(None), slice(None)), image
        return
    step = max(1, PIXELS_AT_ONCE // min(width, height))
    for start in range(0, max(width, height), step):
        right, low = (width, min(start + step, height)) if height >= width else (min(start + step, width), height)
        left, top = (0, start) if height >= width else (start, 0)
        yield (slice(top, low), slice(left, right)), image.crop((left, top, right, low))


def _halved(image: Image.Image) -> bool:
    """Whether the file has 16 bits per channel, of which Pillow keeps the upper 8."""
    if _ppm_top(image) == _PPM_TOP:
        return True
    return isinstance(image, ImageFile.ImageFile) and any(_WORD_MODES.search(str(tile.args)) for tile in image.tile)


def _ppm_top(image: Image.Image) -> int | None:
    """The value of white that a PGM's or PPM's header states, for a file not read yet; None for other formats, and where Pillow scales nothing."""
    if not isinstance(image, ImageFile.ImageFile) or image.format != "PPM":
        return None
    return next((int(tile.args[-1]) for tile in image.tile if tile.codec_name in ("ppm", "ppm_plain") and isinstance(tile.args, tuple)), None)


def _check_colour(image: Image.Image, value_range: Range | None) -> None:
    """16-bit colour comes as its upper 8 bits: correct where it uses the whole range, and beyond repair where it does not."""
    extrema = image.getextrema()
    bands = [extrema] if len(image.getbands()) == 1 else extrema
    tops = [int(high) for name, (_, high) in zip(image.getbands(), bands, strict=True) if name not in "AaX"]  # type: ignore[misc, arg-type]
    if value_range not in (None, _WORDS.range):
        raise SampleError("16-bit colour, of which only values from 0 to 65535 are read; save it with 8 bits a channel")
    if max(tops) <= 255 * _REACH:  # upper halves of 0 may be black, or values up to 255
        top = _power(max(tops) * 256 + 255)
        raise SampleError(f"16-bit colour within 0 to {top:.0f}, which would come out black; save it with 8 bits a channel")


def _grey(image: Image.Image, value_range: Range | None) -> np.ndarray:
    """uint8 [H, W, 3] of wide grey values: 255 (v - low) / (high - low), rounded; of 16 bits and their own range that is v / 257."""
    kind, top = _GREYS[image.mode], _ppm_top(image)
    if image.mode == "I" and image.format in _WORDS_IN_INTEGERS:
        kind = _WORDS if top in (None, _PPM_TOP) else _Grey(name=f"grey of 0 to {top}", range=(0, top), is_stated=True)
    unit = 1.0 if top is None else top / _PPM_TOP
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == _WHITE_IS_ZERO:
        raise SampleError(f"{kind.name} that counts from white (TIFF's PhotometricInterpretation 0); save it counting from black")
    low, high = _checked_range(image, kind, value_range, unit)
    grey = np.empty((image.height, image.width, 3), np.uint8)
    for where, strip in _strips(image):
        values = _values(strip, unit)
        grey[where] = np.floor((values - low) * (255 / (high - low)) + 0.5)[..., None]
    return grey


def _values(image: Image.Image, unit: float) -> np.ndarray:
    """float64 [H, W] of grey, as in the file: one step of Pillow's values is `unit` steps of the file's."""
    values: np.ndarray = np.asarray(image).astype(np.float64)
    return values if unit == 1 else np.rint(values * unit)


def _checked_range(image: Image.Image, kind: _Grey, value_range: Range | None, unit: float) -> Range:
    """The values of black and of white. Raises SampleError where they are unknown, or do not fit this image."""
    extremes = [(float(part.min()), float(part.max())) for part in (_values(strip, unit) for _, strip in _strips(image))]
    low, high = min(least for least, _ in extremes), max(most for _, most in extremes)
    if not all(math.isfinite(value) for pair in extremes for value in pair):
        raise SampleError(f"{kind.name} with values that are not finite")
    if value_range is None:
        return _own_range(kind, low, high)
    if low < value_range[0] or high > value_range[1]:
        raise SampleError(
            f"{kind.name} of {low:g} to {high:g}, beyond the manifest's range of {value_range[0]:g} to {value_range[1]:g}",
            reason=f"{kind.name} beyond the manifest's range of {value_range[0]:g} to {value_range[1]:g}",
            detail=f"{low:g} to {high:g}",
        )
    return value_range


def _own_range(kind: _Grey, low: float, high: float) -> Range:
    """The type's range, where values from `low` to `high` use it. Raises SampleError, with the remedy, where they may be on another scale."""
    if kind.range is not None and (kind.is_stated or high == 0 or high > kind.range[1] * _REACH):  # zero alone is black on any scale
        return kind.range
    seen = f"{low:.9g} to {high:.9g}"
    as_fraction = kind.is_fraction and 0 < high <= 1
    if low < 0 or not (as_fraction or high.is_integer()):
        within, stated = "whose range is not known", "[LOW, HIGH]` (the values of black and of white)"
    else:
        top = 1.0 if as_fraction else _power(high)
        within, stated = f"within 0 to {top:.0f}", f"[0, {top:.0f}]`"
    remedy = f"state `range: {stated} in the manifest"
    raise SampleError(f"{kind.name} of {seen}: {remedy}", reason=f"{kind.name} {within}: {remedy}", detail=seen)


def _power(value: float) -> float:
    """The largest value of the smallest number of bits, 8 or more, that holds `value`."""
    return 2.0 ** max(8, int(value).bit_length()) - 1
