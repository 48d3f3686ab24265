"""Look at a picture with a model that runs on your own machine.

    import edgevlm
    with edgevlm.load() as vlm:
        print(vlm.describe("photo.jpg").text)

Names are imported on first use, so that `import edgevlm` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgevlm.answer import (
        Answer,
        Box,
        Devices,
        EncodedImage,
        Grounding,
        Outcome,
        Piece,
        Point,
        Reasoning,
        Timings,
    )
    from edgevlm.chat import Chat
    from edgevlm.engine import VLM, load
    from edgevlm.errors import (
        BackendError,
        BundleError,
        Cancelled,
        ContextOverflow,
        DeviceError,
        EdgeVLMError,
        HubError,
        ImageError,
        OutputError,
        PromptError,
        TimeBudget,
        UnknownFamily,
    )
    from edgevlm.options import Options
    from edgevlm.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Answer",
    "BackendError",
    "Box",
    "BundleError",
    "Cancelled",
    "Chat",
    "ContextOverflow",
    "DeviceError",
    "Devices",
    "EdgeVLMError",
    "EncodedImage",
    "Grounding",
    "HubError",
    "ImageError",
    "Options",
    "Outcome",
    "OutputError",
    "Piece",
    "Point",
    "PromptError",
    "Reasoning",
    "Settings",
    "TimeBudget",
    "Timings",
    "UnknownFamily",
    "load",
]

_HOMES = {
    "VLM": "engine",
    "load": "engine",
    "Chat": "chat",
    "Options": "options",
    "Settings": "settings",
    "Answer": "answer",
    "Box": "answer",
    "Devices": "answer",
    "EncodedImage": "answer",
    "Grounding": "answer",
    "Outcome": "answer",
    "Piece": "answer",
    "Point": "answer",
    "Reasoning": "answer",
    "Timings": "answer",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'edgevlm' has no attribute {name!r}")
    return getattr(import_module(f"edgevlm.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
