"""The front door against Pillow: upright, white behind transparency, or one clear ImageError."""

from __future__ import annotations

import contextlib
import io
import os
import random
import stat
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageFile, ImageOps

from edgevlm import image
from edgevlm.errors import ImageError

ORIENTATION = 0x0112


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """Smooth random colours, so that lossy codecs keep them recognisable; alpha included."""
    seed = np.random.default_rng(7).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    rgba = Image.fromarray(seed).resize((width, height), Image.Resampling.BICUBIC)
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


def encoded(source: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, kind, **options)
    return buffer.getvalue()


def heic(source: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(source).save(buffer, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def pillow(data: bytes) -> np.ndarray:
    """Pillow's own upright RGB."""
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


def on_white(rgba: Image.Image) -> np.ndarray:
    values = np.asarray(rgba.convert("RGBA")).astype(np.float64)
    alpha = values[..., 3:] / 255
    return np.rint(values[..., :3] * alpha + 255 * (1 - alpha))


def chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(
    width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 2, extra: bytes = b""
) -> bytes:
    """A PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def formats() -> dict[str, bytes]:
    rgb, rgba = picture(), picture(mode="RGBA")
    turned, second = exif(6), [picture().rotate(9)]
    grey16 = Image.fromarray(np.asarray(rgba)[..., 0].astype(np.uint16) * 257)
    return {
        "jpeg": encoded(rgb, "JPEG", exif=turned),
        "jpeg-progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg-cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "jpeg-grey": encoded(rgb.convert("L"), "JPEG"),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=second),
        "png": encoded(rgba, "PNG", exif=turned),
        "png-palette": encoded(rgb.quantize(16), "PNG", transparency=3),
        "png-16": encoded(grey16, "PNG"),
        "apng": encoded(rgba, "PNG", save_all=True, append_images=[rgba.rotate(9)]),
        "gif": encoded(rgb, "GIF", save_all=True, append_images=second, disposal=2),
        "webp": encoded(rgba, "WEBP", exif=turned),
        "webp-lossless": encoded(rgb, "WEBP", lossless=True),
        "webp-animated": encoded(rgb, "WEBP", save_all=True, append_images=second),
        "bmp": encoded(rgb, "BMP"),
        "ppm": encoded(rgb, "PPM"),
        "tiff": encoded(rgb, "TIFF", exif=turned),
        "tiff-lzw": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": encoded(rgb, "TIFF", compression="jpeg"),
        "avif": encoded(rgba, "AVIF", exif=turned),
        "heic": heic(rgb),
    }


FORMATS = formats()


# ------------------------------------------------------------------------------- right pixels


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "heic"])
def test_every_format_equals_pillow(kind: str) -> None:
    data = FORMATS[kind]
    pixels = image.load(data)
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.has_transparency_data:
            # 1: Pillow's compositing rounds in integers
            assert np.abs(pixels - on_white(upright)).max() <= 1
        elif kind == "png-16":
            assert (pixels == np.asarray(picture(mode="RGBA"))[..., :1]).all()
        else:
            assert (pixels == np.asarray(upright.convert("RGB"))).all()
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous


def test_heic_equals_pillow_heif() -> None:
    reference = pillow_heif.open_heif(FORMATS["heic"]).to_pillow().convert("RGB")
    assert (image.load(FORMATS["heic"]) == np.asarray(reference)).all()


def test_heic_support_is_not_registered_with_the_host() -> None:
    code = (
        "import sys; from PIL import Image; from edgevlm import image; "
        "image.load(sys.stdin.buffer); Image.init(); print('HEIF' in Image.OPEN)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=FORMATS["heic"], capture_output=True)
    assert done.stdout.strip() == b"False", done.stderr


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    data = encoded(picture(61, 40), kind, exif=exif(orientation))
    photo = image.open_image(data)
    expected = pillow(data)
    assert (photo.height_px, photo.width_px) == expected.shape[:2]
    assert (photo.pixels() == expected).all()


def test_heic_orientation_is_applied_once() -> None:
    upright = picture(640, 480)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    # pillow_heif writes the orientation twice: as EXIF and as the container's rotation
    photo = image.open_image(heic(stored, quality=-1, exif=exif(6).tobytes()))
    assert (photo.height_px, photo.width_px) == (480, 640)
    # 8: HEVC through YCbCr 4:2:0; a wrong turn is off by about 60
    assert np.abs(photo.pixels().astype(int) - np.asarray(upright)).mean() < 8


def test_orientation_behind_the_png_data_is_found_without_decoding() -> None:
    data = encoded(picture(20, 10), "PNG")
    late = data[:-12] + chunk(b"eXIf", exif(6).tobytes()[6:]) + data[-12:]
    photo = image.open_image(late)
    assert (photo.height_px, photo.width_px) == (20, 10)
    assert (photo.pixels() == pillow(late)).all()


@pytest.mark.parametrize("value", [0, 9, 255])
def test_unknown_orientation_is_ignored(value: int) -> None:
    data = encoded(picture(), "JPEG", exif=exif(value))
    assert (image.load(data) == pillow(encoded(picture(), "JPEG"))).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_cost_the_photo() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert image.load(data).shape == (48, 64, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    source = picture(mode="RGBA").convert(mode)
    pixels = image.load(encoded(source, "PNG"))
    assert np.abs(pixels - on_white(source)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_alpha_of_pillow_images_in_rare_modes(mode: str) -> None:
    rgba = picture(mode="RGBA")
    route = {"RGBa": ["RGBa"], "La": ["LA", "La"], "PA": ["LA", "PA"]}[mode]
    source = rgba
    for step in route:
        source = source.convert(step)
    straight = source.convert("LA" if mode == "La" else "RGBA")
    assert np.abs(image.load(source) - on_white(straight)).max() <= 1


def test_palette_with_an_alpha_per_entry() -> None:
    source = picture().quantize(8)
    data = encoded(source, "PNG", transparency=bytes(range(0, 256, 32)))
    with Image.open(io.BytesIO(data)) as opened:
        expected = on_white(opened.convert("RGBA"))
    assert np.abs(image.load(data) - expected).max() <= 1


def transparency(values: list[int]) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def test_transparent_colour_of_true_colour_and_grey() -> None:
    rgb = png(2, 1, b"\0\x01\x02\x03\x04\x05\x06", extra=transparency([1, 2, 3]))
    assert image.load(rgb).tolist() == [[[255] * 3, [4, 5, 6]]]
    grey = png(2, 1, b"\0\x07\x08", colour=0, extra=transparency([8]))
    assert image.load(grey).tolist() == [[[7] * 3, [255] * 3]]


def test_transparent_colour_at_other_depths() -> None:
    """PNG 1.2, 4.2.1.1: the colour is given at the picture's own depth."""
    two_bits = png(4, 1, b"\0\x1b", bits=2, colour=0, extra=transparency([1]))
    assert image.load(two_bits)[0, :, 0].tolist() == [0, 255, 170, 255]
    one_bit = png(8, 1, b"\0\x0f", bits=1, colour=0, extra=transparency([0]))
    assert image.load(one_bit)[0, :, 0].tolist() == [255] * 8
    grey16 = struct.pack(">3H", 1000, 257 * 100, 65535)
    data = png(3, 1, b"\0" + grey16, bits=16, colour=0, extra=transparency([1000]))
    assert image.load(data)[0, :, 0].tolist() == [255, 100, 255]
    rgb16 = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0, 0)
    key = transparency([0x1234, 0x5678, 0x9ABC])
    data = png(2, 1, b"\0" + rgb16, bits=16, extra=key)
    assert image.load(data).tolist() == [[[255] * 3, [0] * 3]]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257)  # 257 = 65535 / 255
    pgm = b"P5 256 256 65535\n" + values.astype(">u2").tobytes()
    tiff = encoded(Image.fromarray(values), "TIFF")
    for source in (encoded(Image.fromarray(values), "PNG"), tiff, pgm, Image.fromarray(values)):
        assert (image.load(source)[..., 1] == expected).all()


def test_16_bit_colour_keeps_the_high_byte() -> None:
    data = png(1, 1, b"\0" + struct.pack(">3H", 65535, 0x8000, 0x00FF), bits=16)
    assert image.load(data).tolist() == [[[255, 128, 0]]]


def test_12_bit_tiff_is_scaled_by_its_own_white() -> None:
    packed = bytes([0xFF, 0xF8, 0x00])  # 4095, 2048
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1)]
    entries = b"".join(
        struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in [*tags, (279, 3)]
    )
    data = struct.pack("<2sHIH", b"II", 42, 8, 9) + entries + bytes(4)
    assert len(data) == 122
    assert image.load(data + packed)[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_pillow_images_of_other_modes(mode: str) -> None:
    source = picture(mode=mode)
    assert (image.load(source) == np.asarray(source.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_values_are_refused(mode: str) -> None:
    source = picture(mode="L").convert(mode)
    with pytest.raises(ImageError, match="without a stated range"):
        image.load(source)
    with pytest.raises(ImageError, match="without a stated range"):
        image.load(encoded(source, "TIFF"))


def test_adobe_inverted_cmyk_and_ycck_give_the_right_colours() -> None:
    source = picture()
    cmyk = encoded(source.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in cmyk
    # mean 4: JPEG loss; an inverted or misread picture is off by about 100
    assert np.abs(image.load(cmyk).astype(int) - np.asarray(source)).mean() < 4
    assert (image.load(cmyk) == pillow(cmyk)).all()
    at = cmyk.index(b"Adobe") + 11  # the transform byte: 2 says YCCK
    ycck = cmyk[:at] + b"\x02" + cmyk[at + 1 :]
    assert (image.load(ycck) == pillow(ycck)).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_the_first_frame_of_many(kind: str) -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    data = encoded(red, kind, save_all=True, append_images=[blue])
    assert image.load(data)[8, 8, 0] > 200 and image.load(data)[8, 8, 2] < 60


def test_uint8_arrays() -> None:
    rgba = np.asarray(picture(mode="RGBA"))
    grey = np.ascontiguousarray(rgba[..., 0])
    assert (image.load(grey) == grey[..., None]).all()
    assert (image.load(grey[..., None]) == grey[..., None]).all()
    assert (image.load(rgba[..., :3]) == rgba[..., :3]).all()
    assert image.load(rgba[::2, ::-1, :3]).flags.c_contiguous
    assert np.abs(image.load(rgba) - on_white(picture(mode="RGBA"))).max() <= 1


def test_sources_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FORMATS["jpeg"]
    path = tmp_path / "really a JPEG.png"
    path.write_bytes(data)
    expected = pillow(data)
    written = io.BytesIO()
    written.write(data)  # stands at its end, as after a download
    for source in (str(path), path, data, bytearray(data), memoryview(data), written):
        assert (image.load(source) == expected).all()
    with path.open("rb") as opened, Image.open(path) as lazy:
        assert (image.load(opened) == expected).all() and not opened.closed
        assert (image.load(lazy) == expected).all()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert (image.load("-") == expected).all()


def test_a_named_pipe_that_trickles(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            for start in range(0, len(FORMATS["jpeg"]), 100):
                pipe.write(FORMATS["jpeg"][start : start + 100])

    writer = threading.Thread(target=write)
    writer.start()
    photo = image.open_image(path)
    writer.join()
    assert (photo.pixels() == photo.pixels()).all() and photo.name == str(path)


# --------------------------------------------------------------------------------- the header


@pytest.mark.parametrize("kind", FORMATS)
def test_opening_reports_the_size_and_decodes_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = image.load(FORMATS[kind]).shape[:2]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    photo = image.open_image(FORMATS[kind])
    assert (photo.height_px, photo.width_px) == expected


def test_no_handle_stays_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    for kind, data in FORMATS.items():
        path = tmp_path / kind
        path.write_bytes(data)
        before = len(list(descriptors.iterdir()))
        photo = image.open_image(path)
        photo.pixels()
        assert len(list(descriptors.iterdir())) == before, kind


def test_a_file_that_changes_under_us_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(FORMATS["bmp"])
    photo = image.open_image(path)
    path.write_bytes(encoded(picture(20, 20), "BMP"))
    with pytest.raises(ImageError, match="changed"):
        photo.pixels()
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        photo.pixels()


def test_pixel_limit_comes_before_decoding() -> None:
    bomb = png(60_000, 60_000, b"")
    with pytest.raises(ImageError, match=r"60000 × 60000 px \(3600 megapixels\), expected at most"):
        image.open_image(bomb)
    assert image.load(FORMATS["bmp"], max_pixels=64 * 48).shape == (48, 64, 3)
    for source in (*FORMATS.values(), picture(), np.asarray(picture())):
        with pytest.raises(ImageError, match="megapixels"):
            image.open_image(source, max_pixels=64 * 48 - 1)


def test_the_default_limit_passes_a_60_megapixel_panorama_and_not_more_than_100() -> None:
    assert image.open_image(png(20_000, 3_000, b"")).width_px == 20_000
    assert image.open_image(png(10_000, 10_000, b"")).width_px == 10_000
    with pytest.raises(ImageError, match="megapixels"):
        image.open_image(png(10_001, 10_000, b""))


def test_pillows_process_wide_limit_neither_applies_nor_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = picture(1200, 900)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "AVIF"):
        assert image.load(encoded(source, kind)).shape == (900, 1200, 3)
    assert image.load(encoded(source, "TIFF", compression="tiff_lzw")).shape == (900, 1200, 3)
    assert Image.MAX_IMAGE_PIXELS == 300_000
    data = encoded(source, "WEBP")  # its plug-in may ask for itself: then an error of ours
    with contextlib.suppress(ImageError):
        assert image.load(data).shape == (900, 1200, 3)


# ------------------------------------------------------------------------- smaller than stored


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("at_least", [(1, 1), (37, 29), (60, 80), (100, 81), (480, 641), (999, 9)])
def test_reduced_decode_never_falls_below(at_least: tuple[int, int], orientation: int) -> None:
    data = encoded(picture(641, 479), "JPEG", exif=exif(orientation))
    photo = image.open_image(data)
    full = photo.pixels()
    small = photo.pixels(at_least)
    for side, whole, wanted in zip(small.shape, full.shape, at_least, strict=False):
        assert side >= min(wanted, whole)
    scale = max(s for s in (1, 2, 4, 8) if s == 1 or all(
        whole // s >= wanted for whole, wanted in zip(full.shape, at_least, strict=False)
    ))  # fmt: skip
    assert small.shape == (-(-full.shape[0] // scale), -(-full.shape[1] // scale), 3)
    if scale == 1:
        assert (small == full).all()


def test_reduced_decode_looks_the_same() -> None:
    data = encoded(picture(640, 480), "JPEG", exif=exif(8))
    photo = image.open_image(data)
    full = Image.fromarray(photo.pixels())
    expected = np.asarray(full.resize((240, 320), Image.Resampling.BOX)).astype(int)
    # 3: the DCT's low frequencies against a box average, on a smooth picture
    assert np.abs(photo.pixels((300, 200)) - expected).mean() < 3


def test_other_formats_ignore_at_least() -> None:
    for kind in ("png", "webp", "heic", "tiff-jpeg"):
        photo = image.open_image(FORMATS[kind])
        assert (photo.pixels((1, 1)) == photo.pixels()).all()


def test_at_least_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at_least"):
        image.open_image(FORMATS["jpeg"]).pixels((0, 3))


# ------------------------------------------------------------------------------------ refusals

NO_PHOTOS = {
    b"": "an empty file",
    bytes(5000): "zero bytes",
    b"Dear diary, caf\xc3\xa9": "plain text",
    b"BMW is a make of car": "plain text",
    b"P6 is a format": "cannot be read",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG drawing",
    b"<?xml version='1.0'?>\n<svg/>": "an SVG drawing",
    b"\n<!DOCTYPE html><p>404": "a web page",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"%PDF-1.7\n\xe2\xe3": "a PDF file",
    b"%!PS-Adobe-3.0 EPSF-3.0\n": "a PostScript file",
    b"8BPS\0\1": "a Photoshop file",
    b"PK\x03\x04\x14": "a ZIP archive",
    b"\0\0\0\x18ftypisom\0\0\2\0isomavc1": "an MP4 video",
    b"\0\0\0\x14ftypqt  \0\0\2\0qt  ": "a QuickTime video",
    b"\x1aE\xdf\xa3\x01": "a Matroska or WebM video",
    b"RIFF\0\0\0\0AVI LIST": "an AVI video",
    b"II*\0\x10\0\0\0CR\2\0": "a Canon CR2 raw file",
    b"\xff\x0a\xfa\x1f": "a JPEG XL file",
    b"\x81\x82\x83\x84": r"unknown data \(it starts with 81 82 83 84\)",
}


@pytest.mark.parametrize(("data", "found"), NO_PHOTOS.items(), ids=list(NO_PHOTOS.values()))
def test_what_is_no_photo_is_named(data: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=found) as caught:
        image.open_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: found ") and ", expected a " in message and ": " in message
    assert "\n" not in message and caught.value.exit_code == 4


def test_paths_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[Any, str]] = [
        (tmp_path / "missing.jpg", "found no such file"),
        ("https://example.org/a.jpg", "found a URL"),
        (tmp_path, "found a folder"),
        ("a\0b", "null"),
        ("x" * 5000, "name too long"),
        (tmp_path / "a\nb.jpg", r"a\\nb.jpg': found no such file"),
    ]
    for source, found in cases:
        with pytest.raises(ImageError, match=found) as caught:
            image.open_image(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    path = tmp_path / "secret.jpg"
    path.touch()

    def refuse(*_: Any, **__: Any) -> Any:  # root may read everything, so the mode bits do not do
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match="may not be read"):
        image.open_image(path)


def test_stdin_empty_closed_or_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    with pytest.raises(ImageError, match="<stdin>: found an empty file"):
        image.open_image("-")
    terminal = io.BytesIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    for stdin in (None, SimpleNamespace(buffer=terminal)):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(ImageError, match="no piped data"):
            image.open_image("-")


class Endless(io.RawIOBase):
    """A stream that begins like a photo and never stops."""

    def __init__(self, start: bytes) -> None:
        self.start = start
        self.given_bytes = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        part = self.start if not self.given_bytes else bytes(size)
        self.given_bytes += len(part)
        return part


def test_endless_streams_end() -> None:
    photo = Endless(FORMATS["jpeg"][:4096].ljust(4096, b"\0"))
    with pytest.raises(ImageError, match="more than 64 MiB of data"):
        image.open_image(photo, max_pixels=100)
    text = Endless(b"yes\n" * 1024)
    with pytest.raises(ImageError, match="plain text"):
        image.open_image(text)
    assert text.given_bytes == 4096


def test_programming_mistakes_are_type_and_value_errors() -> None:
    with pytest.raises(TypeError, match="found an array of float32, expected uint8"):
        image.open_image(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"\[3, 40, 40\].*channels last"):
        image.open_image(np.zeros((3, 40, 40), np.uint8))
    for source in (5, None, io.StringIO("text")):
        with pytest.raises(TypeError, match="an image is a path"):
            image.open_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0), (0, 0, 4)])
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="expected some pixels"):
        image.open_image(np.zeros(shape, np.uint8))


def test_empty_and_closed_pillow_images() -> None:
    with pytest.raises(ImageError, match="expected some pixels"):
        image.open_image(Image.new("RGB", (0, 5)))
    closed = picture()
    closed.close()
    with pytest.raises(ImageError, match="cannot be read"):
        image.load(closed)


def test_heic_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC.*pip install edgevlm\[heif\]"):
        image.open_image(FORMATS["heic"])


def test_a_codec_that_pillow_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import AvifImagePlugin

    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(ImageError, match=r"AVIF.*pip install -U pillow"):
        image.open_image(FORMATS["avif"])


def test_camera_raw_files_that_open_with_a_thumbnail_are_refused() -> None:
    data = encoded(picture(16, 12), "TIFF", tiffinfo={254: 1})
    with pytest.raises(ImageError, match="camera's raw file"):
        image.open_image(data)


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_png_metadata_bombs(name: bytes) -> None:
    packed = zlib.compress(bytes(80_000_000))
    body = b"k\0\1\0\0\0" + packed if name == b"iTXt" else b"k\0\0" + packed
    with pytest.raises(ImageError, match="too large"):
        image.open_image(png(1, 1, b"\0\0\0\0", extra=chunk(name, body)))


def test_host_that_allows_half_pictures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        image.load(FORMATS["jpeg"])


def test_errors_chain_their_cause() -> None:
    with pytest.raises(ImageError) as caught:
        image.load(FORMATS["png"][:200])
    assert isinstance(caught.value.__cause__, OSError | SyntaxError | ValueError)


# ---------------------------------------------------------------------------- damaged files


def result(data: bytes) -> np.ndarray | None:
    """None for an ImageError of one line; any other exception fails the test."""
    try:
        photo = image.open_image(data)
        pixels = photo.pixels()
    except ImageError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        return None
    assert pixels.shape == (photo.height_px, photo.width_px, 3) and pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_an_error_and_never_half_a_picture(kind: str) -> None:
    data, whole = FORMATS[kind], image.load(FORMATS[kind])
    rng = random.Random(f"cut {kind}")
    ends = [0, 1, 2, 3, 8, 12, 16, len(data) // 2, *(rng.randrange(len(data)) for _ in range(20))]
    for end in ends:
        pixels = result(data[:end])
        # what is cut off may be a later frame or metadata: then the picture is whole
        assert pixels is None or np.array_equal(pixels, whole), end
    first_frame_only = kind in ("mpo", "gif", "webp-animated", "apng", "tiff")
    assert first_frame_only or result(data[: len(data) // 2]) is None


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)


def lie_in_the_header(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(min(len(data), 400))] = rng.choice((0, 1, 127, 128, 255))


def drop(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 64)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", [flip, lie_in_the_header, drop])
def test_damaged_files_give_a_picture_or_an_image_error(
    kind: str, damage: Callable[[bytearray, random.Random], None]
) -> None:
    rng = random.Random(f"{damage.__name__} {kind}")
    for _ in range(15):
        data = bytearray(FORMATS[kind])
        damage(data, rng)
        with warnings.catch_warnings():
            # Pillow remarks on odd metadata; the host's filters decide about that, not we
            warnings.simplefilter(rng.choice(("ignore", "error")))
            result(bytes(data))


def test_threads() -> None:
    expected = {kind: image.load(data) for kind, data in FORMATS.items()}
    with ThreadPoolExecutor(8) as pool:
        for kind, pixels in pool.map(lambda k: (k, image.load(FORMATS[k])), list(FORMATS) * 5):
            assert np.array_equal(pixels, expected[kind])


def test_a_character_device_is_read_as_a_stream() -> None:
    assert stat.S_ISCHR(Path("/dev/zero").stat().st_mode)
    with pytest.raises(ImageError, match="zero bytes"):
        image.open_image("/dev/zero")
