"""Tiny random checkpoints of the real architectures, made with transformers.

Weights are scaled so that every layer matters (transformers' own initialisation is so small that a
wrong layer would hide under the tolerance). What comes back is the reference: the same weights, as
rounded to the dtype on disk, in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    ViTConfig,
)

IMAGE = "<image>"
PHI_3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
VICUNA = (  # as llava-1.5's own: the words of the roles are made from their names
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog near the old stone bridge.",
    "USER: Describe this image in detail. ASSISTANT: A photo of two cats on a red sofa.",
    "A large building with many windows stands behind a row of green trees.",
    "What is in the picture? There are three people and one small white boat.",
    "Größe, naïve, 写真, 😀 and other characters make bytes interesting.",
] * 4

# Tensor names: how checkpoints of other writers call what transformers 5 saves.
SCHEMES: dict[str, Callable[[str], str]] = {
    "transformers 5 saved": lambda name: name,
    "transformers 4 saved": lambda name: name.replace(
        "vision_tower.", "vision_tower.vision_model."
    ),
    "transformers 4 state": lambda name: (
        name.replace("language_model.lm_head.", "lm_head.")
        if "lm_head" in name
        else "model."
        + name.replace("language_model.model.", "language_model.").replace(
            "vision_tower.", "vision_tower.vision_model."
        )
    ),
    "transformers 5 state": lambda name: (
        name.replace("language_model.lm_head.", "lm_head.")
        if "lm_head" in name
        else "model." + name.replace("language_model.model.", "language_model.")
    ),
}


def llava(
    path: Path,
    tower: str = "clip",
    text: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    prompt: str | None = None,
    image_px: int = 56,
    patch_px: int = 14,
    vision: dict[str, object] | None = None,
    language: dict[str, object] | None = None,
    config: dict[str, object] | None = None,
    names: str = "transformers 5 saved",
    shard: str = "5GB",
) -> LlavaForConditionalGeneration:
    """A LLaVA checkpoint in `path`; returns the float32 reference.

    `prompt` is "vicuna", "llama-3", "phi-3" or "chatml" (default: by `text`); it also chooses the
    kind of tokenizer. `vision`, `language` and `config` override config fields, `names` is in
    SCHEMES.
    """
    prompt = prompt or {"phi3": "phi-3", "qwen2": "chatml"}.get(text, "vicuna")
    tokenizer = (
        byte_level(LLAMA_3 if prompt == "llama-3" else CHATML)
        if prompt in ("llama-3", "chatml")
        else sentencepiece(PHI_3 if prompt == "phi-3" else ())
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_vision_config(tower, image_px, patch_px, vision or {}),
            text_config=_text_config(text, tokenizer, language or {}),
            image_token_index=tokenizer.token_to_id(IMAGE),
            **(config or {}),
        )
    )
    randomise(model)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    # loaded again: .float() alone would keep rope frequencies that .to(dtype) rounded
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    if names != "transformers 5 saved":
        rename_tensors(path, SCHEMES[names])
    _save_processors(path, tower, prompt, tokenizer, image_px)
    return model.eval()


def rename_tensors(path: Path, rule: Callable[[str], str]) -> None:
    """Rewrite an unsharded checkpoint with other tensor names."""
    file = path / "model.safetensors"
    save_file({rule(name): value for name, value in load_file(file).items()}, file)


def _vision_config(
    tower: str, image_px: int, patch_px: int, override: dict[str, object]
) -> CLIPVisionConfig | Dinov2Config | SiglipVisionConfig | ViTConfig:
    kind = {
        "clip": CLIPVisionConfig,
        "siglip": SiglipVisionConfig,
        "dinov2": Dinov2Config,
        "vit": ViTConfig,
    }[tower]
    shape = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": image_px,
        "patch_size": patch_px,
    }
    return kind(**{**shape, **override})


def _text_config(
    text: str, tokenizer: Tokenizer, override: dict[str, object]
) -> LlamaConfig | MistralConfig | Phi3Config | Qwen2Config:
    kind = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "phi3": Phi3Config,
        "qwen2": Qwen2Config,
    }[text]
    end = next(
        tokenizer.token_to_id(token)
        for token in ("<|eot_id|>", "<|end|>", "<|im_end|>", "</s>")
        if tokenizer.token_to_id(token) is not None
    )
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": math.ceil((tokenizer.get_vocab_size() + 1) / 64) * 64,  # with unused rows
        "bos_token_id": tokenizer.encode("a").ids[0],
        "eos_token_id": end,
        "pad_token_id": None,
    }
    return kind(**{**shape, **override})


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    for name, value in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            value.normal_(1.0, 0.2)
        elif value.ndim < 2:
            value.normal_(0.0, 0.2)
        elif "embed_tokens" in name or "position_embedding" in name:
            value.normal_(0.0, 0.5)
        else:
            value.normal_(0.0, value[0].numel() ** -0.5)


def _save_processors(
    path: Path, tower: str, prompt: str, tokenizer: Tokenizer, image_px: int
) -> None:
    if tower != "siglip":
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": image_px}, crop_size={"height": image_px, "width": image_px}
        )
    else:
        processor = SiglipImageProcessorPil(size={"height": image_px, "width": image_px})
    processor.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    bytes_ = prompt in ("llama-3", "chatml")
    bos, eos = ("<|begin_of_text|>", "<|end_of_text|>") if bytes_ else ("<s>", "</s>")
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": PreTrainedTokenizerFast.__name__,
                "bos_token": bos,
                "eos_token": eos,
            }
        )
    )
    if prompt == "vicuna":
        (path / "chat_template.jinja").write_text(VICUNA)


def sentencepiece(extra: tuple[str, ...] = ()) -> Tokenizer:
    """BPE over ▁-marked words with byte fallback: what Llama 2 and Phi-3 ship."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        limit_alphabet=50,  # rare characters go through the byte tokens
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finish(tokenizer, "<s>", extra)


def byte_level(extra: tuple[str, ...] = ()) -> Tokenizer:
    """GPT-2's byte-level BPE as Llama 3 ships it: with a token in front of every text."""
    tokenizer = byte_level_bpe(("<|begin_of_text|>", "<|end_of_text|>"))
    return _finish(tokenizer, "<|begin_of_text|>", extra)


def byte_level_bpe(special: tuple[str, ...]) -> Tokenizer:
    """GPT-2's byte-level BPE; `special` tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _finish(tokenizer: Tokenizer, bos: str, extra: tuple[str, ...]) -> Tokenizer:
    special = [AddedToken(token, special=True, normalized=False) for token in (*extra, IMAGE)]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
