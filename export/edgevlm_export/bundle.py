"""Parts of a model → a bundle directory that opens only when it is whole.

Files go to a hidden sibling directory; bundle.json, with every file's size and SHA-256, is written
last, then one rename makes the bundle appear. An interrupted export leaves nothing that opens.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgevlm.bundle import FORMAT, MANIFEST, file_sha256
from edgevlm.errors import BundleError

EXPORTER = "0.1.0"
# Positions of the cache that the runtime makes at load; a language model's own 131,072 would take
# gigabytes that pictures and questions never fill.
_LONGEST_CONTEXT = 8192


def context(n_ctx: int) -> int:
    """The context that a bundle asks for, of a language model that could take `n_ctx`."""
    return min(n_ctx, _LONGEST_CONTEXT)


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A fresh directory to write into; it becomes `out` when the block ends without an error.

    The block must call `seal` last. Raises BundleError when `out` already holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} already exists and is not empty: remove it or name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        partial.replace(out)
    except BaseException as error:
        shutil.rmtree(partial)
        if isinstance(error, OSError):  # a full disk, a source that went away
            raise BundleError(f"{out} could not be written: {error}") from error
        raise


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    """Write bundle.json over all files in `directory`."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.iterdir())
    }
    whole = {"format": FORMAT, "exporter": EXPORTER, **manifest, "files": files}
    with (directory / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(whole, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
