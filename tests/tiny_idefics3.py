"""Tiny random Idefics3 and SmolVLM checkpoints, made with transformers; see tiny.py.

The tokenizers are of both kinds that the family ships: byte-level BPE with a BOS that only the chat
template writes (SmolVLM) and one that the tokenizer adds too (Idefics3, Llama 3).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

Model = Idefics3ForConditionalGeneration | SmolVLMForConditionalGeneration
IMAGE, BORDER, END, WHOLE = (
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
)
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
CHAT = (  # chat_template of HuggingFaceTB/SmolVLM-256M-Instruct, after its BOS
    "{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def checkpoint(
    path: Path,
    kind: str = "smolvlm",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tile_px: int = 56,
    patch_px: int = 14,
    longest_px: int = 224,
    factor: int = 2,
    split: bool = True,
    config: dict[str, object] | None = None,
    language: dict[str, object] | None = None,
    processor_file: str = "preprocessor_config.json",
) -> Model:
    """A checkpoint of `kind` "smolvlm" or "idefics3" in `path`; returns the float32 reference."""
    tokenizer = _tokenizer(kind)
    torch.manual_seed(seed)
    model_class, config_class = {
        "smolvlm": (SmolVLMForConditionalGeneration, SmolVLMConfig),
        "idefics3": (Idefics3ForConditionalGeneration, Idefics3Config),
    }[kind]
    model = model_class(
        config_class(
            vision_config={
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": tile_px,
                "patch_size": patch_px,
            },
            text_config=_text(tokenizer, language or {}),
            scale_factor=factor,
            image_token_id=tokenizer.token_to_id(IMAGE),
            **(config or {}),
        )
    )
    tiny.randomise(model)
    model.to(dtype).save_pretrained(path)
    model = model_class.from_pretrained(path, dtype=torch.float32)
    tokenizer.save(str(path / "tokenizer.json"))
    _save_processor(path, kind, processor_file, tile_px, longest_px, split)
    return model.eval()


def processor(path: Path, tile_tokens: int) -> Idefics3Processor:
    """The reference's processor of a checkpoint that `checkpoint` made, with its chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        **json.loads((path / "tokenizer_config.json").read_text()),
    )
    return Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(path),
        tokenizer,
        image_seq_len=tile_tokens,
        chat_template=(path / "chat_template.jinja").read_text(),
    )


def _tokenizer(kind: str) -> Tokenizer:
    tokenizer = tiny.byte_level((BORDER, END, WHOLE, *TILES))
    if kind == "smolvlm":  # its tokenizer adds nothing
        state = json.loads(tokenizer.to_str())
        tokenizer = Tokenizer.from_str(json.dumps({**state, "post_processor": None}))
    return tokenizer


def _text(tokenizer: Tokenizer, override: dict[str, object]) -> dict[str, object]:
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "vocab_size": math.ceil((tokenizer.get_vocab_size() + 1) / 64) * 64,
        "bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": None,
    }
    return LlamaConfig(**{**shape, **override}).to_dict()


def _save_processor(
    path: Path, kind: str, file: str, tile_px: int, longest_px: int, split: bool
) -> None:
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_px},
        max_image_size={"longest_edge": tile_px},
        do_image_splitting=split,
    ).to_dict()
    if kind == "smolvlm":
        images["image_processor_type"] = "SmolVLMImageProcessor"
    whole = {"image_processor": images, "processor_class": "SmolVLMProcessor"}
    (path / file).write_text(json.dumps(images if file.startswith("pre") else whole))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": END})
    )
    (path / "chat_template.jinja").write_text("<|begin_of_text|>" + CHAT)
