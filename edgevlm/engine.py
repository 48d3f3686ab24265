"""The path of a photo: file → pixels → patches → embeddings, question → prompt, → tokens → text.

`VLM.run` is that path and the only one: the blocking calls, the chat and the command line fold
or pass on what it yields.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from edgevlm import (
    budget,
    calibration,
    device,
    families,
    gaze,
    many,
    placement,
    plan,
    reasoning,
    region,
    registry,
    text,
)
from edgevlm.answer import Answer, Box, EncodedImage, Outcome, Piece, Point, fold
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cancel import Cancel
from edgevlm.chat import Chat
from edgevlm.encoder import Encoder, Opened, Photo, Picture
from edgevlm.errors import PromptError
from edgevlm.language import Language, Slots
from edgevlm.layout import Layout
from edgevlm.meter import Meter
from edgevlm.options import Options
from edgevlm.prompt import Message, Place, Segment, Thinking
from edgevlm.schema import check_answer
from edgevlm.settings import Settings
from edgevlm.tokenizer import Prompt

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
        PromptError: it does not know this `detail`, or cannot do with so few `visual_tokens`.
        DeviceError: "cuda" was asked for and is not there, or the model does not fit into memory
            in any way; nothing was opened.
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
        self.placement = placement.choose(settings.device, bundle)
        self._threads = device.thread_budget(settings.threads)
        self._family = families.find(bundle, settings.detail, settings.visual_tokens)
        self.plan = plan.make(bundle, settings)
        self._cancel = Cancel()
        with ThreadPoolExecutor(1) as other:  # each library loads on one core, without the GIL
            encoder = other.submit(
                Encoder,
                bundle,
                self._family,
                settings,
                threads=self._threads,
                cancel=self._cancel,
                device=self.placement.devices.encode,
                make_room=self._make_room,
            )
            self._language = Language(
                bundle,
                way=self.plan.way,
                threads=self._threads,
                cancel=self._cancel,
                precise=settings.precise,
                adapter=settings.adapter,
                prefill=settings.prefill,
                device=self.placement.devices.language,
            )
        try:
            self._encoder = encoder.result()
        except BaseException:
            self._language.close()
            raise
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
            TimeBudget: `budget_s` is too short for the first word.
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
        shown = _as_list(pictures)
        message = Message(
            "user",
            question if length is None else self._family.describe(length),
            tuple(range(len(shown))),
            length,
            tuple(region.place(spot) for spot in places),
        )
        return self.run([message], shown, Options(**options))

    def describe_many(
        self,
        pictures: Iterable[Picture],
        length: str = "normal",
        *,
        parallel: int = many.PARALLEL,
        ordered: bool = True,
        **options: Any,
    ) -> Iterator[Outcome]:
        """Describe any number of pictures, `parallel` at a time; far faster than one by one.

        Pictures are taken as they are needed, and memory does not grow with their number. With
        `budget_s` each has that time to itself, and they are answered one after the other. A
        picture that cannot be read, or an answer that cannot be finished, is an `Outcome` with
        its error, and the others go on. Outcomes come in the order of the pictures, or
        (`ordered=False`) as they are made.

        Raises:
            PromptError: options outside their range; before any work.
            Cancelled, BackendError: for all pictures that have no outcome yet.
        """
        message = Message("user", self._family.describe(length), (0,), length)
        return self._run_many(
            message, pictures, Options(**options), parallel=parallel, ordered=ordered
        )

    def ask_many(
        self,
        pictures: Iterable[Picture],
        question: str,
        *,
        parallel: int = many.PARALLEL,
        ordered: bool = True,
        **options: Any,
    ) -> Iterator[Outcome]:
        """The same question about each of any number of pictures, as `describe_many` does."""
        message = Message("user", question, (0,))
        return self._run_many(
            message, pictures, Options(**options), parallel=parallel, ordered=ordered
        )

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
        self,
        picture: Picture,
        eye: region.Spot,
        *,
        always: bool = False,
        accurate: bool = False,
        seed: int = 0,
    ) -> Point | None:
        """Where the person looks whose eye is at `eye` (x, y, 0 to 1).

        None if the model sees no target in the picture, unless it `always` has to name one.
        `accurate` takes the box of the face for `eye` (x_min, y_min, x_max, y_max), asks from
        ten random places in it, from ten more in the mirrored picture, and gives the mean of
        what they agree on. The places follow from `seed`. `picture` must not be encoded yet,
        since its mirror image is encoded too. Raises as `detect` does.
        """
        spot = region.place(eye)
        if accurate != (spot.size is not None):
            raise PromptError(
                "an accurate gaze takes the box of the face (x_min, y_min, x_max, y_max), any "
                "other the place of an eye (x, y)"
            )
        eyes = gaze.eyes(spot, seed) if accurate else ([spot], [])
        prompts = [[self._family.gaze_prompt(place) for place in each] for each in eyes]
        if accurate and isinstance(picture, EncodedImage):
            raise PromptError("an accurate gaze needs the picture itself, not an encoded one")
        with self._exclusive():
            photo = self._encoder.open(picture)
            search = partial(self._search, sized=False, most=1, at_least=int(always))
            found = search(photo, prompts[0])
            if isinstance(photo, Photo) and accurate:
                mirror = replace(photo, image=photo.image.mirrored())
                target = gaze.agreed(found, search(mirror, prompts[1]))
            else:
                target = found[0] if found else None
        return region.point(target, *photo.input_px) if target else None

    def chat(self, pictures: Pictures) -> Chat:
        """A conversation about pictures, which are encoded once."""
        return Chat(self.run, [self.encode(picture) for picture in _as_list(pictures)])

    def encode(self, picture: Picture) -> EncodedImage:
        """Run the vision model alone; the result is accepted wherever a picture is."""
        with self._exclusive():
            return self._encoder.encode(self._encoder.open(picture), Meter())

    def use_adapter(self, name: str | None) -> None:
        """Answer with this LoRA adapter of the bundle from now on, or with none.

        What was read of pictures and conversations is read again; encoded pictures stay valid.

        Raises:
            BundleError: the model has no adapter of this name.
        """
        with self._exclusive():
            self._language.use_adapter(name)

    def prompt(self, picture: Picture) -> Prompt:
        """What `describe` would feed: token ids, and where the picture stands. Decodes nothing."""
        with self._exclusive():
            layouts = [self._encoder.open(picture).layout]
            message = Message("user", self._family.describe("normal"), (0,), "normal")
            return self._language.tokenize(self._family.prompt([message], layouts))

    def layout(self, height_px: int, width_px: int) -> Layout:
        """The resizes and tiles in which a picture of this size is seen."""
        return self._family.layout(height_px, width_px)

    @property
    def threads(self) -> int:
        """The budget that all stages share."""
        return self._threads

    @property
    def language_parameters(self) -> int:
        """Weights of the language model, its embedding table included."""
        return self._language.n_parameters

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
        with self._exclusive(), self._cancel.within(options.budget_s):
            asked = self._read(messages, pictures, options, meter)
            for piece in self._answer(asked, self._language):
                if piece.text or piece.answer is not None:
                    yield piece

    def _run_many(
        self,
        message: Message,
        pictures: Iterable[Picture],
        options: Options,
        *,
        parallel: int,
        ordered: bool,
    ) -> Iterator[Outcome]:
        """The same path for each picture, several of them at a time."""
        _check([message])
        if parallel < 1:
            raise ValueError(f"parallel is {parallel}; it must be 1 or more")
        if options.reasoning:
            raise PromptError("the model reasons about one picture at a time: ask about each")

        def prepare(picture: Picture) -> _Asked:
            asked = self._read([message], [picture], options, Meter())
            seen = [self._encoder.see(photo, asked.meter, threads=1) for photo in asked.photos]
            return replace(asked, photos=seen)

        def alone(picture: Picture) -> Generator[Piece, None, None]:
            with self._cancel.within(options.budget_s):
                yield from self._answer(prepare(picture), self._language)

        with self._exclusive():
            self._language.sampler(options).close()  # before any work: the schema may be no good
            if self.plan.way.apart or options.budget_s is not None:
                yield from many.one_by_one(pictures, alone)
                return
            if isinstance(pictures, Sized):
                parallel = max(1, min(parallel, len(pictures)))
            outcomes = many.outcomes(
                pictures,
                prepare,
                self._answer,
                lambda asked: self._language.needed(asked.prompt, options.max_tokens),
                partial(Slots, self._language, parallel),
            )
            yield from many.in_order(outcomes) if ordered else outcomes

    def _read(
        self,
        messages: Sequence[Message],
        pictures: Sequence[Picture],
        options: Options,
        meter: Meter,
    ) -> _Asked:
        """Headers of pictures and words of the prompt; nothing is decoded yet."""
        photos: list[Opened] = [self._encoder.open(picture) for picture in pictures]
        if options.budget_s is not None:
            messages, photos = self._affordable(messages, photos, options, options.budget_s)
        layouts = [photo.layout for photo in photos]
        think = self._family.thinking(messages, layouts) if options.reasoning else None
        segments = think.segments if think else self._family.prompt(messages, layouts)
        return _Asked(self._language.tokenize(segments), photos, think, options, meter)

    def _answer(self, asked: _Asked, language: Language) -> Generator[Piece, None, None]:
        """A piece for each token, often without text, and at last the answer."""
        prompt, think, options, meter = asked.prompt, asked.think, asked.options, asked.meter
        with language.sampler(options) as sampler:
            images = [self._encoder.encode(photo, meter) for photo in asked.photos]
            with meter.stage("prefill"):
                self._feed(language, prompt, images)
            thoughts = reasoning.think(language, think, options) if think else None
            tokens = budget.spoken(language.tokens(sampler, options.max_tokens))
            spoken = text.Spoken(tokens, options.stop, options.repetition_stop)
            for said in spoken.token_by_token():
                if said:
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
            cache="miss" if meter.ran("encode") else "hit",
            devices=self.placement.devices,
            reasoning=thoughts,
        )
        yield Piece("", answer)

    def _find(
        self, picture: Picture, segments: Sequence[Segment], *, sized: bool, most: int
    ) -> tuple[list[Place], tuple[int, int]]:
        """What the model finds, and the picture's height and width in pixels."""
        with self._exclusive():
            photo = self._encoder.open(picture)
            return self._search(photo, [segments], sized=sized, most=most), photo.input_px

    def _search(
        self,
        photo: Opened,
        asked: Sequence[Sequence[Segment]],
        *,
        sized: bool,
        most: int,
        at_least: int = 0,
    ) -> list[Place]:
        """What the model finds after each of the prompts, one list of all."""
        prompts = [self._language.tokenize(segments) for segments in asked]
        encoded = self._encoder.encode(photo, Meter())
        ends: list[int] = self.bundle.manifest["generation"]["stop_token_ids"]
        places: list[Place] = []
        for prompt in prompts:
            self._feed(self._language, prompt, [encoded])
            places += region.find(self._language, ends, sized=sized, most=most, at_least=at_least)
        return places

    def _affordable(
        self,
        messages: Sequence[Message],
        photos: list[Opened],
        options: Options,
        budget_s: float,
    ) -> tuple[Sequence[Message], list[Opened]]:
        """The same, changed as far as the time demands; unchanged without a calibration.

        Raises:
            TimeBudget: there is no way to answer in time.
        """
        costs = calibration.known(self.bundle, self._threads)
        if costs is None:
            return messages, photos
        ways, choices = [], []
        for family in (self._family, *self._family.cheaper()):
            seen: list[Opened] = [
                photo.seen_by(family) if isinstance(photo, Photo) else photo for photo in photos
            ]
            for length in budget.shorter(messages[-1].length):
                question = messages[-1].text if length is None else family.describe(length)
                asked = [*messages[:-1], replace(messages[-1], text=question, length=length)]
                segments = family.prompt(asked, [photo.layout for photo in seen])
                limit = self._language.limit(options.max_tokens)
                ways.append((asked, seen))
                choices.append(
                    budget.Choice(
                        sum(p.layout.n_tiles for p in seen if isinstance(p, Photo)),
                        self._language.n_unread(self._language.tokenize(segments), seen),
                        min(budget.ANSWER_TOKENS[length], limit),
                    )
                )
        return ways[budget.best(costs, budget_s, choices)]

    def _make_room(self) -> None:
        """The vision session takes its turn."""
        self._language.release()

    def _feed(self, language: Language, prompt: Prompt, images: Sequence[EncodedImage]) -> None:
        if self.plan.way.apart:
            self._encoder.release()
        if self._settings.threads is None:  # leave busy cores to the programs that use them
            language.set_threads(device.free_threads(self._threads))
        language.feed(prompt, images)

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
class _Asked:
    prompt: Prompt
    photos: Sequence[Opened]
    think: Thinking | None
    options: Options
    meter: Meter


def _as_list(pictures: Pictures) -> list[Picture]:
    if isinstance(pictures, Sequence) and not isinstance(pictures, (str, bytes)):
        return [*pictures]
    return [pictures]


def _check(messages: Sequence[Message]) -> None:
    if not messages or not messages[-1].text.strip():
        raise PromptError("the question is empty")
