"""Where edgevlm keeps things: models, and a cache that may be deleted at any time.

Everything is written under a temporary name and renamed, so a killed process leaves no half file
under a final name.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def home() -> Path:
    """$XDG_CACHE_HOME/edgevlm, by default ~/.cache/edgevlm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgevlm"


def models() -> Path:
    """Installed models: $EDGEVLM_MODELS, by default `models` in the cache."""
    return Path(os.environ.get("EDGEVLM_MODELS") or home() / "models")


def cache(*parts: str) -> Path:
    return home().joinpath(*parts)


def read_cache(path: Path) -> str | None:
    """What `write_cache` remembered; None if it is not there or cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return None


def write_cache(path: Path, text: str) -> None:
    """Remember `text`; a cache that cannot be written (full or read-only disk) is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except OSError:
        return


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # as open() does, with the modes that umask allows
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
