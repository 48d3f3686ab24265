"""Moondream's arithmetic in torch, float32, written from its description.

Crops, tower, stitching, projector, decoder with its bidirectional prefix, and the loops around
them: vikhyat/moondream, moondream/torch/ and (2024) moondream/vision_encoder.py. With the exporter
it shares the names of tensors and releases, no arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from edgevlm.bundle import Bundle

from ..checkpoint import Checkpoint
from ..families.moondream import canonical, release_of
from . import MOST_PLACES, STEPS, Ids, Question, Seen

NAME = f"the arithmetic of vikhyat/moondream in torch {torch.__version__}, float32"
_LANCZOS, _BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC
_HEADS = {1024: 16, 720: 10}  # of the 0.5B model's decoder and tower; the code has 2B's
Past = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [1, heads, n, head] of each layer


@dataclass(frozen=True)
class Shape:
    """Numbers that the tensors do not show; the defaults are those of the reference's code."""

    text_heads: int = 32
    vision_heads: int = 16
    max_crops: int = 12
    overlap: int = 4


class Reference:
    """`weights` by the names of 2025, without `model.`; `release` as the exporter names it."""

    def __init__(self, weights: Mapping[str, torch.Tensor], release: str, shape: Shape) -> None:
        self.w = {name: value.float() for name, value in weights.items()}
        self.release = release
        self.shape = shape
        self.grid = math.isqrt(self.w["vision.pos_emb"].shape[1])
        self.patch = math.isqrt(self.w["vision.patch_emb.weight"].shape[1] // 3)
        self.side = self.grid * self.patch
        self.prefix = 0 if release.startswith("2024") else 1 + self.grid**2

    # vision

    def encode(self, image: Image.Image) -> torch.Tensor:
        """float32 [n_patches, dim]"""
        crops, n_rows, n_columns = self.crops(image)
        pixels = (crops.float() / 255 - 0.5) / 0.5
        if self.release == "2024-03-04":
            return self._mlp("vision.proj_mlp", self._tower(pixels[:1])[0])
        if self.release == "2024-05-20":
            whole, pooled = self._views_2024(pixels, n_rows, n_columns)
        else:
            whole, pooled = self._views_2025(pixels, n_rows, n_columns)
        return self._mlp("vision.proj_mlp", torch.cat([whole, pooled], dim=-1))

    def crops(self, image: Image.Image) -> tuple[torch.Tensor, int, int]:
        """uint8 [n, 3, side, side] and the rows and columns of the grid that was cut.

        Since 2025 the whole picture comes first, and once more where it is all there is.
        """
        image, side = image.convert("RGB"), self.side
        if self.release.startswith("2024"):
            n_rows, n_columns = self.tiling(image.height, image.width)
            cut = _array(image.resize((n_columns * side, n_rows * side), _BICUBIC))
            return _cut(cut, side, side, n_rows, n_columns), n_rows, n_columns
        window = (self.grid - 2 * self.shape.overlap) * self.patch
        margin = side - window
        n_rows, n_columns = self.tiling(image.height, image.width)
        size = (n_columns * window + margin, n_rows * window + margin)
        cut = _cut(_array(image.resize(size, _LANCZOS)), side, window, n_rows, n_columns)
        whole = _array(image.resize((side, side), _LANCZOS))[None]
        return torch.cat([whole, cut]), n_rows, n_columns

    def tiling(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of crops."""
        if self.release == "2024-03-04":
            return 1, 1
        if self.release == "2024-05-20":
            return tiling_2024(height, width, self.side)
        margin = 2 * self.shape.overlap * self.patch
        return tiling_2025(
            height - margin, width - margin, self.side - margin, self.shape.max_crops
        )

    def _views_2024(
        self, pixels: torch.Tensor, n_rows: int, n_columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        side = self.side
        joined = _joined(pixels, n_rows, n_columns)
        whole = self._tower(F.interpolate(joined, size=(side, side), mode="bilinear"))[0]
        if n_rows * n_columns == 1:
            return whole, whole
        stitched = _joined(self._maps(pixels), n_rows, n_columns)
        pooled = F.interpolate(stitched, size=(self.grid, self.grid), mode="bilinear")
        return whole, pooled[0].flatten(1).T

    def _views_2025(
        self, pixels: torch.Tensor, n_rows: int, n_columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        m, grid = self.shape.overlap, self.grid
        step = grid - 2 * m
        whole = self._tower(pixels[:1])[0]
        stitched = torch.zeros(whole.shape[-1], n_rows * step + 2 * m, n_columns * step + 2 * m)
        for n, features in enumerate(self._maps(pixels[1:])):
            r, c = divmod(n, n_columns)
            y0, x0 = (0 if place == 0 else m for place in (r, c))
            y1 = grid if r == n_rows - 1 else grid - m
            x1 = grid if c == n_columns - 1 else grid - m
            y, x = r * step, c * step
            stitched[:, y + y0 : y + y1, x + x0 : x + x1] = features[:, y0:y1, x0:x1]
        pooled = F.adaptive_avg_pool2d(stitched, (grid, grid))
        return whole, pooled.flatten(1).T

    def _maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, side, side] → [n, dim, grid, grid]"""
        features = torch.cat([self._tower(crop[None]) for crop in pixels])
        return features.transpose(1, 2).reshape(len(pixels), -1, self.grid, self.grid)

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, side, side] → [1, n, dim]"""
        grid, patch = self.grid, self.patch
        x = pixels.reshape(1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        x = self._linear("vision.patch_emb", x.reshape(1, grid**2, -1)) + self.w["vision.pos_emb"]
        layer = 0
        while f"vision.blocks.{layer}.ln1.weight" in self.w:
            name = f"vision.blocks.{layer}"
            qkv = self._linear(f"{name}.attn.qkv", self._norm(f"{name}.ln1", x))
            q, k, v = (self._heads(part, self.shape.vision_heads) for part in qkv.chunk(3, -1))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + self._linear(f"{name}.attn.proj", mixed)
            x = x + self._mlp(f"{name}.mlp", self._norm(f"{name}.ln2", x))
            layer += 1
        return self._norm("vision.post_ln", x)

    # text

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        return self.w["text.wte"][list(ids)]

    def begin(self, picture: torch.Tensor | None, bos_id: int) -> torch.Tensor:
        bos = self.embed([bos_id])
        return bos if picture is None else torch.cat([bos, picture])

    def run(
        self, rows: torch.Tensor, prefix: int, past: Past | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [n, dim] → the last row before the final norm [dim], and its logits [vocab].

        `past` holds what was read before and takes up what is read now.
        """
        past = [] if past is None else past
        n_past = past[0][0].shape[2] if past else 0
        n, dim = rows.shape
        mask = torch.ones(n_past + n, n_past + n, dtype=torch.bool).tril()
        mask[:prefix, :prefix] = True
        x, n_heads = rows[None], self.shape.text_heads
        head = dim // n_heads
        layer = 0
        while f"text.blocks.{layer}.ln.weight" in self.w:
            name = f"text.blocks.{layer}"
            normed = self._norm(f"{name}.ln", x)
            qkv = self._linear(f"{name}.attn.qkv", normed)
            n_kv = (qkv.shape[-1] - dim) // (2 * head)
            q, k, v = torch.tensor_split(qkv, (dim, dim + n_kv * head), dim=-1)
            q = _rotate(self._heads(q, n_heads), n_past)
            k, v = _rotate(self._heads(k, n_kv), n_past), self._heads(v, n_kv)
            if n_past:
                k, v = (torch.cat(both, dim=2) for both in zip(past[layer], (k, v), strict=True))
                past[layer] = k, v
            else:
                past.append((k, v))
            k, v = (part.repeat_interleave(n_heads // n_kv, dim=1) for part in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[n_past:])
            mixed = self._linear(f"{name}.attn.proj", mixed.transpose(1, 2).reshape(x.shape))
            x = x + mixed + self._mlp(f"{name}.mlp", normed)
            layer += 1
        last = x[0, -1]
        return last, self._linear("text.lm_head", self._norm("text.post_ln", last))

    def greedy(
        self,
        rows: torch.Tensor,
        prefix: int,
        steps: int,
        end_id: int,
        banned: Sequence[int] = (),
    ) -> tuple[list[int], torch.Tensor]:
        """Token ids without the end, and the logits after the prompt."""
        past: Past = []
        _, first = self.run(rows, prefix, past)
        logits = first
        ids: list[int] = []
        while (token := int(logits.argmax())) != end_id and len(ids) < steps:
            ids.append(token)
            _, logits = self.run(self.embed([token]), prefix, past)
            logits[list(banned)] = -math.inf
        return ids, first

    # region

    def coordinate(self, hidden: torch.Tensor) -> float:
        logits = self._mlp("region.coord_decoder", hidden)
        return int(logits.argmax()) / len(logits)

    def size(self, hidden: torch.Tensor) -> tuple[float, float]:
        logits = self._mlp("region.size_decoder", hidden).view(2, -1)
        width, height = (int(row.argmax()) for row in logits)
        if self.release == "2025-01-09":
            return width / logits.shape[1], height / logits.shape[1]
        return 2.0 ** (width / 1023 * 10 - 10), 2.0 ** (height / 1023 * 10 - 10)

    def encoded(self, kind: str, *values: float) -> torch.Tensor:
        """`kind` is coord or size; [1, dim]"""
        angles = 2 * math.pi * torch.tensor([values]) @ self.w[f"region.{kind}_features"]
        return self._linear(f"region.{kind}_encoder", torch.cat([angles.cos(), angles.sin()], -1))

    def find(
        self, rows: torch.Tensor, end_id: int, sized: bool, most: int
    ) -> list[tuple[float, ...]]:
        """(x, y) or (x, y, w, h) of each object."""
        found: list[tuple[float, ...]] = []
        past: Past = []
        hidden, logits = self.run(rows, self.prefix, past)
        while int(logits.argmax()) != end_id and len(found) < most:
            x = self.coordinate(hidden)
            hidden, logits = self.run(self.encoded("coord", x), self.prefix, past)
            y = self.coordinate(hidden)
            hidden, logits = self.run(self.encoded("coord", y), self.prefix, past)
            if sized:
                size = self.size(hidden)
                hidden, logits = self.run(self.encoded("size", *size), self.prefix, past)
                found.append((x, y, *size))
            else:
                found.append((x, y))
        return found

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self._linear(f"{name}.fc1", x), approximate="tanh")
        return self._linear(f"{name}.fc2", inner)

    def _heads(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """[1, rows, n · head] → [1, n, rows, head]"""
        return x.reshape(1, x.shape[1], n, -1).transpose(1, 2)


def tiling_2024(height: int, width: int, side: int) -> tuple[int, int]:
    """`VisionEncoder.preprocess` at 10c025b: of the supported sizes the one most alike."""
    if max(width, height) < 512:
        return 1, 1
    sizes = [(h * side, w * side) for h in (1, 2) for w in (1, 2)]
    best = min(
        sizes,
        key=lambda s: (abs(s[1] / s[0] - width / height), abs(s[0] - width) + abs(s[1] - height)),
    )
    return best[0] // side, best[1] // side


def tiling_2025(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """`select_tiling`, for a picture without its margins."""
    if height <= window or width <= window:
        return 1, 1
    least_rows, least_columns = -(-height // window), -(-width // window)
    if least_rows * least_columns > most:
        ratio = math.sqrt(most / (least_rows * least_columns))
        return max(1, int(least_rows * ratio)), max(1, int(least_columns * ratio))
    rows = max(int(math.sqrt(most * height / width)), least_rows)
    columns = max(int(math.sqrt(most * width / height)), least_columns)
    if rows * columns > most and columns > rows:
        columns = most // rows
    elif rows * columns > most:
        rows = most // columns
    return max(1, rows), max(1, columns)


def _array(image: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]"""
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def _cut(pixels: torch.Tensor, side: int, step: int, n_rows: int, n_columns: int) -> torch.Tensor:
    """[3, H, W] → [rows · columns, 3, side, side], row by row."""
    corners = [(r * step, c * step) for r in range(n_rows) for c in range(n_columns)]
    return torch.stack([pixels[:, y : y + side, x : x + side] for y, x in corners])


def _joined(tiles: torch.Tensor, n_rows: int, n_columns: int) -> torch.Tensor:
    """[rows · columns, dim, h, w] → [1, dim, rows · h, columns · w]"""
    _, dim, h, w = tiles.shape
    placed = tiles.reshape(n_rows, n_columns, dim, h, w).permute(2, 0, 3, 1, 4)
    return placed.reshape(1, dim, n_rows * h, n_columns * w)


def _rotate(x: torch.Tensor, first: int) -> torch.Tensor:
    """The first half of each head, its two halves paired; rows stand at `first` and behind."""
    n_rows, rotated = x.shape[2], x.shape[3] // 2
    half = rotated // 2
    frequencies = 10000.0 ** -(torch.arange(half) / half)
    angles = torch.arange(first, first + n_rows)[:, None] * frequencies
    a, b, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def open_checkpoint(checkpoint: Checkpoint, release: str | None = None) -> Reference:
    """The reference with a checkpoint's weights; `release` where nothing else tells it."""
    early_region = "region_model.position_encoder.weight" in checkpoint
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                weights[canonical(name, early_region)] = tensors.get_tensor(name).float()
    for kind, n_values in (("coord", 1), ("size", 2)):  # older names hold a Linear's matrix
        name = f"region.{kind}_features"
        if name in weights and len(weights[name]) != n_values:
            weights[name] = weights[name].T
    shape = _shape(checkpoint.config, weights)
    checkpoint.rename(lambda name: canonical(name, early_region))
    return Reference(weights, release_of(checkpoint, release), shape)


def _shape(config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> Shape:
    own = config.get("config") or {}
    text, vision = own.get("text") or {}, own.get("vision") or {}
    early = config.get("text_config") or config.get("phi_config") or {}
    widths = (weights[name].shape[-1] for name in ("text.wte", "vision.pos_emb"))
    text_heads, vision_heads = (_HEADS.get(width) for width in widths)
    default = Shape()
    return Shape(
        text.get("n_heads") or early.get("num_attention_heads") or text_heads or default.text_heads,
        vision.get("enc_n_heads") or vision_heads or default.vision_heads,
        vision.get("max_crops", default.max_crops),
        vision.get("overlap_margin", default.overlap),
    )


@torch.no_grad()
def answers(bundle: Bundle, checkpoint: Path, questions: Sequence[Question]) -> Iterator[Seen]:
    """What the reference makes of each question."""
    release = bundle.manifest.get("options", {}).get("release")
    opened = Checkpoint(checkpoint, bundle.file("tokenizer.json"))
    reference = open_checkpoint(opened, release)
    generation = bundle.manifest["generation"]
    (end_id,), banned = generation["stop_token_ids"], generation["banned_token_ids"]
    bos_id = bundle.manifest["prompt"]["bos_id"]
    for question in questions:
        image = Image.fromarray(question.pixels)
        picture = reference.encode(image)
        if reference.prefix:
            picture = reference.begin(picture, bos_id)

        def rows(ids: Ids, picture: torch.Tensor = picture) -> torch.Tensor:
            each = (reference.embed([i]) if isinstance(i, int) else picture for i in ids)
            return torch.cat([*each])

        tokens, logits = reference.greedy(
            rows(question.prompt), reference.prefix, STEPS, end_id, banned
        )
        places: list[tuple[float, ...]] = []
        for ids, sized in ((question.detect, True), (question.point, False)):
            if ids:
                places += reference.find(rows(ids), end_id, sized, MOST_PLACES)
        crops, n_rows, n_columns = reference.crops(image)
        if n_rows * n_columns == 1:  # the runtime does not encode the same crop twice
            crops = crops[:1]
        yield Seen(crops.numpy().astype(np.int16), picture.numpy(), logits.numpy(), tokens, places)
