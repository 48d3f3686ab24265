"""The export stage: a checkpoint directory → a bundle that the runtime opens.

Needs neither torch nor transformers; weights stream from disk to disk.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

__all__ = ["export"]

_VISION_DTYPES = ("fp32",)


def export(
    source: Path,
    out: Path,
    *,
    family: str | None = None,
    language: str = "f16",
    vision: str = "fp32",
    prompt: str | None = None,
    fit: str | None = None,
) -> Path:
    """Write the bundle of the checkpoint directory `source` into the new directory `out`.

    `family`, `prompt` (the language model's template) and `fit` ("crop", "pad" or "stretch")
    override what the checkpoint says. Returns `out`.

    Raises:
        UnknownFamily: no family knows this checkpoint; the message lists what was seen.
        BundleError: the checkpoint is incomplete, contradictory or not understood, or `out` is
            taken. Nothing is left behind.
    """
    from . import bundle, families, gguf
    from .checkpoint import Checkpoint

    if language not in gguf.DTYPES:
        raise ValueError(f"language={language!r}; known: {', '.join(gguf.DTYPES)}")
    if vision not in _VISION_DTYPES:
        raise ValueError(f"vision={vision!r}; known: {', '.join(_VISION_DTYPES)}")
    checkpoint = Checkpoint(source)
    name, module = families.find(checkpoint, family)
    parts = module.parts(checkpoint, families.Options(prompt=prompt, fit=fit))
    with bundle.writing(out) as directory:
        parts.vision.save(directory / "vision.onnx")
        parts.language.save(directory / "language.gguf", language)
        shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
        manifest = {
            "name": out.resolve().name,
            "family": name,
            "source": {"id": source.resolve().name, "revision": ""},
            "licence": _licence(source),
            **parts.manifest,
            "n_embd": parts.language.n_embd,
            "n_ctx": parts.language.n_ctx,
            "quantization": {"vision": vision, "language": language},
        }
        bundle.seal(directory, manifest)
    return out


def _licence(source: Path) -> str:
    """The licence that the model card's front matter names."""
    card = source / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"\A---\n(?:(?!---).*\n)*?license:\s*(\S+)", text)
    return found[1] if found else "unknown"
