"""One run of ours and one of transformers on the same checkpoint, as numbers to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

import edgevlm
from edgevlm import preprocess
from edgevlm.layout import Layout
from edgevlm.options import Options
from edgevlm.prompt import Message

STEPS = 64
# Both sides compute in float32 and add up in their own order.
EMBEDDINGS_ATOL = 1e-4
LOGITS_ATOL = 2e-3


@dataclass(frozen=True)
class Run:
    prompt: list[int]  # token ids; a picture's embedding counts as one image token
    embeddings: np.ndarray  # float32 [n_tokens, n_embd] of all pictures
    logits: np.ndarray  # float32 [n_vocab] after the prompt
    tokens: list[int]  # STEPS greedy ones, without the end token


def ours(bundle: Path, messages: Sequence[Message], pictures: Sequence[Image.Image]) -> Run:
    """The engine's own stages, with float32 keys and values."""
    with edgevlm.load(bundle, device="cpu", precise=True, threads=1) as vlm:
        language, marker = vlm._language, vlm.bundle.manifest["prompt"]["image_token"]
        images = [vlm.encode(picture) for picture in pictures]
        prompt = language.tokenize(vlm._family.prompt(messages, [i.layout for i in images]))
        tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        image_id = tokenizer.token_to_id(marker or "<image>")
        ids = [
            i
            for unit in prompt.units
            for i in ([unit] if isinstance(unit, int) else [image_id] * unit.n_tokens)
        ]
        language.feed(prompt, images)
        logits = language.logits()
        embeddings = np.concatenate([image.embeddings for image in images])
        with language.sampler(Options()) as sampler:
            tokens = [token for token, _ in language.tokens(sampler, STEPS)]
            return Run(ids, embeddings, logits, tokens)


@torch.no_grad()
def reference(
    model: Any, inputs: Mapping[str, torch.Tensor], embeddings: torch.Tensor, ends: Sequence[int]
) -> Run:
    """`inputs` are what the processor gives, `embeddings` what the model makes of the pictures."""
    n_prompt = inputs["input_ids"].shape[1]
    generated = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=list(ends), pad_token_id=0
    )[0, n_prompt:].tolist()
    if generated[-1] in ends:
        generated.pop()
    logits = model(**inputs).logits[0, -1].numpy()
    return Run(inputs["input_ids"][0].tolist(), embeddings.numpy(), logits, generated)


def assert_equal(found: Run, expected: Run, *, logits_atol: float = LOGITS_ATOL) -> None:
    assert found.prompt == expected.prompt
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=EMBEDDINGS_ATOL, rtol=0)
    np.testing.assert_allclose(found.logits, expected.logits, atol=logits_atol, rtol=0)
    assert found.tokens == expected.tokens


def tiles(picture: Image.Image, layout: Layout) -> np.ndarray:
    """What the model sees of a picture, uint8 [tiles, 3, tile_px, tile_px]."""
    n, patch_px = layout.tile_px // layout.patch_px, layout.patch_px
    grid = preprocess.patches(np.asarray(picture), layout, 1)
    grid = grid.reshape(-1, n, n, 3, patch_px, patch_px).transpose(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, 3, layout.tile_px, layout.tile_px)
