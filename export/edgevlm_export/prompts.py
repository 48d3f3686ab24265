"""A checkpoint's own tokens and templates → the prompt section of bundle.json.

The template belongs to the language model, not to the family. It is recognised by evidence in the
checkpoint or named by the caller; a wrong one degrades answers without any error, so there is no
default. Formats: model cards of llava-hf and xtuner; xtuner/utils/templates.py; for Idefics and
SmolVLM their chat_template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgevlm.errors import BundleError

from . import original
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
    system: str = ""  # around a system message, where that is not told as a user's
    opening: str = ""  # of a conversation without a system message
    bos: bool = False  # a BOS comes first even where the tokenizer adds none


TEMPLATES = {
    "idefics": Template(  # first: Idefics3's vocabulary holds Llama 3's tokens too
        user="User: {content}<end_of_utterance>\n",
        assistant="Assistant: {content}<end_of_utterance>\n",
        generate="Assistant:",
        stops=("<end_of_utterance>",),
        tokens=("<fake_token_around_image>", "<end_of_utterance>"),
        system="System: {content}<end_of_utterance>\n",
        bos=True,
    ),
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
    "chatml": Template(  # as LLaVA's chatml_direct and nanoLLaVA: no line break after a turn
        user="<|im_start|>user\n{content}<|im_end|>",
        assistant="<|im_start|>assistant\n{content}<|im_end|>",
        generate="<|im_start|>assistant\n",
        stops=("<|im_end|>", "<|endoftext|>"),
        tokens=("<|im_start|>", "<|im_end|>"),
        system="<|im_start|>system\n{content}<|im_end|>",
    ),
    "mistral": Template(
        user="[INST] {content} [/INST]",
        assistant=" {content}</s> ",
        generate="",
        stops=("</s>",),
        chat="[INST]",
        base="mistral",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
    ),
    "bunny": Template(
        user="USER: {content} ",
        assistant="ASSISTANT: {content}</s>",
        generate="ASSISTANT:",
        stops=("<|endoftext|>", "<|end_of_text|>", "</s>"),
        opening="A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. ",
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


def section(
    template: Template, vocabulary: Vocabulary, image_token_id: int | None
) -> dict[str, Any]:
    """bundle.json's "prompt"; without an id, words around a picture are tokenized apart."""
    by_id = {index: text for text, index in vocabulary.ids.items()}
    if image_token_id is not None and image_token_id not in by_id:
        raise BundleError(
            f"config.json gives the image token id {image_token_id}; tokenizer.json has no such "
            "token: it belongs to another checkpoint"
        )
    token = "" if image_token_id is None else by_id[image_token_id]
    mark = token or original.MARK
    return {
        "bos": vocabulary.adds_bos or (template.bos and vocabulary.bos_id is not None),
        "image_token": token,
        **({} if token else {"image_mark": mark}),
        "image": f"{mark}\n",
        "system": template.opening,
        "user": template.user,
        "assistant": template.assistant,
        "generate": template.generate,
        **({"system_turn": template.system} if template.system else {}),
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
