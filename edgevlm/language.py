"""Prompt in, tokens out: tokenizing, the cache of what was already read, sampling.

The cache keeps the last conversation. A new prompt that begins alike is read only from where it
differs, so the next question about the same picture costs only its own words.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevlm import probe
from edgevlm.answer import EncodedImage, FinishReason
from edgevlm.bundle import Bundle
from edgevlm.cancel import Cancel
from edgevlm.errors import BundleError, ContextOverflow, PromptError
from edgevlm.llama import Context, Model, Sampler
from edgevlm.options import Options
from edgevlm.prompt import ImageSlot, Segment, Text
from edgevlm.schema import to_grammar


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: token ids and image slots in order."""

    units: tuple[int | ImageSlot, ...]

    @property
    def n_image_tokens(self) -> int:
        return sum(unit.n_tokens for unit in self.units if isinstance(unit, ImageSlot))

    @property
    def n_tokens(self) -> int:
        return sum(_width(unit) for unit in self.units)


class Language:
    """The language model of a bundle and its cache."""

    def __init__(
        self, bundle: Bundle, *, threads: int, cancel: Cancel, precise: bool = False
    ) -> None:
        """Raises BundleError when the language file does not belong to this bundle."""
        self._cancel = cancel
        self._model = Model(
            bundle.file("language.gguf"), extra_buffers=probe.verdict().extra_buffers
        )
        expected = bundle.manifest["n_embd"]
        if self._model.n_embd != expected:
            raise BundleError(
                f"language.gguf takes {self._model.n_embd}-wide embeddings; bundle.json says "
                f"{expected}: export both again"
            )
        n_ctx: int = bundle.manifest["n_ctx"]
        self._context = Context(
            self._model, n_ctx, threads=threads, flag=cancel.flag, precise=precise
        )
        if bundle.has("adapter.gguf"):
            self._context.apply_adapter(bundle.file("adapter.gguf"))
        self._tokenizer = (
            Tokenizer.from_file(str(bundle.file("tokenizer.json")))
            if bundle.has("tokenizer.json")
            else None
        )
        self._image_token: str = bundle.manifest["prompt"]["image_token"]
        self._bos: bool = bundle.manifest["prompt"]["bos"]
        self._defaults = bundle.manifest["generation"]
        self._cached: list[int | str] = []  # token ids and picture keys at the cache's positions

    def tokenize(self, segments: Sequence[Segment]) -> Prompt:
        """Token ids of the prompt.

        Raises:
            ContextOverflow: prompt and one token of answer do not fit the context.
            PromptError: the text contains the token that marks a picture.
        """
        encode = self._encode_by_tokenizer if self._tokenizer else self._encode_by_llama
        units = ([self._model.bos] if self._bos else []) + encode(segments)
        prompt = Prompt(tuple(units))
        if prompt.n_tokens + 1 > self._context.n_ctx:
            raise ContextOverflow(prompt.n_tokens + 1, self._context.n_ctx)
        return prompt

    def _encode_by_tokenizer(self, segments: Sequence[Segment]) -> list[int | ImageSlot]:
        # One string, as the reference does it: merges may cross the borders of segments.
        assert self._tokenizer is not None
        marker = self._tokenizer.token_to_id(self._image_token) or -1
        text = "".join(s.text if isinstance(s, Text) else self._image_token for s in segments)
        slots = [s for s in segments if isinstance(s, ImageSlot)]
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids.count(marker) != len(slots):
            raise PromptError(f"the text contains {self._image_token}, which marks a picture")
        remaining = iter(slots)
        return [next(remaining) if token == marker else token for token in ids]

    def _encode_by_llama(self, segments: Sequence[Segment]) -> list[int | ImageSlot]:
        units: list[int | ImageSlot] = []
        text = ""
        for segment in segments:
            if isinstance(segment, Text):
                text += segment.text
            else:
                units += [*self._model.tokenize(text), segment]
                text = ""
        return units + self._model.tokenize(text)

    def set_threads(self, threads: int) -> None:
        """For the calls that follow."""
        self._context.set_threads(threads)

    def feed(self, prompt: Prompt, images: Sequence[EncodedImage]) -> None:
        """Bring the cache to the end of the prompt, reusing what it already holds.

        Raises:
            Cancelled, BackendError: the cache keeps what was read so far.
        """
        units = list(prompt.units)
        keep = self._common_prefix(units, images)
        position = sum(_width(unit) for unit in units[:keep])
        self._forget_from(position)
        run: list[int] = []
        for unit in [*units[keep:], None]:
            if isinstance(unit, int):
                run.append(unit)
                continue
            if run:
                self._decode(run, run)
                run = []
            if unit is not None:
                image = images[unit.index]
                self._decode(image.embeddings, [image.key] * unit.n_tokens)

    def _common_prefix(
        self, units: Sequence[int | ImageSlot], images: Sequence[EncodedImage]
    ) -> int:
        """How many units the cache holds already; the last is always read again for its logits."""
        position = 0
        for count, unit in enumerate(units[:-1]):
            width = _width(unit)
            wanted = [unit] if isinstance(unit, int) else [images[unit.index].key] * width
            if self._cached[position : position + width] != wanted:
                return count
            position += width
        return len(units) - 1

    def sampler(self, options: Options) -> Sampler:
        """What chooses the tokens; close it after use.

        Raises:
            PromptError: a schema or grammar that cannot be used.
        """
        grammar = options.grammar if options.schema is None else to_grammar(options.schema)
        return Sampler(
            self._model,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            repeat_penalty=options.repeat_penalty or self._defaults["repeat_penalty"],
            grammar=grammar,
        )

    def tokens(
        self, sampler: Sampler, max_tokens: int | None
    ) -> Generator[tuple[int, bytes], None, FinishReason]:
        """Yield (token id, bytes) after the prompt that was fed; return why it ended.

        Raises:
            Cancelled, BackendError: while decoding.
        """
        room = self._context.n_ctx - len(self._cached)
        limit = min(max_tokens or self._defaults["max_tokens"], room)
        for count in range(1, limit + 1):
            token = self._cancel.call(sampler.sample, self._context)
            if self._model.is_end(token) or token in self._defaults["stop_token_ids"]:
                return "stop"
            yield token, self._model.piece(token)
            if count < limit:
                self._decode([token], [token])
        return "length"

    def logits(self) -> NDArray[np.float32]:
        """Of the next token, float32 [n_vocab]."""
        return self._context.logits()

    def _decode(self, rows: list[int] | NDArray[np.float32], keys: Sequence[int | str]) -> None:
        try:
            self._cancel.call(self._context.decode, rows, len(self._cached))
        except BaseException:
            self._forget_from(len(self._cached))
            raise
        self._cached.extend(keys)

    def _forget_from(self, position: int) -> None:
        self._context.truncate(position)
        del self._cached[position:]

    def close(self) -> None:
        self._context.close()
        self._model.close()


def _width(unit: int | ImageSlot) -> int:
    return 1 if isinstance(unit, int) else unit.n_tokens
