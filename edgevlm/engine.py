"""The path of a photo: file → pixels → patches → embeddings, question → prompt, → tokens → text.

`VLM.run` is that path and the only one: the blocking calls, the chat and the command line fold
or pass on what it yields.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from edgevlm import device, families, image, preprocess, reasoning, region, registry, text, vision
from edgevlm.answer import Answer, Box, EncodedImage, Piece, Point, fold
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cancel import Cancel
from edgevlm.chat import Chat
from edgevlm.errors import BundleError, PromptError
from edgevlm.language import Language, Prompt
from edgevlm.layout import Layout
from edgevlm.meter import Meter
from edgevlm.options import Options
from edgevlm.prompt import Message, Place, Segment
from edgevlm.schema import check_answer
from edgevlm.sessions import Session
from edgevlm.settings import Settings

Picture = image.Source | EncodedImage
Pictures = Picture | Sequence[Picture]


def load(model: str | Path | None = None, **settings: Any) -> VLM:
    """Open a model. Keywords are the fields of `Settings`.

    Args:
        model: a name that `edgevlm models list` shows, or the directory of a bundle; by default
            $EDGEVLM_MODEL, else the best installed model, else the built-in one.

    Raises:
        BundleError: no such model, or it is damaged.
        HubError: its files have to be fetched first and could not be.
        BackendError: ONNX Runtime or llama.cpp cannot run it.
        ValueError: a setting outside its range.
    """
    started = perf_counter()
    chosen = Settings(**settings)
    vlm = VLM(open_bundle(registry.resolve(model)), chosen)
    vlm.load_ms = 1000 * (perf_counter() - started)
    return vlm


class VLM:
    """A vision-language model; made by `load`, ended by `close` or by leaving a `with`.

    A picture is a path, bytes, a binary file, a PIL image, a uint8 array [H, W], [H, W, 3] or
    [H, W, 4], "-" for standard input, or what `encode` returned. Calls take the fields of
    `Options` as keywords. One call runs at a time; other threads wait.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self.load_ms = 0.0
        self._settings = settings
        self._threads = device.thread_budget(settings.threads)
        self._family = families.find(bundle)
        self._cancel = Cancel()
        self._session = Session(bundle.file("vision.onnx"), self._threads)
        width, expected = self._session.output_width, bundle.manifest["n_embd"]
        if width != expected:
            raise BundleError(
                f"vision.onnx gives {width}-wide embeddings; language.gguf expects {expected} "
                "(bundle.json): export both again"
            )
        self._language = Language(
            bundle, threads=self._threads, cancel=self._cancel, precise=settings.precise
        )
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread that holds the lock
        self._closed = False

    def describe(self, picture: Picture, length: str = "normal", **options: Any) -> Answer:
        """Say what the picture shows; `length` is "short", "normal" or "long".

        Raises as `ask` does.
        """
        return fold(self.stream(picture, length=length, **options))

    def ask(
        self,
        pictures: Pictures,
        question: str,
        *,
        places: Sequence[region.Spot] = (),
        **options: Any,
    ) -> Answer:
        """Answer a question about one or several pictures.

        `places` are what the question points at, if the model can be pointed at things: points
        (x, y) and boxes (x_min, y_min, x_max, y_max), 0 to 1.

        Raises:
            ImageError: a picture cannot be read; there is no answer without it.
            PromptError: an empty question, or options outside their range.
            ContextOverflow: question and pictures do not fit; raised before any work.
            OutputError: the answer could not be finished as the schema demands.
            Cancelled: `cancel` was called.
        """
        return fold(self.stream(pictures, question, places=places, **options))

    def stream(
        self,
        pictures: Pictures,
        question: str = "",
        *,
        length: str | None = None,
        places: Sequence[region.Spot] = (),
        **options: Any,
    ) -> Iterator[Piece]:
        """Like `ask`, or with a `length` like `describe`, in pieces as they are made; the last
        one carries the answer."""
        many = _as_list(pictures)
        message = Message(
            "user",
            question if length is None else self._family.describe(length),
            tuple(range(len(many))),
            length,
            tuple(region.place(spot) for spot in places),
        )
        return self.run([message], many, Options(**options))

    def detect(self, picture: Picture, thing: str, *, max_objects: int = 50) -> list[Box]:
        """Boxes around every `thing` in the picture.

        Raises:
            PromptError: this model cannot; raised before any work.
            ImageError, ContextOverflow, Cancelled: as `ask` does.
        """
        segments = self._family.detect_prompt(thing)
        places, size_px = self._find(picture, segments, sized=True, most=max_objects)
        return [region.box(place, *size_px) for place in places]

    def point(self, picture: Picture, thing: str, *, max_objects: int = 50) -> list[Point]:
        """A point on every `thing` in the picture; raises as `detect` does."""
        segments = self._family.point_prompt(thing)
        places, size_px = self._find(picture, segments, sized=False, most=max_objects)
        return [region.point(place, *size_px) for place in places]

    def gaze(
        self, picture: Picture, eye: tuple[float, float], *, always: bool = False
    ) -> Point | None:
        """Where the person looks whose eye is at `eye` (x, y, 0 to 1).

        None if the model sees no target in the picture, unless it `always` has to name one.
        Raises as `detect` does.
        """
        segments = self._family.gaze_prompt(region.place(eye))
        at_least = 1 if always else 0
        places, size_px = self._find(picture, segments, sized=False, most=1, at_least=at_least)
        return region.point(places[0], *size_px) if places else None

    def chat(self, pictures: Pictures) -> Chat:
        """A conversation about pictures, which are encoded once."""
        return Chat(self.run, [self.encode(picture) for picture in _as_list(pictures)])

    def encode(self, picture: Picture) -> EncodedImage:
        """Run the vision model alone; the result is accepted wherever a picture is."""
        with self._exclusive():
            return self._encode(self._open(picture), Meter())

    def question_for(self, length: str) -> str:
        """The question that `describe` asks this model."""
        return self._family.describe(length)

    def cancel(self) -> None:
        """Stop the running call from another thread: it raises `Cancelled`.

        The engine stays usable.
        """
        self._cancel.cancel()

    def run(
        self, messages: Sequence[Message], pictures: Sequence[Picture], options: Options
    ) -> Iterator[Piece]:
        """The path of a photo. A prompt that cannot be answered costs no work on pixels."""
        meter = Meter()
        _check(messages)
        with self._exclusive():
            photos = [self._open(picture) for picture in pictures]
            layouts = [photo.layout for photo in photos]
            think = self._family.thinking(messages, layouts) if options.reasoning else None
            segments = think.segments if think else self._family.prompt(messages, layouts)
            prompt = self._language.tokenize(segments)
            with self._language.sampler(options) as sampler:
                images = [self._encode(photo, meter) for photo in photos]
                with meter.stage("prefill"):
                    self._feed(prompt, images)
                thoughts = reasoning.think(self._language, think, options) if think else None
                tokens = self._language.tokens(sampler, options.max_tokens)
                spoken = text.Spoken(tokens, options.stop, options.repetition_stop)
                for said in spoken:
                    meter.first_token()
                    yield Piece(said)
        if options.schema is not None:
            check_answer(spoken.text, spoken.finish_reason, options.schema)
        answer = Answer(
            text=spoken.text.strip(),
            finish_reason=spoken.finish_reason,
            prompt_tokens=prompt.n_tokens,
            image_tokens=prompt.n_image_tokens,
            generated_tokens=spoken.n_tokens,
            input_px=tuple(encoded.input_px for encoded in images),
            model_px=tuple(encoded.layout.model_px for encoded in images),
            timings=meter.timings(self.load_ms),
            peak_rss_bytes=device.peak_rss_bytes(),
            reasoning=thoughts,
        )
        yield Piece("", answer)

    def _find(
        self,
        picture: Picture,
        segments: Sequence[Segment],
        *,
        sized: bool,
        most: int,
        at_least: int = 0,
    ) -> tuple[list[Place], tuple[int, int]]:
        """What the model finds, and the picture's height and width in pixels."""
        with self._exclusive():
            photo = self._open(picture)
            prompt = self._language.tokenize(segments)
            encoded = self._encode(photo, Meter())
            self._feed(prompt, [encoded])
            ends: list[int] = self.bundle.manifest["generation"]["stop_token_ids"]
            places = region.find(self._language, ends, sized=sized, most=most, at_least=at_least)
        return places, encoded.input_px

    def _open(self, picture: Picture) -> _Photo | EncodedImage:
        """Read the header and lay the tiles out; nothing is decoded yet."""
        if isinstance(picture, EncodedImage):
            if picture.model_sha256 != self.bundle.sha256("vision.onnx"):
                raise PromptError("the picture was encoded by another model: encode it again")
            return picture
        photo = image.open_image(picture, max_pixels=self._settings.max_pixels)
        return _Photo(photo, self._family.layout(photo.height_px, photo.width_px))

    def _encode(self, photo: _Photo | EncodedImage, meter: Meter) -> EncodedImage:
        if isinstance(photo, EncodedImage):
            return photo
        layout, cancel = photo.layout, self._cancel
        at_least = None if self._settings.exact_decode else layout.at_least_px
        with meter.stage("decode"):
            pixels = cancel.call(photo.image.pixels, at_least)
        with meter.stage("preprocess"):
            patches = cancel.call(
                preprocess.patches, pixels, layout, threads=self._threads, flag=cancel.flag
            )
        with meter.stage("encode"):
            embeddings = cancel.call(
                vision.encode, self._session, patches, layout, self._family, cancel
            )
        model_sha256 = self.bundle.sha256("vision.onnx")
        return EncodedImage(
            embeddings=embeddings,
            layout=layout,
            input_px=(photo.image.height_px, photo.image.width_px),
            key=model_sha256 + _digest(patches.data, repr(layout).encode()),
            model_sha256=model_sha256,
        )

    def _feed(self, prompt: Prompt, images: Sequence[EncodedImage]) -> None:
        if self._settings.threads is None:  # leave busy cores to the programs that use them
            self._language.set_threads(device.free_threads(self._threads))
        self._language.feed(prompt, images)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._owner == threading.get_ident():
            raise RuntimeError("a stream of this model is still open: finish or close it first")
        with self._lock:
            if self._closed:
                raise RuntimeError("this model was closed")
            self._owner = threading.get_ident()
            self._cancel.begin()
            try:
                yield
            finally:
                self._owner = None

    def close(self) -> None:
        """Free the model, after stopping what another thread runs on it; later calls fail."""
        mine = self._owner == threading.get_ident()  # an unfinished stream: nothing native runs
        if not mine:
            self._cancel.cancel()
            self._lock.acquire()
        if not self._closed:
            self._closed = True
            self._cancel.close()
            self._language.close()
        if not mine:
            self._lock.release()

    def __enter__(self) -> VLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Photo:
    image: image.Photo
    layout: Layout


def _digest(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _as_list(pictures: Pictures) -> list[Picture]:
    if isinstance(pictures, Sequence) and not isinstance(pictures, (str, bytes)):
        return [*pictures]
    return [pictures]


def _check(messages: Sequence[Message]) -> None:
    if not messages or not messages[-1].text.strip():
        raise PromptError("the question is empty")
