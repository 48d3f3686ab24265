"""Prompt in, tokens out: the cache of what was already read, prefill, sampling.

The cache keeps the last conversation. A new prompt that begins alike is read only from where it
differs, so the next question about the same picture costs only its own words.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevlm import device
from edgevlm import prefill as prefills
from edgevlm.answer import Device, EncodedImage, FinishReason
from edgevlm.bundle import Bundle, adapter_file
from edgevlm.cancel import Cancel
from edgevlm.errors import BackendError, BundleError, ContextOverflow
from edgevlm.llama import Context, Model, Sampler
from edgevlm.memory import BATCH_TOKENS, Way
from edgevlm.options import Options
from edgevlm.prompt import ImageSlot, Place, Segment
from edgevlm.region import Region
from edgevlm.schema import to_grammar
from edgevlm.tokenizer import Prompt, Tokenizer, Unit, width

_Key = int | tuple[str, int]  # a token id, or a picture's key and the number of its embedding
_CELLS = 256  # llama.cpp makes the cache of a sequence a multiple of this


class Language:
    """The language model of a bundle and its cache."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        cancel: Cancel,
        way: Way,
        precise: bool = False,
        adapter: str | None = None,
        prefill: str = "auto",
        device: Device = "cpu",
    ) -> None:
        """`precise`, `adapter` and `prefill` as in `Settings`.

        Raises:
            BundleError: the language file does not belong to this bundle.
        """
        self._bundle = bundle
        self._way = way
        self._threads = threads
        self._cancel = cancel
        self._precise = precise
        self._device = device
        self._adapters = self._adapter_files(adapter)
        self._cached: list[_Key] = []  # what is at the cache's positions
        self._opened: tuple[Model, Context] | None = None if way.apart else self._open()
        self._model = self._opened[0] if self._opened else self._load(vocabulary_only=True)
        self._sequence = 0  # of the context: the only one, or this slot's
        self._row = -1  # of the context's logits: the last, or this slot's
        self.unread: int | None = None  # a token that was said and has to be read next
        # Where memory is so short that the models take turns, there is none for a second copy;
        # a GPU reads prompts faster than the graph, which runs on the CPU.
        wanted = prefill if way.prefill and device == "cpu" else "gguf"
        self._prefill = prefills.find(bundle, wanted, threads, lambda: self._context.takes_cache())
        self._tokenizer = Tokenizer(bundle, self._model)
        self._defaults = bundle.manifest["generation"]
        self._region: Region | None = None

    def _load(self, *, vocabulary_only: bool = False) -> Model:
        return Model(
            self._bundle.file("language.gguf"),
            extra_buffers=self._way.repacked,
            device=self._device,
            vocabulary_only=vocabulary_only,
        )

    def _open(self) -> tuple[Model, Context]:
        model, expected = self._load(), self._bundle.manifest["n_embd"]
        if model.n_embd != expected:
            raise BundleError(
                f"language.gguf takes {model.n_embd}-wide embeddings; bundle.json says "
                f"{expected}: export both again"
            )
        return model, self._own_context(model, self._way.first_n_ctx)

    def _own_context(self, model: Model, n_ctx: int) -> Context:
        return self._new_context(model, n_ctx, taps_hidden=self._bundle.has("region.npz"))

    def _new_context(self, model: Model, n_ctx: int, **further: Any) -> Context:
        image = self._bundle.manifest["image"]
        context = Context(
            model,
            n_ctx,
            threads=self._threads,
            flag=self._cancel.flag,
            precise=self._precise,
            n_batch=max(BATCH_TOKENS, image.get("bidirectional_tokens", 0)),
            **further,
        )
        context.set_adapters(self._adapters)
        return context

    @property
    def _context(self) -> Context:
        """Opened at its first use where it takes turns with the vision session."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened[1]

    def _reserve(self, n_positions: int) -> None:
        """Let the context hold so many; it begins small, because few answers need all of it.

        Raises:
            BackendError: there is no memory for it; the cache is empty then.
        """
        if n_positions <= self._context.n_ctx:
            return
        assert self._opened is not None
        model, context = self._opened
        try:
            larger = context.moved_to(lambda: self._own_context(model, self._way.n_ctx))
        except BackendError:
            self._cached.clear()
            self._opened = model, self._own_context(model, self._way.first_n_ctx)
            raise
        self._opened = model, larger

    def release(self) -> None:
        """Give the memory of weights and cache back; the next use opens them again."""
        if self._opened is not None:
            model, context = self._opened
            self._opened = None
            self._cached.clear()
            context.close()
            model.close()

    def tokenize(self, segments: Sequence[Segment]) -> Prompt:
        """Token ids of the prompt.

        Raises:
            ContextOverflow: prompt and one token of answer do not fit the context.
            PromptError: the text contains the token that marks a picture.
        """
        prompt = self._tokenizer.tokenize(segments)
        if prompt.n_tokens + 1 > self._way.n_ctx:
            raise ContextOverflow(prompt.n_tokens + 1, self._way.n_ctx)
        return prompt

    def use_adapter(self, name: str | None) -> None:
        """Answer with this LoRA adapter from now on, or with none that can be switched.

        Raises:
            BundleError: the model has no adapter of this name.
            BackendError: llama.cpp cannot load it.
        """
        self._adapters = self._adapter_files(name)
        if self._opened is not None:
            self._context.set_adapters(self._adapters)
            self._forget_from(0)  # keys and values of another model, in effect

    def _adapter_files(self, name: str | None) -> list[Path]:
        known = self._bundle.adapters
        if name is not None and name not in known:
            raise BundleError(
                f"{self._bundle.path} has no adapter {name!r}; it has: {', '.join(known) or 'none'}"
            )
        files = ["adapter.gguf", *([adapter_file(name)] if name is not None else [])]
        return [self._bundle.file(file) for file in files if self._bundle.has(file)]

    def set_threads(self, threads: int) -> None:
        """For the calls that follow."""
        self._threads = threads
        self._context.set_threads(threads)

    def feed(self, prompt: Prompt, images: Sequence[EncodedImage]) -> None:
        """Bring the cache to the end of the prompt, reusing what it already holds.

        Raises:
            Cancelled, BackendError: the cache keeps what was read so far.
        """
        units = list(prompt.units)
        keep = self._common_prefix(units, images)
        self._forget_from(sum(width(unit) for unit in units[:keep]))
        keep = self._prefill_units(units, keep, images)
        run: list[int] = []
        for unit in [*units[keep:], None]:
            if isinstance(unit, int):
                run.append(unit)
                continue
            if run:
                self._decode(run, run)
                run = []
            if unit is not None:
                self._decode(self._rows(unit, images), _keys(unit, images), _both_ways(unit))

    def _prefill_units(
        self, units: Sequence[Unit], keep: int, images: Sequence[EncodedImage]
    ) -> int:
        """Read what follows the first `keep` units, which the cache holds, through the prefill
        graph where that pays; how many the cache holds then.

        Never the last one: llama.cpp reads it, and has its logits.
        """
        if self._prefill is None or self._adapters:  # the graph knows nothing of adapters
            return keep
        n_past, n_all = len(self._cached), sum(width(unit) for unit in units[:-1])
        begin = keep
        if not self._context.appends and 2 * n_past < n_all:
            # reading the words before another picture again costs less than the graph saves
            begin = n_past = 0
        new = units[begin:-1]
        prefix = [unit for unit in new if _both_ways(unit)]
        if prefix and not (begin == 0 and prefix == units[:1]):
            return keep
        if (n_past and not self._context.appends) or not self._prefill.pays(n_all - n_past):
            return keep
        self._forget_from(n_past)
        self._reserve(n_all)
        self._cancel.call(
            self._prefill.run,
            np.concatenate([self._rows(unit, images) for unit in new]),
            n_past,
            sum(width(unit) for unit in prefix),
            self._context,
            self._sequence,
            self._cancel,
        )
        for unit in new:
            self._cached += _keys(unit, images)
        return len(units) - 1

    def _rows(self, unit: Unit, images: Sequence[EncodedImage]) -> NDArray[np.float32]:
        """What the language model takes for a unit, float32 [n, n_embd]."""
        if isinstance(unit, int):
            return self._model.embed([unit])
        if isinstance(unit, ImageSlot):
            return images[unit.index].embeddings[unit.first : unit.first + unit.n_tokens]
        return self.region.rows(unit)

    def extend(self, rows: list[int] | NDArray[np.float32]) -> None:
        """Read more token ids, or embeddings float32 [n, n_embd], after what was read."""
        unlike_any: _Key = ("", 0)  # what no prompt begins with
        self._decode(rows, [unlike_any] * len(rows) if isinstance(rows, np.ndarray) else rows)

    def n_unread(self, prompt: Prompt, images: Sequence[object]) -> int:
        """Tokens of the prompt that `feed` would read; all, while a picture is not encoded yet."""
        encoded = [image for image in images if isinstance(image, EncodedImage)]
        if len(encoded) < len(images):
            return prompt.n_tokens
        keep = self._common_prefix(prompt.units, encoded)
        return sum(width(unit) for unit in prompt.units[keep:])

    def _common_prefix(self, units: Sequence[Unit], images: Sequence[EncodedImage]) -> int:
        """How many units the cache holds already; the last is always read again for its logits."""
        position = 0
        for count, unit in enumerate(units[:-1]):
            wanted = _keys(unit, images)
            if self._cached[position : position + len(wanted)] != wanted:
                return count
            position += len(wanted)
        return len(units) - 1

    def sampler(self, options: Options, banned_ids: Sequence[int] | None = None) -> Sampler:
        """What chooses the tokens; close it after use. `banned_ids` replace the model's own.

        Raises:
            PromptError: a schema or grammar that cannot be used.
        """
        if banned_ids is None:
            banned_ids = self._defaults.get("banned_token_ids", ())
        grammar = options.grammar if options.schema is None else to_grammar(options.schema)
        return Sampler(
            self._model,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            repeat_penalty=options.repeat_penalty or self._defaults["repeat_penalty"],
            grammar=grammar,
            banned_ids=banned_ids,
        )

    def tokens(
        self, sampler: Sampler, max_tokens: int | None
    ) -> Generator[tuple[int, bytes], None, FinishReason]:
        """Yield (token id, bytes) after the prompt that was fed; return why it ended.

        Raises:
            Cancelled, BackendError: while decoding.
        """
        limit = min(self.limit(max_tokens), self.room)
        for count in range(1, limit + 1):
            token = self.sample(sampler)
            if self._model.is_end(token) or token in self._defaults["stop_token_ids"]:
                return "stop"
            self.unread = token if count < limit else None
            yield token, self._model.piece(token)
            if self.unread is not None:  # a slot's was read together with those of others
                self._decode([token], [token])
        return "length"

    def sample(self, sampler: Sampler) -> int:
        """The next token; the cache stays as it is."""
        return self._cancel.call(sampler.sample, self._context, self._row)

    def piece(self, token: int) -> bytes:
        """The bytes of a token; may end inside a character."""
        return self._model.piece(token)

    def limit(self, max_tokens: int | None) -> int:
        """`max_tokens`, or as many as the model speaks by default."""
        return max_tokens or int(self._defaults["max_tokens"])

    def needed(self, prompt: Prompt, max_tokens: int | None) -> int:
        """Positions that suffice for a prompt and its answer."""
        return min(prompt.n_tokens + self.limit(max_tokens), self._way.n_ctx)

    @property
    def room(self) -> int:
        """Positions that the context still has."""
        return self._way.n_ctx - len(self._cached)

    @property
    def n_parameters(self) -> int:
        return self._model.n_parameters

    def logits(self) -> NDArray[np.float32]:
        """Of the next token, float32 [n_vocab]."""
        return self._context.logits(self._row)

    def hidden(self) -> NDArray[np.float32]:
        """Of the last position, before the final norm: float32 [n_embd]. Where region.npz is."""
        return self._context.hidden()

    @property
    def region(self) -> Region:
        """Coordinates as this model reads and says them.

        Raises:
            BundleError: the bundle has no region.npz, or it is damaged.
        """
        if self._region is None:
            log_sizes = self._bundle.manifest.get("region", {}).get("log_sizes", True)
            self._region = Region(self._bundle.arrays("region.npz"), log_sizes)
        return self._region

    def _decode(
        self,
        rows: list[int] | NDArray[np.float32],
        keys: Sequence[_Key],
        bidirectional: bool = False,
    ) -> None:
        try:
            position, sequence = len(self._cached), self._sequence
            self._reserve(position + len(rows))
            if bidirectional and isinstance(rows, np.ndarray):
                self._cancel.call(self._context.decode_bidirectional, rows, position, sequence)
            else:
                self._cancel.call(self._context.decode, rows, position, sequence)
        except BaseException:
            self._forget_from(len(self._cached))
            raise
        self._cached.extend(keys)
        self._row, self.unread = -1, None

    def _forget_from(self, position: int) -> None:
        self._context.truncate(position, self._sequence)
        del self._cached[position:]

    def close(self) -> None:
        """For good: unlike after `release`, nothing is opened again."""
        if self._prefill is not None:
            self._prefill.close()
        for part in reversed(self._opened or ()):
            part.close()
        self._model.close()


class Slots:
    """Readers of one model that answer at the same time, with `n_ctx` positions each.

    A pass over the weights takes hardly longer for a few tokens than for one, so `read` takes
    what all of them said. Each keeps what it read: the words before a picture are read once.
    """

    def __init__(self, language: Language, n: int, n_ctx: int) -> None:
        """Up to `n` of them, as many as half of the memory that is free now holds.

        Raises:
            BackendError: it does not even hold one.
        """
        self.n_ctx = min(-(-n_ctx // _CELLS) * _CELLS, language._way.n_ctx)
        each_bytes = language._model.cache_bytes(self.n_ctx, precise=language._precise)
        n = max(1, min(n, device.available_memory_bytes() // 2 // each_bytes))
        self._cancel = language._cancel
        self._context = language._new_context(language._model, self.n_ctx, n_sequences=n)
        self.all = [self._slot(language, sequence) for sequence in range(n)]

    def _slot(self, language: Language, sequence: int) -> Language:
        slot = copy(language)
        slot._opened = language._model, self._context
        slot._sequence, slot._cached = sequence, []
        slot._row, slot.unread = -1, None
        return slot

    def read(self) -> None:
        """Read what was said and is unread.

        Raises:
            Cancelled, BackendError: the slots are of no further use.
        """
        said = {slot: slot.unread for slot in self.all if slot.unread is not None}
        self._cancel.call(
            self._context.decode_each,
            [*said.values()],
            [len(slot._cached) for slot in said],
            [slot._sequence for slot in said],
        )
        for row, (slot, token) in enumerate(said.items()):
            slot._cached.append(token)
            slot._row, slot.unread = row, None

    def close(self) -> None:
        self._context.close()


def _keys(unit: Unit, images: Sequence[EncodedImage]) -> list[_Key]:
    if isinstance(unit, int):
        return [unit]
    if isinstance(unit, Place):
        return [(repr(unit), n) for n in range(unit.n_tokens)]
    return [(images[unit.index].key, unit.first + n) for n in range(unit.n_tokens)]


def _both_ways(unit: Unit) -> bool:
    return isinstance(unit, ImageSlot) and unit.bidirectional
