"""Optimized vision graphs on disk: ONNX Runtime need not optimize the same file at every start.

What it makes of a graph belongs to its version and to what this CPU can do (the layout of a
convolution's weights), so both are in the name. A copy is used only if it is, byte for byte, what
was written: else it is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edgevlm import bundle, device, paths
from edgevlm.errors import BundleError

_GRAPH, _ENTRY = "vision.onnx", "entry.json"
# Above, rearranging the weights takes the time, not the graph, and a copy would fill the disk. The
# exporter puts weights of larger graphs into a file of their own, which is mapped.
MOST_BYTES = 64_000_000


def root() -> Path:
    return paths.cache("graphs")


def directory(sha256: str, runtime: str) -> Path:
    """Where the optimized copy of a graph is kept; `runtime` is ONNX Runtime's version."""
    machine = hashlib.sha256(f"{runtime}|{device.cpu_features()}".encode()).hexdigest()[:16]
    return root() / sha256[:32] / machine


def usage() -> tuple[int, int]:
    """Copies, and their bytes."""
    sizes = []
    for copy in root().glob(f"*/*/{_GRAPH}"):
        with suppress(FileNotFoundError):  # another process removed it
            sizes.append(copy.stat().st_size)
    return len(sizes), sum(sizes)


def clear() -> None:
    """Remove every copy. Raises OSError."""
    if root().exists():
        shutil.rmtree(root())


def find(directory: Path) -> Path | None:
    """The copy, or None: none there, or not what was written."""
    try:
        entry = json.loads((directory / _ENTRY).read_text("utf-8"))
        bundle.check_file(directory / _GRAPH, entry)
    except (OSError, ValueError, TypeError, KeyError, BundleError):
        return None
    return directory / _GRAPH


def keep(directory: Path, write: Callable[[Path], object]) -> None:
    """Replace the copy by what `write` writes to a path; a cache that cannot be written is none.

    Copies of the same graph for another version or CPU go.
    """
    try:
        shutil.rmtree(directory.parent, ignore_errors=True)
        directory.parent.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            write(made / _GRAPH)
            entry = {
                "bytes": (made / _GRAPH).stat().st_size,
                "sha256": bundle.file_sha256(made / _GRAPH),
            }
            (made / _ENTRY).write_text(json.dumps(entry), "utf-8")
            made.rename(directory)
    except OSError:
        return
