"""The reference Moondream's arithmetic, written from its description in torch, float32.

Crops, tower, stitching, projector, decoder with its bidirectional prefix, and the loops around
them: vikhyat/moondream, moondream/torch/ and (2024) moondream/vision_encoder.py. Slow and plain:
the whole sequence is computed again for every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

LANCZOS, BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC


@dataclass
class Shape:
    """Numbers that the tensors do not show."""

    text_heads: int = 2
    vision_heads: int = 3
    max_crops: int = 12
    overlap: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


class Reference:
    """`weights` by the names of 2025, without `model.`; `release` as the exporter names it."""

    def __init__(self, weights: dict[str, torch.Tensor], release: str, shape: Shape) -> None:
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
        image = image.convert("RGB")
        if self.release == "2024-03-04":
            return self._project(
                self._tower(self._pixels(image.resize((self.side,) * 2, BICUBIC)))
            )[0]
        whole, pooled = (
            self._views_2024(image) if self.release == "2024-05-20" else self._views_2025(image)
        )
        return self._project(torch.cat([whole, pooled], dim=-1))

    def _views_2024(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        width, height = image.size
        sizes = [(h * self.side, w * self.side) for h in (1, 2) for w in (1, 2)]
        target = sizes[0]
        if max(width, height) >= 512:
            target = min(
                sizes,
                key=lambda s: (
                    abs(s[1] / s[0] - width / height),
                    abs(s[0] - width) + abs(s[1] - height),
                ),
            )
        pixels = self._pixels(image.resize((target[1], target[0]), BICUBIC))  # [1, 3, H, W]
        small = F.interpolate(pixels, size=(self.side, self.side), mode="bilinear")
        whole = self._tower(small)[0]
        if target == sizes[0]:
            return whole, whole
        rows = []
        for top in range(0, target[0], self.side):
            row = [
                self._tower(pixels[:, :, top : top + self.side, left : left + self.side])
                for left in range(0, target[1], self.side)
            ]
            rows.append(torch.cat([self._map(features) for features in row], dim=3))
        stitched = torch.cat(rows, dim=2)
        pooled = F.interpolate(stitched, size=(self.grid, self.grid), mode="bilinear")
        return whole, pooled[0].flatten(1).T

    def _views_2025(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        m, grid = self.shape.overlap, self.grid
        window, margin = (grid - 2 * m) * self.patch, 2 * m * self.patch
        n_rows, n_columns = tiling(
            image.height - margin, image.width - margin, window, self.shape.max_crops
        )
        whole = self._tower(self._pixels(image.resize((self.side, self.side), LANCZOS)))[0]
        size = (n_columns * window + margin, n_rows * window + margin)
        pixels = self._pixels(image.resize(size, LANCZOS))
        dim = whole.shape[-1]
        stitched = torch.zeros(
            dim, n_rows * (grid - 2 * m) + 2 * m, n_columns * (grid - 2 * m) + 2 * m
        )
        for r in range(n_rows):
            for c in range(n_columns):
                top, left = r * window, c * window
                crop = pixels[:, :, top : top + self.side, left : left + self.side]
                features = self._map(self._tower(crop))[0]
                y0, x0 = (0 if n == 0 else m for n in (r, c))
                y1 = grid if r == n_rows - 1 else grid - m
                x1 = grid if c == n_columns - 1 else grid - m
                y, x = r * (grid - 2 * m), c * (grid - 2 * m)
                stitched[:, y + y0 : y + y1, x + x0 : x + x1] = features[:, y0:y1, x0:x1]
        pooled = F.adaptive_avg_pool2d(stitched, (grid, grid))
        return whole, pooled.flatten(1).T

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        values = torch.tensor(np.asarray(image)).permute(2, 0, 1).float()
        return (values[None] / 255 - 0.5) / 0.5

    def _map(self, features: torch.Tensor) -> torch.Tensor:
        """[1, n, dim] → [1, dim, grid, grid]"""
        return features.transpose(1, 2).reshape(1, -1, self.grid, self.grid)

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, side, side] → [1, n, dim]"""
        grid, patch = self.grid, self.patch
        x = pixels.reshape(1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        x = self._linear("vision.patch_emb", x.reshape(1, grid**2, -1)) + self.w["vision.pos_emb"]
        layer = 0
        while f"vision.blocks.{layer}.ln1.weight" in self.w:
            name = f"vision.blocks.{layer}"
            q, k, v = (
                self._heads(part, self.shape.vision_heads)
                for part in self._linear(f"{name}.attn.qkv", self._norm(f"{name}.ln1", x)).chunk(
                    3, -1
                )
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + self._linear(f"{name}.attn.proj", mixed)
            x = x + self._mlp(f"{name}.mlp", self._norm(f"{name}.ln2", x))
            layer += 1
        return self._norm("vision.post_ln", x)

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        return self._mlp("vision.proj_mlp", features)

    # text

    def embed(self, ids: list[int]) -> torch.Tensor:
        return self.w["text.wte"][ids]

    def begin(self, picture: torch.Tensor | None, bos_id: int) -> torch.Tensor:
        bos = self.embed([bos_id])
        return bos if picture is None else torch.cat([bos, picture])

    def run(self, rows: torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [n, dim] → the last row before the final norm [dim], and its logits [vocab]."""
        n, dim = rows.shape
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        mask[:prefix, :prefix] = True
        x, n_heads = rows[None], self.shape.text_heads
        head = dim // n_heads
        layer = 0
        while f"text.blocks.{layer}.ln.weight" in self.w:
            name = f"text.blocks.{layer}"
            normed = self._norm(f"{name}.ln", x)
            qkv = self._linear(f"{name}.attn.qkv", normed)
            n_kv = (qkv.shape[-1] - dim) // (2 * head)
            q, k, v = qkv.split([dim, n_kv * head, n_kv * head], dim=-1)
            q = _rotate(self._heads(q, n_heads))
            k = _rotate(self._heads(k, n_kv)).repeat_interleave(n_heads // n_kv, dim=1)
            v = self._heads(v, n_kv).repeat_interleave(n_heads // n_kv, dim=1)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            mixed = self._linear(f"{name}.attn.proj", mixed.transpose(1, 2).reshape(x.shape))
            x = x + mixed + self._mlp(f"{name}.mlp", normed)
            layer += 1
        last = x[0, -1]
        return last, self._linear("text.lm_head", self._norm("text.post_ln", last))

    def greedy(
        self, rows: torch.Tensor, prefix: int, steps: int, end_id: int, banned: tuple[int, ...] = ()
    ) -> tuple[list[int], torch.Tensor]:
        """Token ids without the end, and the logits after the prompt."""
        _, logits = first = self.run(rows, prefix)
        ids: list[int] = []
        while (token := int(logits.argmax())) != end_id and len(ids) < steps:
            ids.append(token)
            rows = torch.cat([rows, self.embed([token])])
            _, logits = self.run(rows, prefix)
            logits = logits.clone()
            logits[list(banned)] = -math.inf
        return ids, first[1]

    # region

    def coordinate(self, hidden: torch.Tensor) -> float:
        logits = self._mlp("region.coord_decoder", hidden)
        return int(logits.argmax()) / len(logits)

    def size(self, hidden: torch.Tensor) -> tuple[float, float]:
        bins = [int(row.argmax()) for row in self._mlp("region.size_decoder", hidden).view(2, -1)]
        if self.release == "2025-01-09":
            return bins[0] / 1024, bins[1] / 1024
        return 2.0 ** (bins[0] / 1023 * 10 - 10), 2.0 ** (bins[1] / 1023 * 10 - 10)

    def encoded(self, kind: str, *values: float) -> torch.Tensor:
        """`kind` is coord or size; [1, dim]"""
        angles = 2 * math.pi * torch.tensor([values]) @ self.w[f"region.{kind}_features"]
        return self._linear(f"region.{kind}_encoder", torch.cat([angles.cos(), angles.sin()], -1))

    def find(
        self, rows: torch.Tensor, end_id: int, sized: bool, most: int
    ) -> list[tuple[float, ...]]:
        """(x, y) or (x, y, w, h) of each object."""
        found: list[tuple[float, ...]] = []
        hidden, logits = self.run(rows, self.prefix)
        while int(logits.argmax()) != end_id and len(found) < most:
            x = self.coordinate(hidden)
            rows = torch.cat([rows, self.encoded("coord", x)])
            hidden, logits = self.run(rows, self.prefix)
            y = self.coordinate(hidden)
            rows = torch.cat([rows, self.encoded("coord", y)])
            hidden, logits = self.run(rows, self.prefix)
            if sized:
                size = self.size(hidden)
                rows = torch.cat([rows, self.encoded("size", *size)])
                hidden, logits = self.run(rows, self.prefix)
                found.append((x, y, *size))
            else:
                found.append((x, y))
        return found

    def think(
        self, rows: torch.Tensor, ids: dict[str, int], steps: int
    ) -> tuple[list[tuple[list[int], list[float]]], torch.Tensor]:
        """Chunks of thoughts (token ids, coordinates), and the rows up to their end."""
        chunks: list[tuple[list[int], list[float]]] = [([], [])]
        n_tokens = 0
        hidden, logits = self.run(rows, self.prefix)
        while (token := int(logits.argmax())) != ids["answer_id"] and n_tokens < steps:
            if token in (ids["start_ground_points_id"], ids["end_ground_id"]):
                chunks.append(([], []))
            chunks[-1][0].append(token)
            n_tokens += 1
            row = self.embed([token])
            if token == ids["coord_id"]:
                chunks[-1][1].append(self.coordinate(hidden))
                row = self.encoded("coord", chunks[-1][1][-1])
            rows = torch.cat([rows, row])
            hidden, logits = self.run(rows, self.prefix)
            logits = logits.clone()
            logits[[ids["eos_id"], ids["size_id"]]] = -math.inf
        return chunks, rows

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._linear(
            f"{name}.fc2", F.gelu(self._linear(f"{name}.fc1", x), approximate="tanh")
        )

    def _heads(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """[1, rows, n · head] → [1, n, rows, head]"""
        return x.unflatten(-1, (n, -1)).transpose(1, 2)


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """The first half of each head, its two halves paired; positions count from 0."""
    n_rows, rotated = x.shape[2], x.shape[3] // 2
    half = rotated // 2
    frequencies = 10000.0 ** -(torch.arange(half) / half)
    angles = torch.arange(n_rows)[:, None] * frequencies
    a, b, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def tiling(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """Rows and columns of crops, for a picture without its margins."""
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
