"""A checkpoint's language model with what belongs to it: vocabulary, prompt template, stop tokens.

The part of an export that families share; a family adds its tower and its words around pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import decoder, prompts, vocabulary
from .checkpoint import Checkpoint, Config, section
from .gguf import Language

EMBEDDINGS = "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Backbone:
    language: Language
    vocabulary: vocabulary.Vocabulary
    template: prompts.Template
    stops: tuple[int, ...]

    def prompt(self, image_token_id: int | None) -> dict[str, Any]:
        """bundle.json's "prompt"; None where no token of the vocabulary stands for a picture."""
        return prompts.section(self.template, self.vocabulary, image_token_id)

    def generation(self) -> dict[str, Any]:
        """bundle.json's "generation"."""
        return {"stop_token_ids": list(self.stops), "max_tokens": 256, "repeat_penalty": 1.0}


def read(checkpoint: Checkpoint, root: Config, prompt: str | None) -> Backbone:
    """Plan the language model of a checkpoint with canonical tensor names.

    `root` is config.json, `prompt` the name of a template or None.
    """
    where = checkpoint.directory / "config.json"
    stored = root.get("text_config", {})
    arch = decoder.architecture(checkpoint, section(stored, {"model_type": str}, where))
    text = decoder.complete(checkpoint, arch, stored)
    vocab = vocabulary.read(checkpoint, checkpoint.shape(EMBEDDINGS)[0])
    template = prompts.choose(checkpoint, vocab, prompt)
    stops = prompts.stop_token_ids(checkpoint, template, vocab)
    tied = bool(root.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    language = decoder.plan(checkpoint, text, vocab, stops[0], tied)
    return Backbone(language, vocab, template, tuple(stops))
