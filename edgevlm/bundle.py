"""A model directory: bundle.json in, checked paths and numbers out.

The manifest binds the parts by SHA-256, so that one model's vision file is never run beside
another's language file. A file is hashed when it is new or changed, not at every start.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm import paths
from edgevlm.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
MANIFEST = "bundle.json"

# Section → key → type of the value; what the runtime reads. Families add their own keys.
_SHAPE: dict[str, Any] = {
    "name": str,
    "family": str,
    "licence": str,
    "source": dict,
    "files": dict,
    "image": dict,
    "prompt": dict,
    "generation": {"stop_token_ids": list, "max_tokens": int, "repeat_penalty": (int, float)},
    "n_embd": int,
    "n_ctx": int,
    "quantization": dict,
    "card": dict,
}
_VISION_FILES = ("vision.onnx", "vision.data")  # the graph, and a large one's weights
_REQUIRED_FILES = ("vision.onnx", "language.gguf")
_ADAPTER = re.compile(r"adapter-(?P<name>.+)\.gguf")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

# A file that changed less than this before it was hashed could change again within the same tick
# of the file system's clock and look untouched; its verdict is not remembered.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Bundle:
    """An opened model directory. `manifest` is bundle.json as it was read."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def n_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())

    def file(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    @property
    def vision_files(self) -> tuple[str, ...]:
        """The graph of the vision model and, where they lie apart, its weights."""
        return tuple(filter(self.has, _VISION_FILES))

    @property
    def vision_sha256(self) -> str:
        """What the vision model is, told by its files."""
        first, *others = map(self.sha256, self.vision_files)
        return hashlib.sha256("".join((first, *others)).encode()).hexdigest() if others else first

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that can be switched on."""
        found = map(_ADAPTER.fullmatch, self.manifest["files"])
        return tuple(match["name"] for match in found if match)

    def sha256(self, name: str) -> str:
        return str(self.manifest["files"][name]["sha256"])

    def arrays(self, name: str) -> dict[str, NDArray[np.float32]]:
        """The arrays of an .npz file of the bundle, by name, as float32.

        Raises:
            BundleError: the bundle has no such file, or it holds something else.
        """
        import numpy as np  # here, because `info` needs none

        path = self.file(name)
        if not self.has(name):
            raise BundleError(f"{path.parent} lists no {name}: export the model again")
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key].astype(np.float32, copy=False) for key in stored}
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {error}") from error


def adapter_file(name: str) -> str:
    """The file of a LoRA adapter that is switched at run time; "adapter.gguf" is always on.

    Raises:
        BundleError: not a name for a file.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise BundleError(f"adapter name {name!r}: letters, digits, '_', '-' and '.' are allowed")
    return f"adapter-{name}.gguf"


def open_bundle(path: Path) -> Bundle:
    """Open a model directory and check every file it lists.

    Raises:
        BundleError: no bundle there, a newer format, a missing or damaged file.
    """
    bundle = Bundle(path, read_manifest(path / MANIFEST))
    for name, entry in bundle.manifest["files"].items():
        check_file(bundle.file(name), entry)
    return bundle


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check bundle.json alone; the files it lists may be missing.

    Raises:
        BundleError: missing, not JSON, a newer format, or without a key the runtime needs.
    """
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path.parent} holds no {MANIFEST}: give a model name (see `edgevlm models list`) "
            "or the directory of an exported model"
        ) from None
    except NotADirectoryError:
        raise BundleError(f"{path.parent} is a file; a model is a directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise BundleError(f"{path} is not a model manifest: it has no format number")
    if manifest["format"] != FORMAT:
        remedy = "update edgevlm" if manifest["format"] > FORMAT else "export the model again"
        raise BundleError(
            f"{path} has format {manifest['format']}; this version reads {FORMAT}: {remedy}"
        )
    if manifest.get("sha256", _checksum(manifest)) != _checksum(manifest):
        raise BundleError(
            f"{path} is not as it was written: pull or export the model again, or remove its "
            "'sha256' if it was changed on purpose"
        )
    check_shape(path, manifest, _SHAPE)
    for name, entry in manifest["files"].items():
        if not _PLAIN_NAME.fullmatch(name):
            raise BundleError(f"{path} lists the file {name!r}; names must be plain: export again")
        check_shape(path, {name: entry}, {name: {"bytes": int, "sha256": str}})
    counts = {key: manifest[key] for key in ("n_embd", "n_ctx")}
    for key, count in {**counts, "max_tokens": manifest["generation"]["max_tokens"]}.items():
        if count < 1:
            raise BundleError(f"{path}: {key!r} is {count}; expected 1 or more: export it again")
    missing = [name for name in _REQUIRED_FILES if name not in manifest["files"]]
    if missing:
        raise BundleError(f"{path} lists no {missing[0]}: export the model again")
    return manifest


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What bundle.json holds: the manifest, and as "sha256" the checksum of all the rest."""
    whole = {**manifest, "sha256": _checksum(manifest)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_shape(path: Path, section: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Every key of `shape` is in `section` with that type; `path` is for the message.

    Raises:
        BundleError: a key is missing or has another type.
    """
    for key, kind in shape.items():
        if key not in section:
            raise BundleError(f"{path} has no {key!r}: export the model again")
        value = section[key]
        expected = dict if isinstance(kind, dict) else kind
        if not isinstance(value, expected) or isinstance(value, bool) is not (expected is bool):
            raise BundleError(
                f"{path}: {key!r} is a {type(value).__name__}, not what this version expects: "
                "export the model again"
            )
        if isinstance(kind, dict):
            check_shape(path, value, kind)


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """The file has the size and the SHA-256 of `entry`; hashed only when it is new or changed.

    Raises:
        BundleError: it is missing, damaged or cannot be read.
    """
    try:
        stat = path.stat()
    except OSError:
        raise BundleError(
            f"{path} is missing: the copy of this model is not complete; pull or export it again"
        ) from None
    if stat.st_size != entry["bytes"]:
        raise BundleError(
            f"{path} has {stat.st_size} bytes; {MANIFEST} says {entry['bytes']}: "
            "the copy is not complete; pull or export the model again"
        )
    # A change of content changes ctime, and nobody sets ctime by hand.
    stamp = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    known = paths.cache("verified", hashlib.sha256(stamp.encode()).hexdigest()[:32])
    if paths.read_cache(known) == entry["sha256"]:
        return
    checked_ns = time.time_ns()
    try:
        found = file_sha256(path)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    if found != entry["sha256"]:
        raise BundleError(
            f"{path} has SHA-256 {found[:16]}…; {MANIFEST} says {entry['sha256'][:16]}…: the file "
            "is damaged or belongs to another model; pull or export the model again"
        )
    if checked_ns - stat.st_ctime_ns > _SETTLED_NS:
        paths.write_cache(known, found)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
