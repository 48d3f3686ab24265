"""Tiny random Idefics2 checkpoints, made with transformers; see tiny.py.

Two kinds of tokenizer: as transformers 5 makes Llama's (no mark on a word after a special token),
and as older tokenizer.json files have it (every piece of text begins with one).
"""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import tiny_idefics3
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

IMAGE, BORDER, END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"


def checkpoint(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    split: bool = True,
    legacy_tokenizer: bool = False,
    image_px: int = 98,
    n_kv: int = 2,
    shortest_px: int = 42,
    longest_px: int = 98,
) -> Idefics2ForConditionalGeneration:
    """A checkpoint in `path`; returns the float32 reference."""
    tokenizer = _tokenizer(legacy_tokenizer)
    torch.manual_seed(seed)
    model = Idefics2ForConditionalGeneration(
        Idefics2Config(
            vision_config={
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": image_px,
                "patch_size": 14,
            },
            perceiver_config={
                "hidden_size": 64,
                "resampler_n_latents": 5,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 12,
                "num_key_value_heads": n_kv,
            },
            text_config=_text(tokenizer),
            image_token_id=tokenizer.token_to_id(IMAGE),
        )
    )
    tiny.randomise(model)
    with torch.no_grad():
        model.model.connector.perceiver_resampler.latents.normal_()
    model.to(dtype).save_pretrained(path)
    model = Idefics2ForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    Idefics2ImageProcessorPil(
        size={"shortest_edge": shortest_px, "longest_edge": longest_px}, do_image_splitting=split
    ).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    (path / "chat_template.jinja").write_text(tiny_idefics3.CHAT)
    return model.eval()


def processor(path: Path) -> Idefics2Processor:
    """The reference's processor of a checkpoint that `checkpoint` made, with its chat template."""
    return Idefics2Processor(
        Idefics2ImageProcessorPil.from_pretrained(path),
        PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        ),
        image_seq_len=5,
        chat_template=(path / "chat_template.jinja").read_text(),
    )


def _tokenizer(legacy: bool) -> Tokenizer:
    tokenizer = tiny.sentencepiece((BORDER, END))
    if legacy:
        return tokenizer
    state = json.loads(tokenizer.to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**state, "normalizer": None}))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    return tokenizer


def _text(tokenizer: Tokenizer) -> dict[str, object]:
    return MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        vocab_size=512,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("</s>"),
        pad_token_id=0,
    ).to_dict()
