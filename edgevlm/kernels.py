"""The image kernels: ctypes binding of kernels/edgevlm_kernels.h, and of two calls of libc.

The library is opened when first needed; calls release the GIL. EDGEVLM_CPU forces a CPU tier
(scalar, sse41, avx2, neon), and a tier that cannot run here is an error, never a fallback.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm import device
from edgevlm.errors import BackendError, Cancelled, DeviceError

ABI_VERSION = 1
FILTERS = {"box": 0, "bilinear": 1, "bicubic": 2, "lanczos": 3}

_OK, _CANCELLED, _INVALID_ARGUMENT, _OUT_OF_MEMORY, _UNKNOWN_TIER, _TIER_LACKING = range(6)
_DONT_NEED = 4  # madvise(2), Linux
_FILE_NAMES = ("libedgevlm_kernels.so", "libedgevlm_kernels.dylib")


class Flag:
    """An int32 that native code polls: set it from any thread to cancel what is running."""

    def __init__(self) -> None:
        self._value = ctypes.c_int32(0)

    def set(self) -> None:
        self._value.value = 1

    def clear(self) -> None:
        self._value.value = 0

    def is_set(self) -> bool:
        return self._value.value != 0

    @property
    def address(self) -> int:
        """Valid while this object lives."""
        return ctypes.addressof(self._value)


class _Picture(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("canvas_height", ctypes.c_int32),
        ("canvas_width", ctypes.c_int32),
        ("canvas_top", ctypes.c_int32),
        ("canvas_left", ctypes.c_int32),
    )


class _Tiling(ctypes.Structure):
    _fields_ = (
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("filter", ctypes.c_int32),
        ("n_tiles", ctypes.c_int32),
        ("tiles", ctypes.POINTER(ctypes.c_int32)),
        ("tile_height", ctypes.c_int32),
        ("tile_width", ctypes.c_int32),
        ("patch_height", ctypes.c_int32),
        ("patch_width", ctypes.c_int32),
        ("channels_first", ctypes.c_int32),
        ("fill", ctypes.c_uint8 * 3),
    )


def tiers() -> tuple[str, ...]:
    """CPU tiers that can run here, best first."""
    return _tiers(_library())


def tier() -> str:
    """The CPU tier in force."""
    name: bytes = _library().edgevlm_tier()
    return name.decode()


def select_tier(name: str) -> None:
    """Put a CPU tier in force for the whole process.

    Raises:
        DeviceError: this build or this CPU does not have it.
    """
    _select(_library(), name)


def operators() -> Path | None:
    """The library as ONNX Runtime takes it, for its fused int8 layers (kernels/operators.cpp).

    None where ONNX Runtime's own kernels serve better: on CPU tiers that have none of ours, and
    with AMX, whose tiles only they use.
    """
    return None if tier() != "avx512" or device.has_amx() else _find()


def abort_callback() -> ctypes.c_void_p:
    """bool (*)(void *flag): whether a Flag's int32 is set; asking it takes no GIL."""
    return ctypes.cast(_library().edgevlm_flag_is_set, ctypes.c_void_p)


def trim() -> None:
    """Return freed memory to the system now, small blocks too; glibc keeps those."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries have none
    if malloc_trim is not None:
        malloc_trim(0)


def drop_mapped(path: Path) -> None:
    """Take what is mapped of a file out of this process's memory until it is used again.

    It stays in the system's cache. (Linux; elsewhere the system alone decides.)
    """
    try:
        table = Path("/proc/self/maps").read_text()
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    name = str(path.resolve())
    for line in table.splitlines():
        span, *_, last = line.split(maxsplit=5)
        if last == name:
            start, end = (int(address, 16) for address in span.split("-"))
            madvise(start, end - start, _DONT_NEED)


def resize(
    pixels: NDArray[np.uint8],  # [H, W, 3], pixels contiguous, rows any distance ≥ 0 apart
    out: NDArray[np.uint8],  # [tiles, n_patches, patch height · patch width · 3], contiguous
    *,
    canvas_px: tuple[int, int],  # the picture is laid on it, centred, and it is what gets resized
    size_px: tuple[int, int],  # (height, width) after the resize
    resample: str,
    tiles: Sequence[tuple[int, int]],
    tile_px: tuple[int, int],
    patch_px: tuple[int, int],
    channels_first: bool,
    fill: tuple[int, int, int],
    threads: int,
    flag: Flag | None = None,
) -> None:
    """Resize a picture as Pillow does and write its tiles as patches into `out`.

    Raises:
        Cancelled: `flag` was set.
        ValueError: sizes that disagree; programmer's mistake.
    """
    height, width = pixels.shape[:2]
    picture = _Picture(
        pixels.ctypes.data,
        pixels.strides[0],
        height,
        width,
        *canvas_px,
        (canvas_px[0] - height) // 2,
        (canvas_px[1] - width) // 2,
    )
    corners = (ctypes.c_int32 * (2 * len(tiles)))(*(px for corner in tiles for px in corner))
    tiling = _Tiling(
        *size_px,
        FILTERS[resample],
        len(tiles),
        corners,
        *tile_px,
        *patch_px,
        channels_first,
        fill,
    )
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError("out must be a contiguous, writeable array")
    status = _library().edgevlm_resize(
        ctypes.byref(picture),
        ctypes.byref(tiling),
        out.ctypes.data,
        out.nbytes,
        threads,
        None if flag is None else flag.address,
    )
    if status == _CANCELLED:
        raise Cancelled("cancelled while the picture was resized")
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"no memory to resize {height}×{width} px to {size_px[0]}×{size_px[1]}")
    if status != _OK:
        raise ValueError(
            f"the kernels refuse pixels {pixels.shape} on canvas {canvas_px}, resized to "
            f"{size_px}, tiles {tile_px}, patches {patch_px}, out {out.shape}, threads {threads}"
        )


@functools.cache
def _library() -> ctypes.CDLL:
    path = _find()
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded ({error}): install edgevlm again") from error
    found = library.edgevlm_abi_version()
    if found != ABI_VERSION:
        raise BackendError(
            f"{path} has ABI version {found}, this edgevlm needs {ABI_VERSION}: "
            "install edgevlm again, or rebuild the kernels"
        )
    wanted = os.environ.get("EDGEVLM_CPU")
    if wanted:
        _select(library, wanted)
    return library


def _find() -> Path:
    # An editable install keeps the library apart from the sources; both are on the package's path.
    import edgevlm

    for directory in edgevlm.__path__:
        for name in _FILE_NAMES:
            path = Path(directory) / name
            if path.is_file():
                return path
    raise BackendError(
        f"{_FILE_NAMES[0]} is not in {', '.join(edgevlm.__path__)}: install edgevlm with pip, "
        "which builds it"
    )


def _declare(library: ctypes.CDLL) -> None:
    library.edgevlm_abi_version.argtypes = []
    library.edgevlm_abi_version.restype = ctypes.c_int32
    library.edgevlm_tier_name.argtypes = [ctypes.c_int32]
    library.edgevlm_tier_name.restype = ctypes.c_char_p
    library.edgevlm_tier.argtypes = []
    library.edgevlm_tier.restype = ctypes.c_char_p
    library.edgevlm_select_tier.argtypes = [ctypes.c_char_p]
    library.edgevlm_select_tier.restype = ctypes.c_int32
    library.edgevlm_resize.argtypes = [
        ctypes.POINTER(_Picture),
        ctypes.POINTER(_Tiling),
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_void_p,
    ]
    library.edgevlm_resize.restype = ctypes.c_int32
    library.edgevlm_flag_is_set.argtypes = [ctypes.c_void_p]
    library.edgevlm_flag_is_set.restype = ctypes.c_bool


def _tiers(library: ctypes.CDLL) -> tuple[str, ...]:
    names: list[str] = []
    while (name := library.edgevlm_tier_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def _select(library: ctypes.CDLL, name: str) -> None:
    status = library.edgevlm_select_tier(name.encode())
    if status == _OK:
        return
    found = "this CPU lacks" if status == _TIER_LACKING else "this build does not know"
    raise DeviceError(
        f"CPU tier {name!r} was asked for, which {found}; available here: "
        f"{', '.join(_tiers(library))}. Choose one of them, or unset EDGEVLM_CPU for the best"
    )
