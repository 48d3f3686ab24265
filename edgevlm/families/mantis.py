"""Mantis: LLaVA over several pictures, each with its number, anywhere among the words.

A question may say where its pictures belong ("Is <image> older than <image>?"); without that they
come first. Reference: TIGER-AI-Lab/Mantis, mantis/models/mllava/processing_llava.py.
"""

from __future__ import annotations

from edgevlm.bundle import MANIFEST, Bundle
from edgevlm.families import llava
from edgevlm.turns import Turns


class Family(llava.Family):
    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self._turns = Turns(bundle.file(MANIFEST), bundle.manifest["prompt"], interleaved=True)
