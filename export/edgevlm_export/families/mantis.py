"""Mantis-8B, CLIP and SigLIP: a LLaVA whose pictures are numbered in the prompt.

Recognised by the processor class that its files name. The select strategy is taken literally: with
SigLIP, which has no CLS row, "default" drops a patch, as the reference does.
"""

from __future__ import annotations

from dataclasses import replace

from .. import processor
from ..checkpoint import Checkpoint
from . import Options, Parts, llava

_AROUND = "(image {{n}}: <Image>{image}</Image>)"  # {n}: which picture of the conversation


def matches(checkpoint: Checkpoint) -> bool:
    architectures = checkpoint.config["architectures"]
    return "MantisForConditionalGeneration" in architectures or (
        "LlavaForConditionalGeneration" in architectures
        and processor.wrapper(checkpoint) == llava.MANTIS_PROCESSOR
    )


def parts(checkpoint: Checkpoint, options: Options) -> Parts:
    plain = llava.parts(checkpoint, options)
    prompt, card = plain.manifest["prompt"], plain.manifest["card"]
    summary = "Mantis: answers questions about several pictures, told apart by their numbers"
    manifest = {
        **plain.manifest,
        "prompt": {**prompt, "image": _AROUND.format(image=prompt["image_token"])},
        "card": {**card, "summary": summary},
    }
    return replace(plain, manifest=manifest)
