"""How a model is opened and run; the keywords of `edgevlm.load`."""

from __future__ import annotations

from dataclasses import dataclass

# Lets a phone's 50 and a stitched panorama's 60 megapixels pass. At the limit a decode holds about
# 0.7 GB (Pillow's 4 bytes a pixel and the array's 3): the most a small machine can lend a picture.
DEFAULT_MAX_PIXELS = 100_000_000
DEFAULT_CACHE_BYTES = 512 << 20  # 85 photos of 729 × 2048 values, or 6,000 of nano's
DETAILS = ("low", "auto", "high")
DEVICES = ("auto", "cpu", "cuda")


PREFILLS = ("auto", "gguf", "int8")


@dataclass(frozen=True)
class Settings:
    """What holds for an engine as long as it is open; `Options` holds for one call.

    Attributes:
        device: "cuda" runs everything on an NVIDIA GPU or fails, "auto" what can be run there.
        threads: one budget for every stage; None takes the physical cores, of which the language
            model leaves out those that other programs keep busy.
        max_pixels: larger pictures are refused before they are decoded.
        exact_decode: decode every JPEG at full size, even if the model sees it much smaller.
        detail: one of DETAILS: how closely a picture is looked at, by models that can cut it into
            few or many tiles. "auto" does as the model's reference.
        visual_tokens: so many of a picture's tokens reach the language model, chosen and merged by
            VisionZip (arXiv 2412.04467); None for all. A sooner first word, a coarser answer.
        precise: float32 keys and values, to compare with a reference.
        cache: keep image embeddings, in memory and on disk; the same photo is not encoded again.
        cache_bytes: what they may take on disk, those of all processes together.
        adapter: name of a LoRA adapter in the bundle; `VLM.use_adapter` switches it later.
        max_ram: bytes that the model may take; one that does not fit runs in a smaller, slower
            way or is refused before any work. None takes what the machine can lend.
        prefill: what reads a long prompt: "int8" is the bundle's prefill graph, "gguf" llama.cpp,
            "auto" the graph where the bundle has one.
    """

    device: str = "auto"
    threads: int | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    exact_decode: bool = False
    detail: str = "auto"
    visual_tokens: int | None = None
    precise: bool = False
    cache: bool = True
    cache_bytes: int = DEFAULT_CACHE_BYTES
    adapter: str | None = None
    max_ram: int | None = None
    prefill: str = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError for values outside their range."""
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be 1 or more")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels}; it must be 1 or more")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes is {self.cache_bytes}; it must be 0 or more")
        if self.detail not in DETAILS:
            raise ValueError(f"detail is {self.detail!r}; it must be one of {', '.join(DETAILS)}")
        if self.max_ram is not None and self.max_ram < 1:
            raise ValueError(f"max_ram is {self.max_ram}; it must be 1 or more")
        if self.prefill not in PREFILLS:
            raise ValueError(f"prefill is {self.prefill!r}; known: {', '.join(PREFILLS)}")
