"""A picture → image embeddings: header, pixels, patches, vision graph, and what is known already.

Each stage is a step of its own, because headers come before any work, pixels of the next photo can
be had while the model is busy with this one, and a photo seen before needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL
from numpy.typing import NDArray

from edgevlm import cache, image, kernels, preprocess, sessions, vision
from edgevlm.answer import Device, EncodedImage
from edgevlm.bundle import Bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import BundleError, PromptError
from edgevlm.families import Family
from edgevlm.layout import Layout
from edgevlm.meter import Meter
from edgevlm.settings import Settings

Picture = image.Source | EncodedImage


@dataclass(frozen=True)
class Photo:
    """A picture whose header was read."""

    image: image.Photo
    family: Family
    layout: Layout

    def seen_by(self, family: Family) -> Photo:
        """The same, laid out by another family object: a cheaper one, say."""
        return Photo(self.image, family, family.layout(self.image.height_px, self.image.width_px))

    @property
    def input_px(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        return self.image.height_px, self.image.width_px


@dataclass(frozen=True)
class Patches:
    """A picture as the vision graph takes it."""

    photo: Photo
    key: str | None  # of its embeddings in the cache
    data: NDArray[np.uint8]  # see `preprocess.patches`

    @property
    def layout(self) -> Layout:
        return self.photo.layout

    @property
    def input_px(self) -> tuple[int, int]:
        return self.photo.input_px


Opened = Photo | Patches | EncodedImage  # a picture somewhere on its way


class Encoder:
    """The vision model of a bundle."""

    def __init__(
        self,
        bundle: Bundle,
        family: Family,
        settings: Settings,
        *,
        threads: int,
        cancel: Cancel,
        device: Device,
        make_room: Callable[[], None],
    ) -> None:
        """`make_room` is called before the session is opened again after `release`.

        Raises:
            BundleError: the vision file does not belong to this bundle.
        """
        self._settings = settings
        self._family = family
        self._threads = threads
        self._cancel = cancel
        self._bundle = bundle
        self._device = device
        self._make_room = make_room
        self._model_sha256 = bundle.vision_sha256
        # mapped while the session lives; a small graph holds its weights itself
        self._weights = bundle.file("vision.data") if bundle.has("vision.data") else None
        self._is_first = True
        self._session: sessions.Session | None = self._open_session()
        self._cache = cache.Cache(settings.cache_bytes) if settings.cache else None
        self._made_by = (  # what else than the picture decides what its embeddings are
            self._model_sha256,
            f"exact_decode={settings.exact_decode}",
            f"pillow {PIL.__version__}",
            f"onnxruntime {sessions.maker()} on {device}",
        )

    def _open_session(self) -> sessions.Session:
        path = self._bundle.file("vision.onnx")
        kept = "" if self._weights else self._model_sha256  # no copy of what is mapped
        session = sessions.Session(path, self._threads, self._device, sha256=kept)
        (_, shape), *_ = session.outputs.values()
        width, expected = shape[-1], self._bundle.manifest["n_embd"]
        if width != expected:
            raise BundleError(
                f"vision.onnx gives {width}-wide embeddings; language.gguf expects {expected} "
                "(bundle.json): export both again"
            )
        return session

    def release(self) -> None:
        """Give the memory of the vision model back; the next new picture opens it again."""
        if self._session is not None:
            self._session = None
            kernels.trim()

    def _tower(self) -> sessions.Session:
        if self._session is None:
            self._make_room()
            kernels.trim()
            self._session = self._open_session()
        return self._session

    def open(self, picture: Picture) -> Photo | EncodedImage:
        """Read the header and lay the tiles out; nothing is decoded yet.

        Raises:
            ImageError: no acceptable picture.
            PromptError: it was encoded by another model.
        """
        if isinstance(picture, EncodedImage):
            if picture.model_sha256 != self._model_sha256:
                raise PromptError("the picture was encoded by another model: encode it again")
            return picture
        photo = image.open_image(picture, max_pixels=self._settings.max_pixels)
        layout = self._family.layout(photo.height_px, photo.width_px)
        return Photo(photo, self._family, layout)

    def see(self, opened: Opened, meter: Meter, threads: int) -> Patches | EncodedImage:
        """Decode and preprocess, or find the embeddings; runs beside the model on any thread.

        Raises:
            ImageError: the picture is damaged.
            Cancelled: between the two, or while preprocessing.
        """
        if not isinstance(opened, Photo):
            return opened
        key = self._key(opened)
        if self._cache is not None and key is not None and (known := self._cache.get(key)):
            return self._encoded(opened, known)
        at_least = None if self._settings.exact_decode else opened.layout.at_least_px
        with meter.stage("decode"):
            pixels = opened.image.pixels(at_least)
        with meter.stage("preprocess"):
            flag = self._cancel.flag
            patches = preprocess.patches(pixels, opened.layout, threads=threads, flag=flag)
        return Patches(opened, key, patches)

    def encode(self, opened: Opened, meter: Meter) -> EncodedImage:
        """Go the rest of the way, wherever the picture is.

        Raises:
            ImageError, Cancelled: as `see` does.
            BackendError: ONNX Runtime failed.
        """
        call = self._cancel.call
        seen = call(self.see, opened, meter, self._threads)
        if isinstance(seen, EncodedImage):
            return seen
        with meter.stage("encode"):
            embeddings = call(
                vision.encode,
                self._tower(),
                seen.data,
                seen.layout,
                seen.photo.family,
                self._cancel,
            )
        if self._weights is not None and self._is_first:
            # The language model's files come into memory next. Later they are there already when
            # a picture comes, and no peak is lower for dropping these.
            kernels.drop_mapped(self._weights)
        self._is_first = False
        made = cache.entry(embeddings)
        if self._cache is not None and seen.key is not None:
            self._cache.put(seen.key, made)
        return self._encoded(seen.photo, made)

    def _key(self, photo: Photo) -> str | None:
        if self._cache is None or (content := photo.image.digest()) is None:
            return None
        return cache.key(content, repr(photo.layout), *self._made_by)

    def _encoded(self, photo: Photo, entry: cache.Entry) -> EncodedImage:
        return EncodedImage(
            embeddings=entry.embeddings,
            layout=photo.layout,
            input_px=photo.input_px,
            key=entry.sha256,
            model_sha256=self._model_sha256,
        )
