"""Tiny random LLaVA-NeXT checkpoints, made with transformers; see tiny.py."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

TILE_PX, PATCH_PX = 56, 14
GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
PINPOINTS = [[rows * TILE_PX, columns * TILE_PX] for rows, columns in GRIDS]
CHATML = ("<|startoftext|>", "<|im_start|>", "<|im_end|>")
_IMAGES_FIRST = (
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }}{% endfor %}"
)
CHATS = {  # chat_template.json of llava-hf's v1.6 checkpoints, shortened
    "vicuna": "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': '}}"
    "{% endif %}" + _IMAGES_FIRST + "{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "mistral": "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}" + _IMAGES_FIRST + "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + _IMAGES_FIRST
    + "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}


def checkpoint(
    path: Path,
    prompt: str = "vicuna",
    *,
    tower: str = "clip",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    names: str = "transformers 5 saved",
) -> LlavaNextForConditionalGeneration:
    """A checkpoint whose language model takes `prompt`; returns the float32 reference.

    "mistral" has Mistral's config, the others llama's; `names` is in tiny.SCHEMES.
    """
    tokenizer = tiny.sentencepiece(CHATML if prompt == "chatml" else ())
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": TILE_PX,
        "patch_size": PATCH_PX,
    }
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=(CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**shape),
            text_config=_text(prompt, tokenizer),
            image_token_index=tokenizer.token_to_id(tiny.IMAGE),
            image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="default" if tower == "clip" else "full",
        )
    )
    tiny.randomise(model)
    model.to(dtype).save_pretrained(path)
    model = LlavaNextForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    if names != "transformers 5 saved":
        tiny.rename_tensors(path, lambda name: _renamed(name, names))
    _save_processor(path, prompt, tokenizer)
    return model.eval()


def processor(path: Path, tower: str = "clip") -> LlavaNextProcessor:
    """The reference's processor of a checkpoint that `checkpoint` made, with its chat template."""
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(path),
        PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        ),
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        num_additional_image_tokens=1 if tower == "clip" else 0,
        chat_template=(path / "chat_template.jinja").read_text(),
    )


def _renamed(name: str, names: str) -> str:
    if name == "image_newline":
        return "model.image_newline" if names.endswith("state") else name
    return tiny.SCHEMES[names](name)


def _text(prompt: str, tokenizer: Tokenizer) -> LlamaConfig | MistralConfig:
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": 512,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>" if prompt == "chatml" else "</s>"),
        "pad_token_id": None,
    }
    if prompt != "mistral":
        return LlamaConfig(**shape)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return MistralConfig(**shape, rope_parameters=rope, sliding_window=None)


def _save_processor(path: Path, prompt: str, tokenizer: Tokenizer) -> None:
    side = {"height": TILE_PX, "width": TILE_PX}
    LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE_PX}, crop_size=side, image_grid_pinpoints=PINPOINTS
    ).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    (path / "chat_template.jinja").write_text(CHATS[prompt])
