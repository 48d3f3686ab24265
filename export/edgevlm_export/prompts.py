"""A checkpoint's own tokens and templates → the prompt section of bundle.json.

The template belongs to the language model, not to the family. It is recognised by evidence in the
checkpoint or named by the caller; a wrong one degrades answers without any error, so there is no
default. Formats: model cards of llava-hf and xtuner; xtuner/utils/templates.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint
from .vocabulary import Vocabulary


@dataclass(frozen=True)
class Template:
    user: str
    assistant: str
    generate: str
    stops: tuple[str, ...]
    tokens: tuple[str, ...] = ()  # all in the vocabulary: this template is meant
    chat: str = ""  # or this, in the checkpoint's chat template
    base: str = ""  # or this, in the language model's original name


TEMPLATES = {
    "phi-3": Template(
        user="<|user|>\n{content}<|end|>\n",
        assistant="<|assistant|>\n{content}<|end|>\n",
        generate="<|assistant|>\n",
        # <|assistant|> too: Microsoft's generation_config.json lists it
        stops=("<|end|>", "<|endoftext|>", "<|assistant|>", "</s>"),
        tokens=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "llama-3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n{content}<|eot_id|>",
        generate="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stops=("<|eot_id|>", "<|end_of_text|>"),
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "vicuna": Template(
        user="USER: {content} ",
        assistant="ASSISTANT: {content}</s>",
        generate="ASSISTANT:",
        stops=("</s>",),
        chat="ASSISTANT:",  # plain words: the vocabulary cannot tell
        base="vicuna",
    ),
}

_DESCRIBE = {
    "short": "Describe this image in one short sentence.",
    "normal": "Describe this image.",
    "long": "Describe this image in detail.",
}


def choose(checkpoint: Checkpoint, vocabulary: Vocabulary, named: str | None) -> Template:
    """The template `named`, or the one that the checkpoint gives evidence of."""
    if named is not None:
        if named not in TEMPLATES:
            raise BundleError(f"prompt {named!r} is unknown; known: {', '.join(TEMPLATES)}")
        return TEMPLATES[named]
    chat = _chat_template(checkpoint)
    base = str((checkpoint.config.get("text_config") or {}).get("_name_or_path", "")).lower()
    for template in TEMPLATES.values():
        if (
            (template.tokens and all(token in vocabulary.ids for token in template.tokens))
            or (template.chat and template.chat in chat)
            or (template.base and template.base in base)
        ):
            return template
    raise BundleError(
        f"{checkpoint.directory} does not show which prompt its language model was trained with "
        f"(no special tokens, chat template or base name known here); name one with prompt=: "
        f"{', '.join(TEMPLATES)}"
    )


def section(template: Template, vocabulary: Vocabulary, image_token_id: int) -> dict[str, Any]:
    """bundle.json's "prompt"."""
    by_id = {index: text for text, index in vocabulary.ids.items()}
    if image_token_id not in by_id:
        raise BundleError(
            f"config.json gives the image token id {image_token_id}; tokenizer.json has no such "
            "token: it belongs to another checkpoint"
        )
    image = by_id[image_token_id]
    return {
        "bos": vocabulary.adds_bos,
        "image_token": image,
        "image": f"{image}\n",
        "system": "",
        "user": template.user,
        "assistant": template.assistant,
        "generate": template.generate,
        "describe": dict(_DESCRIBE),
    }


def stop_token_ids(checkpoint: Checkpoint, template: Template, vocabulary: Vocabulary) -> list[int]:
    """The template's stops, then every end token that the checkpoint itself declares."""
    stops: list[Any] = [vocabulary.ids[text] for text in template.stops if text in vocabulary.ids]
    generation = checkpoint.json("generation_config.json") or {}
    for config in (generation, checkpoint.config.get("text_config") or {}):
        declared = config.get("eos_token_id")
        stops += declared if isinstance(declared, list) else [declared]
    eos = (checkpoint.json("tokenizer_config.json") or {}).get("eos_token")
    stops.append(vocabulary.ids.get(str(eos.get("content") if isinstance(eos, dict) else eos)))
    # An id past the vocabulary is a config default for another size; it can never be generated.
    n_vocab = len(vocabulary.texts)
    known = [stop for stop in stops if isinstance(stop, int) and 0 <= stop < n_vocab]
    if not known:
        raise BundleError(f"{checkpoint.directory} names no end-of-text token in its vocabulary")
    return list(dict.fromkeys(known))


def _chat_template(checkpoint: Checkpoint) -> str:
    jinja = checkpoint.directory / "chat_template.jinja"
    parts = [jinja.read_text(encoding="utf-8", errors="replace")] if jinja.is_file() else []
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        parts.append(str((checkpoint.json(name) or {}).get("chat_template", "")))
    return "\n".join(parts)
