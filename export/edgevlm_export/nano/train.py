"""The frozen language model in, a trained projector and adapters out; no images.

The model reads "<soft tokens> question" and is scored on the answer only; gradients pass through
it to the projector and the adapters. The seed fixes the data; equal machines repeat a run.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from . import adapter
from .facts import Facts, stack
from .language import embedding_table
from .projector import Projector
from .sampler import conversation, draw

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
SHARED, PADDING = -1, -2  # instead of a conversation's number
IGNORED = -100  # torch's label for positions without a loss


@dataclass(frozen=True)
class Recipe:
    seed: int = 20
    steps: int = 500
    photos: int = 4  # a step
    talks: int = 4  # a photo: the soft tokens are read once for all of them
    learning_rate: float = 8e-3  # of the projector
    adapter_rate: float = 1.5e-3
    warm_up_steps: int = 20
    final_rate: float = 0.02  # of both rates
    clip: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Several photos, each with several conversations side by side behind its soft tokens."""

    facts: list[Facts]
    tokens: Tensor  # int64 [n, length]
    labels: Tensor  # int64 [n, length], IGNORED outside the answers
    positions: Tensor  # int64 [n, length], from 0 in every conversation
    talks: Tensor  # int64 [n, length], number of the conversation; PADDING behind the last


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    checkpoint: Path,
    recipe: Recipe = Recipe(),
    save_every: int = 50,
) -> None:
    """Train; `checkpoint` receives both states every `save_every` steps. Changes `model`."""
    embeddings = embedding_table(model)
    torch.manual_seed(recipe.seed)
    projector = Projector(embeddings, lambda text: tokenizer.encode(text).ids)
    before = embeddings[torch.tensor(tokenizer.encode(USER).ids)]  # float32 [k, width]
    frozen = model.bfloat16()
    adapters = adapter.attach(frozen)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(projector.parameters()), "lr": recipe.learning_rate},
            {"params": list(adapters.values()), "lr": recipe.adapter_rate},
        ],
        weight_decay=0.0,
    )
    learned = [*projector.parameters(), *adapters.values()]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, recipe))
    started, smooth = time.monotonic(), math.nan
    for step, batch in zip(range(recipe.steps), _batches(tokenizer, recipe), strict=False):
        value = loss(frozen, projector, embeddings, before, batch)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, recipe.clip)
        optimizer.step()
        schedule.step()
        smooth = value.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * value.item()
        if step % 10 == 0:
            seconds = time.monotonic() - started
            print(f"step {step} loss {smooth:.4f} after {seconds:.0f} s", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            state = {"projector": projector.state_dict(), "adapters": adapters}
            torch.save(state, checkpoint)


def loss(
    model: LlamaForCausalLM, projector: Projector, embeddings: Tensor, before: Tensor, batch: Batch
) -> Tensor:
    soft = projector(stack(batch.facts))  # float32 [n, 37, width]
    n, ahead = soft.shape[0], before.shape[0] + soft.shape[1]
    inputs = torch.cat([before.expand(n, -1, -1), soft, embeddings[batch.tokens]], dim=1)
    shared = torch.arange(ahead).expand(n, -1)
    hidden = model.model(
        inputs_embeds=inputs.to(model.dtype),
        position_ids=torch.cat([shared, batch.positions + ahead], dim=1),
        attention_mask=visible(ahead, batch.talks),
        use_cache=False,
    ).last_hidden_state[:, ahead:]
    # The state of a token predicts the next one.
    scored = batch.labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][scored]).float()  # float32 [scored tokens, vocabulary]
    return F.cross_entropy(logits, batch.labels[:, 1:][scored])


def visible(ahead: int, talks: Tensor) -> Tensor:
    """Which token sees which, bool [n, 1, length, length]: what is shared, and its own talk."""
    talk = F.pad(talks, (ahead, 0), value=SHARED)
    same = talk[:, :, None] == talk[:, None, :]
    seen = same | (talk == SHARED)[:, None, :]
    return seen.tril()[:, None]


def _rate(step: int, recipe: Recipe) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))
    return min(1.0, (step + 1) / recipe.warm_up_steps) * (cosine + recipe.final_rate)


def _batches(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[Batch]:
    rng = random.Random(recipe.seed)
    while True:
        facts = [draw(rng) for _ in range(recipe.photos)]
        talks = [[conversation(f, rng) for _ in range(recipe.talks)] for f in facts]
        yield _pack(facts, [[encode(turns, tokenizer) for turns in row] for row in talks])


def _pack(facts: list[Facts], rows: list[list[tuple[list[int], list[int]]]]) -> Batch:
    length = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    shape = (len(rows), length)
    tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, talks = torch.full(shape, IGNORED), torch.full(shape, PADDING)
    for i, row in enumerate(rows):
        start = 0
        for number, (text, scores) in enumerate(row):
            end = start + len(text)
            tokens[i, start:end] = torch.tensor(text)
            labels[i, start:end] = torch.tensor(scores)
            positions[i, start:end] = torch.arange(len(text))
            talks[i, start:end] = number
            start = end
    return Batch(facts, tokens, labels, positions, talks)


def encode(turns: list[tuple[str, str]], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens and labels of the text after the soft tokens, cut where the runtime cuts it."""
    tokens: list[int] = []
    labels: list[int] = []
    for i, (question, answer) in enumerate(turns):
        opening = "\n" if i == 0 else f"\n{USER}"
        asked = tokenizer.encode(f"{opening}{question}{END}\n{ASSISTANT}").ids
        said = tokenizer.encode(f"{answer}{END}").ids
        tokens += asked + said
        labels += [IGNORED] * len(asked) + said
    return tokens, labels
