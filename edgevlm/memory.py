"""What a model takes in memory, part by part, before any of it is opened.

Estimates of peak resident memory, mapped file pages included; docs/memory.md says which models
they were measured with, and which exceeds them. tests/test_memory.py holds them for two.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgevlm import device, families
from edgevlm.bundle import Bundle
from edgevlm.gguf import Shape, read_shape
from edgevlm.layout import Layout

EMBEDDINGS_BYTES = 16 << 20  # of photos seen lately; cache.py holds more on disk
BATCH_TOKENS = 512  # what llama.cpp computes at once, its own default

_LIBRARIES_BYTES = 95 << 20  # interpreter, numpy, Pillow, ONNX Runtime, llama.cpp
_PHOTO_BYTES = 12_000_000 * 7  # 12 megapixels decoded at full size: Pillow's 4 bytes, ours 3
# ONNX Runtime's session against the file, while it opens and then: it packs weights anew, and
# holds fp16 as float32.
_SESSION = {"fp16": (3.1, 2.1), "fp32": (1.4, 1.05), "int8": (1.05, 1.05)}
_PREFILL = 1.05  # the same of the prefill graph, whose weights are mapped
_GRAPH_BYTES = 45 << 20, 15 << 20  # besides the weights
_TOWER_HEADS = 16  # of CLIP-L and SigLIP-so400m alike; their scores are the largest activation,
_SCORE_BYTES = 2 * 4  # in float32: the product and its softmax
_PATCH_BYTES = 4096 * 4 * 2  # a feed-forward layer's row, before and after its activation
_TOKENIZER = 20  # times tokenizer.json, once it is read
_VOCABULARY_BYTES = 512  # a token: its text, its merges, its logit and the sampler's copies
_BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7}
_BITS |= {"q4_k_m": 4.9, "q4_0": 4.6}
_AS_THEY_ARE = ("f32", "f16", "bf16")  # kinds that llama.cpp never lays out anew,
_AMX_ONLY = ("q4_1",)  # and those that it does for AMX alone
_READ_PLAIN = ("q4_k_m",)  # on x86-64: a prompt took 7.9 s instead of 10.6, a token 72 ms for 63
_STEP_TOKENS = 256  # a smaller context is a multiple of this,
_ROOM_TOKENS = 256  # and leaves this for question and answer beside the largest picture
_SIZES_PX = ((1500, 2000), (3000, 4000), (4000, 3000), (2000, 2000), (1000, 4000), (4000, 1000))
# Of a checkpoint only the number of parameters is known. The catalogue's largest tower and largest
# share of a tower; keys, values and scores of a token grow with parameters ** 0.75: no model of the
# catalogue is above this, from SmolLM2-135M's 4.1e4 bytes to Vicuna-7B's 5.9e5.
_TOWER_PARAMETERS, _TOWER_SHARE = 450_000_000, 0.36
_GUESSED_N_CTX, _GUESSED_BUFFER_BYTES = 2048, 100 << 20
_CONTEXT_FACTOR, _CONTEXT_POWER = 0.033, 0.75


@dataclass(frozen=True)
class Needs:
    """What the parts of a model take. Vision and language also work one at a time."""

    libraries_bytes: int
    opening_bytes: int  # the session of vision.onnx while it opens, which it does first,
    vision_bytes: int  # and from then on
    working_bytes: int  # a photo's pixels, then the activations of one run, and photos seen before
    language_bytes: int  # weights, the tokenizer, and what else answers need
    prefill_bytes: int  # the prefill graph with what it gives; 0 where there is none
    repacks: bool  # llama.cpp can lay the weights out for this CPU as it reads them,
    reads_plain: bool  # and reads prompts sooner if it does not
    buffer_bytes: int  # llama.cpp's for a batch, whatever the context
    cache_bytes_a_token: int  # keys and values
    score_bytes_a_token: int  # of a batch, as it attends to the context
    n_ctx: int
    least_n_ctx: int  # which a context begins with, too

    def with_weights(self, share: float) -> Needs:
        """The same model with language weights of that share of the size."""
        return replace(self, language_bytes=round(self.language_bytes * share))


@dataclass(frozen=True)
class Way:
    """A way to run a model: what is in memory, and what of it at the same time.

    Attributes:
        apart: the vision session and the language model take turns.
        prefill: a prefill graph is used, where there is one.
        repacked: llama.cpp lays the weights out for this CPU as it reads them.
        n_ctx: positions that the context may have,
        first_n_ctx: and those that it has until more are needed.
    """

    apart: bool
    prefill: bool
    repacked: bool
    n_ctx: int
    first_n_ctx: int


def peak_bytes(needs: Needs, way: Way) -> int:
    """The most that is in memory at one time."""
    context = needs.cache_bytes_a_token * way.n_ctx
    # when it grows, what it held is kept aside for a moment
    moved = needs.cache_bytes_a_token * way.first_n_ctx if way.first_n_ctx < way.n_ctx else 0
    context += max(needs.score_bytes_a_token * way.n_ctx, moved)
    language = needs.language_bytes + needs.buffer_bytes + context
    if way.prefill:
        language += needs.prefill_bytes
    seeing = needs.vision_bytes + needs.working_bytes
    together = max(seeing, language) if way.apart else seeing + language
    return needs.libraries_bytes + max(needs.opening_bytes, together)


def ways(needs: Needs) -> list[Way]:
    """From the fastest to the smallest with the whole context."""
    repacked = needs.repacks and not (needs.reads_plain and needs.prefill_bytes == 0)
    whole = Way(False, True, repacked, needs.n_ctx, needs.least_n_ctx)
    alone = replace(whole, prefill=False, repacked=needs.repacks and not needs.reads_plain)
    apart = replace(alone, apart=True)
    return [whole, alone, apart] if needs.prefill_bytes else [whole, apart]


def least_bytes(needs: Needs) -> int:
    """The peak of the smallest way."""
    return peak_bytes(needs, _smallest(needs))


def fitting(needs: Needs, bound_bytes: float) -> Way | None:
    """The fastest way that stays within the bound; None if there is none."""
    for way in ways(needs):
        if peak_bytes(needs, way) <= bound_bytes:
            return way
    least = _smallest(needs)
    more = range(needs.n_ctx - needs.n_ctx % _STEP_TOKENS, least.n_ctx, -_STEP_TOKENS)
    for n_ctx in (*more, least.n_ctx):
        way = replace(least, n_ctx=n_ctx)
        if peak_bytes(needs, way) <= bound_bytes:
            return way
    return None


def _smallest(needs: Needs) -> Way:
    return replace(ways(needs)[-1], n_ctx=needs.least_n_ctx)


def of_bundle(bundle: Bundle, *, extra_buffers: bool = True, precise: bool = False) -> Needs:
    """The needs of a bundle, whose language file may still have to be fetched.

    `extra_buffers`: llama.cpp may lay weights out anew (`probe.verdict`); `precise`: keys and
    values in float32.

    Raises:
        BundleError: language.gguf is not readable, or its family's numbers are not.
    """
    manifest = bundle.manifest
    kinds: Mapping[str, str] = manifest["quantization"]
    sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    file, n_ctx = bundle.file("language.gguf"), int(manifest["n_ctx"])
    batch = min(n_ctx, max(BATCH_TOKENS, manifest["image"].get("bidirectional_tokens", 0)))
    language = sizes.pop("language.gguf")
    if file.is_file():
        fixed, cache, scores = _buffers(read_shape(file), batch, precise=precise)
    else:
        fixed, cache, scores = _guessed_buffers(round(8 / _bits(kinds["language"]) * language))
    beside = prefill = 0
    vision_bytes = sum(sizes.pop(name) for name in bundle.vision_files)
    opening, vision = _session_bytes(vision_bytes, kinds.get("vision", ""))
    for name, n_bytes in sizes.items():
        if name.startswith("prefill."):
            prefill += round(n_bytes * _PREFILL)
        elif name.endswith(".onnx"):
            beside += _session_bytes(n_bytes, kinds.get(name.removesuffix(".onnx"), ""))[0]
        else:
            beside += n_bytes * (_TOKENIZER if name == "tokenizer.json" else 1)
    family = families.find(bundle)
    if prefill:  # keys and values where llama.cpp takes them from, and what is computed at a time
        prefill += 2 * cache * n_ctx
    layouts = [family.layout(*size) for size in _SIZES_PX]
    least = max(layout.n_tokens for layout in layouts) + _ROOM_TOKENS
    return Needs(
        libraries_bytes=_LIBRARIES_BYTES,
        opening_bytes=opening,
        vision_bytes=vision,
        working_bytes=EMBEDDINGS_BYTES
        + max(_PHOTO_BYTES, *(_activations(family, layout) for layout in layouts)),
        language_bytes=language + beside,
        prefill_bytes=prefill,
        repacks=extra_buffers and _is_repacked(kinds["language"]),
        reads_plain=_reads_plain(kinds["language"]),
        buffer_bytes=fixed,
        cache_bytes_a_token=cache,
        score_bytes_a_token=scores,
        n_ctx=n_ctx,
        least_n_ctx=min(n_ctx, -(-least // _STEP_TOKENS) * _STEP_TOKENS),
    )


def of_checkpoint(n_parameters: int, language: str) -> Needs:
    """The needs of a bundle with an int8 tower that a checkpoint of this size would become."""
    tower = min(_TOWER_PARAMETERS, round(n_parameters * _TOWER_SHARE))
    weights = round((n_parameters - tower) * _bits(language) / 8)
    fixed, cache, scores = _guessed_buffers(n_parameters)
    opening, vision = _session_bytes(tower, "int8")
    return Needs(
        libraries_bytes=_LIBRARIES_BYTES,
        opening_bytes=opening,
        vision_bytes=vision,
        working_bytes=EMBEDDINGS_BYTES + _PHOTO_BYTES,
        language_bytes=weights,
        prefill_bytes=n_parameters - tower,
        repacks=_is_repacked(language),
        reads_plain=_reads_plain(language),
        buffer_bytes=fixed,
        cache_bytes_a_token=cache,
        score_bytes_a_token=scores,
        n_ctx=_GUESSED_N_CTX,
        least_n_ctx=_GUESSED_N_CTX // 2,
    )


def smaller_kinds(kind: str) -> list[tuple[str, float]]:
    """Kinds that `edgevlm export --llm` knows and that are smaller, largest first, with the share
    of the size that remains."""
    bits = _bits(kind)
    shares = [(other, _BITS[other] / bits) for other in _BITS if _BITS[other] < bits]
    return sorted(shares, key=lambda smaller: -smaller[1])


def installed_bytes(n_parameters: int, language: str) -> int:
    """Of the files that a checkpoint of this size becomes."""
    tower = min(_TOWER_PARAMETERS, round(n_parameters * _TOWER_SHARE))
    return tower + round((n_parameters - tower) * (_bits(language) / 8 + 1))  # 1: prefill graph


def _session_bytes(file_bytes: int, kind: str) -> tuple[int, int]:
    """Of a graph's session: while it opens, and from then on."""
    opening, then = _SESSION.get(kind, max(_SESSION.values()))
    return round(file_bytes * opening) + _GRAPH_BYTES[0], round(file_bytes * then) + _GRAPH_BYTES[1]


def _activations(family: families.Family, layout: Layout) -> int:
    """Of the largest run of the vision graph: attention between the patches of each tile."""
    patches = (layout.tile_px // layout.patch_px) ** 2
    tiles = max(len(range(layout.n_tiles)[tiles]) for tiles, _ in family.runs(layout))
    return tiles * patches * (patches * _TOWER_HEADS * _SCORE_BYTES + _PATCH_BYTES)


def _buffers(shape: Shape, batch: int, *, precise: bool) -> tuple[int, int, int]:
    """llama.cpp's memory besides the weights: whatever the context, and for each token of it keys
    and values, and scores."""
    keys_and_values = shape.n_layers * shape.kv_width * (4 if precise else 2)
    scores = shape.n_heads * batch * 4
    rows = batch * (3 * shape.n_ff + 4 * shape.n_embd) * 4
    return rows + shape.n_vocab * _VOCABULARY_BYTES, keys_and_values, scores


def _guessed_buffers(n_parameters: int) -> tuple[int, int, int]:
    """The same for a model of which only the size is known."""
    half = round(_CONTEXT_FACTOR * n_parameters**_CONTEXT_POWER / 2)
    return _GUESSED_BUFFER_BYTES, half, half


def _bits(kind: str) -> float:
    """Bits a weight, of a kind as `edgevlm export --llm` calls it."""
    return {**_BITS, "q4_1": 5.0}.get(kind, 16.0)


def _is_repacked(kind: str) -> bool:
    return kind not in _AS_THEY_ARE and (kind not in _AMX_ONLY or device.has_amx())


def _reads_plain(kind: str) -> bool:
    return kind in _READ_PLAIN and platform.machine().lower() in ("x86_64", "amd64")
