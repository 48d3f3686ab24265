"""Parts of a model → a bundle directory that opens only when it is whole.

Files go to a hidden sibling directory; bundle.json, with every file's size and SHA-256, is written
last, then one rename makes the bundle appear. An interrupted export leaves nothing that opens;
what a killed one left behind, the next one into the same place removes.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from edgevlm.bundle import FORMAT, MANIFEST, file_sha256, manifest_text
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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _fresh(out) as partial:
            try:
                yield partial
                partial.replace(out)
            except BaseException:
                shutil.rmtree(partial)
                raise
    except OSError as error:  # a full disk, a source that went away
        raise BundleError(f"{out} could not be written: {error}") from error


@contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, once those of killed exports are gone.

    A lock on it says that its process lives; locking the parent keeps two exports from taking a
    directory that is not locked yet for one that is left over.
    """
    prefix = f".{out.name}.partial-"
    partial = out.parent / f"{prefix}{secrets.token_hex(4)}"
    with ExitStack() as lives:
        with _locked(out.parent):
            for left in out.parent.glob(f"{glob.escape(prefix)}*"):
                with suppress(BlockingIOError), _locked(left, fcntl.LOCK_NB):
                    shutil.rmtree(left)
            partial.mkdir()
            lives.enter_context(_locked(partial))
        yield partial


@contextmanager
def _locked(directory: Path, flag: int = 0) -> Iterator[None]:
    """The lock goes with the process, however it ends."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flag)
        yield
    finally:
        os.close(descriptor)


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    """Write bundle.json over all files in `directory`."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(directory.iterdir())
    }
    whole = {"format": FORMAT, "exporter": EXPORTER, **manifest, "files": files}
    with (directory / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest_text(whole))
        stream.flush()
        os.fsync(stream.fileno())
