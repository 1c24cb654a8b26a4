"""Every mode of Pillow becomes what Pillow itself makes of it, or is scaled by a range that is known, or is refused by name."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from importlib.metadata import PackageNotFoundError
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from harness.data import images as module
from harness.data.images import MAX_PIXELS, decode_labels, decode_rgb, to_rgb
from harness.errors import RequestError, SampleError

RAMP = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
EIGHT_BITS = ["1", "L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
SIXTEEN_BITS = ["I;16", "I;16B", "I;16L", "I;16N"]


def file(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png(depth: int, colour: int, values: np.ndarray) -> bytes:
    """A PNG of big-endian 16-bit or of 8-bit values [H, W, bands], which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def in_mode(mode: str) -> Image.Image:
    colours = Image.fromarray(COLOURS)
    if mode in ("RGBa", "La"):
        return colours.convert("RGBA" if mode == "RGBa" else "LA").convert(mode)
    if mode == "PA":
        return colours.convert("P").convert("PA")
    if mode == "LAB":
        return Image.frombytes("LAB", colours.size, colours.tobytes())
    return colours.convert(mode)


def words(mode: str, values: np.ndarray) -> Image.Image:
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    return Image.frombytes(mode, values.shape[::-1], values.astype(order).tobytes())


def test_every_mode_of_pillow_is_tested() -> None:
    assert {*EIGHT_BITS, *SIXTEEN_BITS, "I", "F"} == {*Image.MODES, "La", "RGBa", "I;16", "I;16B", "I;16L", "I;16N", "LA", "PA", "RGBX"}


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_eight_bits_become_what_pillow_makes_of_them(mode: str) -> None:
    image = in_mode(mode)
    assert image.mode == mode
    expected = np.asarray((image.convert("LA") if mode == "La" else image).convert("RGB"))
    got = to_rgb(image)
    assert np.array_equal(got, expected)
    assert got.flags.writeable
    assert got.dtype == np.uint8


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, "PNG") for mode in ("1", "L", "P", "LA", "RGB", "RGBA")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
        *((mode, "TIFF") for mode in ("PA", "CMYK", "YCbCr", "LAB")),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("RGB", "BMP"),
    ],
)
def test_files_of_eight_bits_become_what_pillow_makes_of_them(mode: str, kind: str) -> None:
    data = file(in_mode(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode_rgb(data), np.array(image.convert("RGB")))


@pytest.mark.parametrize("mode", SIXTEEN_BITS)
def test_grey_of_16_bits_keeps_its_contrast(mode: str) -> None:
    values = RAMP.astype(np.uint16) * 257
    assert np.array_equal(to_rgb(words(mode, values)), np.repeat(RAMP[..., None], 3, 2))
    every = np.arange(65536).reshape(256, 256)
    assert np.array_equal(to_rgb(words(mode, every))[..., 1], np.rint(every / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_files_of_16_bit_grey_keep_their_contrast(kind: str) -> None:
    data = file(RAMP.astype(np.uint16) * 257, kind)
    assert np.array_equal(decode_rgb(data), np.repeat(RAMP[..., None], 3, 2))


def pgm(values: np.ndarray, top: int) -> bytes:
    return b"P%d\n%d %d\n%d\n" % (5 if values.ndim == 2 else 6, values.shape[1], values.shape[0], top) + values.astype(">u2").tobytes()


def test_grey_whose_file_states_its_range_is_on_that_range_and_no_other() -> None:
    values = RAMP.astype(np.int64) * 4095 // 255
    expected = np.rint(values * 255 / 4095).astype(np.uint8)
    assert np.array_equal(decode_rgb(pgm(values, 4095))[..., 0], expected)
    assert np.array_equal(decode_rgb(pgm(values, 4095), value_range=(0, 4095))[..., 0], expected)  # the manifest's range is of the file's values
    assert np.array_equal(decode_rgb(pgm(values // 40, 4095), value_range=(0, 4095))[..., 0], np.rint(values // 40 * 255 / 4095).astype(np.uint8))
    assert np.array_equal(decode_rgb(pgm(values // 40, 4095))[..., 0], np.rint(values // 40 * 255 / 4095).astype(np.uint8))
    plain = b"P2\n3 1\n1000\n0 10 1000\n"
    assert decode_rgb(plain)[0, :, 0].tolist() == [0, 3, 255]
    with pytest.raises(SampleError, match=r"^16-bit grey of 0 to 4095: state `range: \[0, 4095\]`"):
        decode_rgb(pgm(values, 65535))  # which says nothing


def test_the_scale_is_the_types_and_never_the_pictures() -> None:
    dim, bright = (np.full((4, 4), value, np.uint16) for value in (16384, 60000))
    dim[0, 0] = 100
    assert decode_rgb(file(dim, "PNG"))[1, 1, 0] == round(16384 / 257)
    assert decode_rgb(file(bright, "PNG")).max() == decode_rgb(file(bright, "PNG")).min() == round(60000 / 257)
    assert not decode_rgb(file(np.zeros((4, 4), np.uint16), "PNG")).any()  # black on any scale


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.uint16) * 16, "16-bit grey of 0 to 4080: state `range: [0, 4095]` in the manifest"),
        (np.full((4, 4), 16383, np.uint16), "16-bit grey of 16383 to 16383: state `range: [0, 16383]` in the manifest"),
        (np.full((4, 4), 1, np.uint16), "16-bit grey of 1 to 1: state `range: [0, 255]` in the manifest"),
        (RAMP.astype(np.int32) * 257, "32-bit grey of 0 to 65535: state `range: [0, 65535]` in the manifest"),
        (RAMP.astype(np.int32) - 7, "32-bit grey of -7 to 248: state `range: [LOW, HIGH]` (the values of black and of white) in the manifest"),
        (np.zeros((4, 4), np.int32), "32-bit grey of 0 to 0: state `range: [0, 255]` in the manifest"),
        (RAMP.astype(np.float32) / 255, "grey in floating point of 0 to 1: state `range: [0, 1]` in the manifest"),
        (RAMP.astype(np.float32), "grey in floating point of 0 to 255: state `range: [0, 255]` in the manifest"),
        (
            RAMP.astype(np.float32) / 2,
            "grey in floating point of 0 to 127.5: state `range: [LOW, HIGH]` (the values of black and of white) in the manifest",
        ),
        (np.array([[0, np.nan]], np.float32), "grey in floating point with values that are not finite"),
        (np.array([[0, -np.inf]], np.float32), "grey in floating point with values that are not finite"),
    ],
)
def test_values_of_an_unknown_range_are_refused_by_name(values: np.ndarray, message: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_rgb(file(values, "TIFF"))
    assert str(caught.value) == message


def test_what_is_refused_is_counted_under_one_reason_whatever_its_range() -> None:
    reasons = set()
    for top in (2100, 3000, 4095):
        with pytest.raises(SampleError, match=f"of 0 to {top}:") as caught:
            decode_rgb(file(np.array([[0, top]], np.uint16), "PNG"))
        reasons.add(caught.value.reason)
    assert reasons == {"16-bit grey within 0 to 4095: state `range: [0, 4095]` in the manifest"}


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        (RAMP.astype(np.uint16) * 16, (0, 4080)),
        (RAMP.astype(np.uint16) * 257, (0, 65535)),
        (RAMP.astype(np.int32) * 1000 - 1000, (-1000, 254000)),
        (RAMP.astype(np.float32) / 255, (0, 1)),
        (RAMP.astype(np.float32) / 51 - 2.5, (-2.5, 2.5)),
    ],
)
def test_a_stated_range_is_what_black_and_white_are(values: np.ndarray, value_range: tuple[float, float]) -> None:
    assert np.array_equal(decode_rgb(file(values, "TIFF"), value_range=value_range)[..., 2], RAMP)


def test_values_beyond_the_stated_range_are_refused() -> None:
    with pytest.raises(SampleError, match=r"^16-bit grey of 0 to 65535, beyond the manifest's range of 0 to 4095$"):
        decode_rgb(file(RAMP.astype(np.uint16) * 257, "PNG"), value_range=(0, 4095))


def test_a_stated_range_leaves_eight_bits_alone() -> None:
    assert np.array_equal(decode_rgb(file(COLOURS, "PNG"), value_range=(0, 4095)), COLOURS)
    assert np.array_equal(decode_rgb(file(RAMP, "PNG"), value_range=(0, 4095))[..., 0], RAMP)


def test_grey_that_counts_from_white_is_refused() -> None:
    options = TiffImagePlugin.ImageFileDirectory_v2()
    data = file(RAMP.astype(np.uint16) * 257, "TIFF", tiffinfo=options)
    white = data.replace(struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert white != data
    with pytest.raises(SampleError, match="counts from white"):
        decode_rgb(white)


@pytest.mark.parametrize(("colour", "bands"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_is_read_where_it_uses_its_range(colour: int, bands: int) -> None:
    values = np.arange(8 * 8 * bands).reshape(8, 8, bands) * (65535 // (8 * 8 * bands))
    assert decode_rgb(png(16, colour, values)).max() > 200
    with pytest.raises(SampleError, match=r"^16-bit colour within 0 to 4095, which would come out black; save it with 8 bits a channel$"):
        decode_rgb(png(16, colour, values // 16))
    with pytest.raises(SampleError, match=r"^16-bit colour within 0 to 255, which would come out black"):
        decode_rgb(png(16, colour, values // 257))
    with pytest.raises(SampleError, match=r"16-bit colour, of which only values from 0 to 65535 are read"):
        decode_rgb(png(16, colour, values), value_range=(0, 4095))


def test_16_bit_colour_of_a_ppm_is_held_to_the_same() -> None:
    values = np.arange(8 * 8 * 3).reshape(8, 8, 3) * 341
    assert decode_rgb(pgm(values, 65535)).max() > 200
    assert decode_rgb(pgm(values // 16, 4095)).max() > 200  # its own range
    with pytest.raises(SampleError, match=r"^16-bit colour within 0 to [0-9]+, which would come out black"):
        decode_rgb(pgm(values // 16, 65535))


def test_16_bit_colour_is_what_pillow_makes_of_it() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (8, 8, 3))
    assert np.array_equal(decode_rgb(png(16, 2, values)), values >> 8)


def test_pictures_of_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    header = b"\x89PNG\r\n\x1a\n" + png(8, 2, np.zeros((1, 1, 3)))[8:]
    size = struct.pack(">IIBBBBB", 13500, 13500, 8, 2, 0, 0, 0)
    bomb = header[:8] + struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size)) + header[33:]
    limit = Image.MAX_IMAGE_PIXELS
    for decode in (decode_rgb, lambda data: decode_labels(data, "part.png")):
        with pytest.raises(SampleError, match=r"^too large: 13,500 × 13,500 pixels, at most 178,956,970; state a larger `max_pixels`") as caught:
            decode(bomb)
        assert "13,500" not in caught.value.reason
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_bound_of_pixels_can_be_moved_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_rgb(file(COLOURS, "PNG"), max_pixels=COLOURS.shape[0] * COLOURS.shape[1]).shape == COLOURS.shape
    with pytest.raises(SampleError, match="too large: 16 × 24 pixels, at most 383"):
        decode_rgb(file(COLOURS, "PNG"), max_pixels=383)
    limit_of_pillow = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own bound is not asked
    assert decode_rgb(file(COLOURS, "PNG")).shape == COLOURS.shape
    assert limit_of_pillow == MAX_PIXELS


@pytest.mark.parametrize(
    "error", [RuntimeError("avif"), TypeError("tag"), SystemError("tile"), struct.error("short"), RecursionError(), AssertionError()]
)
def test_whatever_a_decoder_raises_is_the_samples_own(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(SampleError, match=r"^broken image$"):
        decode_rgb(file(COLOURS, "PNG"))
    with pytest.raises(SampleError, match=r"^broken part\.png$"):
        decode_labels(file(RAMP, "PNG"), "part.png")


def test_a_picture_that_does_not_fit_into_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(SampleError, match=r"^image that does not fit into memory$"):
        decode_rgb(file(COLOURS, "PNG"))


def test_an_interruption_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(KeyboardInterrupt):
        decode_rgb(file(COLOURS, "PNG"))


def test_formats_that_run_other_programs_are_not_read() -> None:
    with pytest.raises(SampleError, match="image of a format that is not read: EPS"):
        decode_rgb(file(COLOURS, "EPS"))


def test_pillows_own_limit_is_back_whichever_threads_decode() -> None:
    limit, data = Image.MAX_IMAGE_PIXELS, file(COLOURS, "JPEG")
    threads = [threading.Thread(target=lambda: [decode_rgb(data) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("mode", [*EIGHT_BITS, *SIXTEEN_BITS, "I", "F"])
@pytest.mark.parametrize("shape", [(7, 90), (90, 7), (40, 40)])
def test_a_large_picture_is_converted_in_strips_as_it_would_be_whole(mode: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).integers(0, 65536, shape).astype(np.uint16)
    if mode in SIXTEEN_BITS:
        image = words(mode, values)
    elif mode in ("I", "F"):
        image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    else:
        image = in_mode(mode).resize(shape[::-1], Image.Resampling.NEAREST)
    whole = to_rgb(image, (0, 65535))
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 100)
    assert np.array_equal(to_rgb(image, (0, 65535)), whole)
    assert whole.shape == (*shape, 3)


# --- another decoder ----------------------------------------------------------------------------------------------------


def photograph(mode: str, **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((321, 243), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    coarse.convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"quality": 75}, {"quality": 95, "subsampling": 0}, {"quality": 90, "progressive": True}])
def test_torchcodec_gives_pillows_pixels(mode: str, options: dict[str, Any]) -> None:
    pytest.importorskip("torchcodec")
    data = photograph(mode, **options)
    np.testing.assert_array_equal(decode_rgb(data, decoder="torchcodec"), decode_rgb(data))


@pytest.mark.parametrize("damage", [lambda data: data[:200], lambda data: b"", lambda data: data[:100] + bytes(len(data) - 100)])
def test_what_torchcodec_cannot_decode_costs_its_sample(damage: Any) -> None:
    pytest.importorskip("torchcodec")
    with pytest.raises(SampleError, match="broken image"):
        decode_rgb(damage(photograph("RGB")), decoder="torchcodec")


def test_a_decoder_that_is_not_installed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", absent)
    assert module.decoder_version("pillow") is None
    with pytest.raises(RequestError, match=r"expected the package torchcodec, which is not installed; pip install 'partwise\[torchcodec\]'$"):
        module.decoder_version("torchcodec")
