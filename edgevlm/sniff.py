"""What a file is, by its first bytes and never by its name.

Enters: the first HEAD_BYTES of a file. Leaves: the format of a photo that can be decoded here, or
an ImageError that names what was found instead and says what its owner can do.
"""

from __future__ import annotations

import codecs

from edgevlm.errors import ImageError

HEAD_BYTES = 4096

_PHOTOS = (  # the first bytes, the format
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
)
_BMP_HEADER_BYTES = {12, 40, 52, 56, 64, 108, 124}  # the versions of BITMAPINFOHEADER
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_ANY_CODEC_BRANDS = {b"mif1", b"msf1"}

_CONVERT = "convert it to JPEG or PNG"
_DEVELOP = "develop it to JPEG"
_RENDER = "render it to PNG"
_TAKE_A_FRAME = "take a frame out of it"
_UNPACK = "take the photo out of it"
_CHECK = "check that it is the right file"

_OTHERS = (  # offset, the bytes there, what that is, what to do
    (0, b"%PDF", "a PDF file", "render the page to PNG"),
    (0, b"%!PS", "a PostScript file", "render the page to PNG"),
    (0, b"8BPS", "a Photoshop file", _CONVERT),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL file", _CONVERT),
    (0, b"\xff\x0a", "a JPEG XL file", _CONVERT),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 file", _CONVERT),
    (0, b"\0\0\x01\0", "a Windows icon", _CONVERT),
    (128, b"DICM", "a DICOM file", _CONVERT),
    (8, b"CR\2", "a Canon CR2 raw file", _DEVELOP),
    (4, b"ftypcrx", "a Canon CR3 raw file", _DEVELOP),
    (0, b"FUJIFILMCCD-RAW", "a Fujifilm raw file", _DEVELOP),
    (0, b"IIU\0", "a Panasonic raw file", _DEVELOP),
    (0, b"IIRO", "an Olympus raw file", _DEVELOP),
    (4, b"ftypqt", "a QuickTime video", _TAKE_A_FRAME),
    (4, b"ftypM4A", "an MP4 sound file", _CHECK),
    (4, b"ftyp", "an MP4 video", _TAKE_A_FRAME),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video", _TAKE_A_FRAME),
    (8, b"AVI ", "an AVI video", _TAKE_A_FRAME),
    (8, b"WAVE", "a WAV sound file", _CHECK),
    (0, b"ID3", "an MP3 sound file", _CHECK),
    (0, b"PK\x03\x04", "a ZIP archive (or an Office document)", _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"GGUF", "a GGUF model", _CHECK),
)
_TEXTS = (  # found in the text, in lower case; a web page may hold an SVG drawing
    ("<!doctype html", "a web page (HTML)", "download the photo itself"),
    ("<html", "a web page (HTML)", "download the photo itself"),
    ("<svg", "an SVG drawing", _RENDER),
    ("version https://git-lfs", "a Git LFS pointer", "run git lfs pull"),
)


def photo_format(head: bytes, name: str) -> str:
    """Find the format of a photo by Pillow's name for it.

    Raises: ImageError if the file called `name` is anything else.
    """
    found = _photo_format(head)
    if found is None:
        raise _no_photo(name, *_describe(head))
    return found


def camera_raw(name: str) -> ImageError:
    """For raw files that start as any TIFF does."""
    return _no_photo(name, "a camera's raw file", _DEVELOP)


def _no_photo(name: str, what: str, advice: str) -> ImageError:
    return ImageError(
        f"{name}: found {what}, expected a photo (JPEG, PNG, WebP, GIF, TIFF, BMP, PPM, AVIF or "
        f"HEIC): {advice}"
    )


def _photo_format(head: bytes) -> str | None:
    for magic, found in _PHOTOS:
        if head.startswith(magic):
            is_raw = found == "TIFF" and head[8:11] == b"CR\2"  # Canon CR2, in TIFF's clothes
            return None if is_raw else found
    if head[4:8] == b"ftyp":
        return _by_brand(head)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    # Two letters alone would take a text for a picture: "BMW", "P.S."
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    return None


def _by_brand(head: bytes) -> str | None:
    """Tell AVIF and HEIF from the videos that share their container (ISO 14496-12, ftyp)."""
    main = head[8:12]
    brands = {main}
    if main in _ANY_CODEC_BRANDS:  # the codec is among the compatible brands
        end = min(int.from_bytes(head[:4], "big"), 256)
        brands = {head[i : i + 4] for i in range(16, end, 4)}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if main in _HEIF_BRANDS | _ANY_CODEC_BRANDS else None


def _describe(head: bytes) -> tuple[str, str]:
    """Name a file that is no photo, and say what its owner can do."""
    if not head:
        return "an empty file (0 bytes)", "check where it comes from"
    if not head.strip(b"\0"):
        return "nothing but zero bytes", "fetch it again, the copy did not finish"
    for offset, magic, what, advice in _OTHERS:
        if head.startswith(magic, offset):
            return what, advice
    text = _text(head)
    for marker, what, advice in _TEXTS:
        if marker in text:
            return what, advice
    if text:
        return "plain text", _CHECK
    return f"unknown data (it starts with {head[:8].hex(' ')})", "check the file"


def _text(head: bytes) -> str:
    """The text in lower case, or nothing if this is none."""
    try:
        # incremental: the last character may be cut
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).strip().lower()
    except UnicodeDecodeError:
        return ""
    return text if all(c.isprintable() or c.isspace() for c in text) else ""
