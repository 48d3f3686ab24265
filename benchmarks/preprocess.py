"""Is the way from a photo to patches faster than what a user would pick instead, and by how much?

edgevlm, Pillow with numpy, and Hugging Face's CLIP processor take turns on the same photo-like
JPEGs, with and without decode; medians and ratios are printed. Then: what scaled JPEG decode
changes, in patches and, with --bundle, in embeddings.

    python benchmarks/preprocess.py [--rounds N] [--json FILE] [--bundle DIR] [--photo FILE ...]
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil

from edgevlm import bundle as bundles
from edgevlm import device, families, vision
from edgevlm.bench import photo
from edgevlm.cancel import Cancel
from edgevlm.image import Photo, open_image
from edgevlm.layout import Layout, View
from edgevlm.preprocess import patches
from edgevlm.sessions import Session

SIDE_PX, PATCH_PX = 336, 14  # CLIP ViT-L/14-336, the tower of LLaVA
SIZES_PX = {"0.3 MP": (480, 640), "2 MP": (1224, 1632), "12 MP": (3000, 4000)}
PEER = "Pillow + numpy"

Work = Callable[[], Any]
Encode = Callable[[NDArray[np.uint8], Layout], NDArray[np.float32]]


def clip_layout(height: int, width: int) -> Layout:
    """Short side to 336 px, the middle square, as CLIP's processor does."""
    short, long = sorted((height, width))
    scaled = SIDE_PX * long // short
    size = (scaled, SIDE_PX) if height > width else (SIDE_PX, scaled)
    corner = ((size[0] - SIDE_PX) // 2, (size[1] - SIDE_PX) // 2)
    view = View(*size, "bicubic", (corner,))
    return Layout((view,), SIDE_PX, PATCH_PX, True, (0, 0, 0), (SIDE_PX // PATCH_PX) ** 2)


def photo_like(height: int, width: int) -> bytes:
    """A JPEG whose detail falls off with frequency as a photo's does (1/f), quality 90."""
    stream = io.BytesIO()
    Image.fromarray(photo.drawn(height, width)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def pillow_patches(image: Image.Image, layout: Layout) -> NDArray[np.uint8]:
    view = layout.views[0]
    top, left = view.tiles[0]
    resized = image.resize((view.width_px, view.height_px), Image.Resampling.BICUBIC)
    crop = np.asarray(resized.crop((left, top, left + SIDE_PX, top + SIDE_PX)))
    n = SIDE_PX // PATCH_PX
    grid = crop.reshape(n, PATCH_PX, n, PATCH_PX, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(grid).reshape(1, n * n, -1)


def contenders(jpeg: bytes, layout: Layout) -> dict[str, dict[str, Work]]:
    """Stage → who → the work to time."""
    clip = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}
    )
    pixels = open_image(jpeg).pixels()
    image = Image.fromarray(pixels)

    def decoded() -> Image.Image:
        return Image.open(io.BytesIO(jpeg)).convert("RGB")

    def edgevlm(at_least_px: tuple[int, int] | None, threads: int) -> Work:
        return lambda: patches(open_image(jpeg).pixels(at_least_px), layout, threads)

    return {
        "without decode": {
            "edgevlm, 1 thread": lambda: patches(pixels, layout, 1),
            "edgevlm, 2 threads": lambda: patches(pixels, layout, 2),
            PEER: lambda: pillow_patches(image, layout),
            "Hugging Face CLIP": lambda: clip(image, return_tensors="np"),
        },
        "with decode": {
            "edgevlm, 1 thread": edgevlm(layout.at_least_px, 1),
            "edgevlm, 2 threads": edgevlm(layout.at_least_px, 2),
            "edgevlm, full decode, 1 thread": edgevlm(None, 1),
            "edgevlm, full decode, 2 threads": edgevlm(None, 2),
            PEER: lambda: pillow_patches(decoded(), layout),
            "Hugging Face CLIP": lambda: clip(decoded(), return_tensors="np"),
        },
    }


def scaled_decode(opened: Photo, layout: Layout, encode: Encode | None) -> dict[str, Any]:
    """What decoding at a fraction of the size changes, in grey levels of 0..255."""
    small = opened.pixels(layout.at_least_px)
    exact, scaled = patches(opened.pixels(), layout, 1), patches(small, layout, 1)
    off = np.abs(exact.astype(np.int16) - scaled)
    found: dict[str, Any] = {
        "picture_px": [opened.height_px, opened.width_px],
        "decoded_px": list(small.shape[:2]),
        "max_abs": int(off.max()),
        "mean_abs": float(off.mean()),
    }
    if encode is not None:
        a, b = encode(exact, layout), encode(scaled, layout)  # float32 [n_tokens, n_embd]
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines = (a * b).sum(axis=1) / lengths
        found |= {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
    return found


def differences(photos: dict[str, bytes], directory: Path | None) -> dict[str, dict[str, Any]]:
    """For CLIP's layout, or for that of a model, then with embeddings."""
    layout_of = clip_layout
    encode: Encode | None = None
    cancel = Cancel()
    if directory is not None:
        bundle = bundles.open_bundle(directory)
        session = Session(bundle.file("vision.onnx"), device.thread_budget())
        family = families.find(bundle)
        layout_of = family.layout
        encode = functools.partial(vision.encode, session, family=family, cancel=cancel)
    found = {}
    for name, jpeg in photos.items():
        opened = open_image(jpeg)
        layout = layout_of(opened.height_px, opened.width_px)
        found[name] = scaled_decode(opened, layout, encode)
    cancel.close()
    return found


def main() -> None:
    parser = common.parser(__doc__, rounds=15)
    parser.add_argument("--bundle", type=Path, help="also compare this model's embeddings")
    parser.add_argument("--photo", type=Path, nargs="*", default=[], help="JPEGs for --bundle")
    options = parser.parse_args()

    jpegs = {name: photo_like(*size_px) for name, size_px in SIZES_PX.items()}
    times = {
        f"{name}, {stage}": common.medians_ms(work, options.rounds)
        for name, jpeg in jpegs.items()
        for stage, work in contenders(jpeg, clip_layout(*SIZES_PX[name])).items()
    }
    photos = jpegs | {str(path): path.read_bytes() for path in options.photo}
    found = common.result(
        str(__doc__).splitlines()[0], PEER, times, options,
        scaled_decode=differences(photos, options.bundle),
    )  # fmt: skip
    common.publish(found, options)
    print("\nScaled JPEG decode against full decode:")
    for name, difference in found["scaled_decode"].items():
        print(f"  {name}: {', '.join(f'{key} {value}' for key, value in difference.items())}")


if __name__ == "__main__":
    main()
