"""A model's name or hub id → an installed model: looked up, planned, fetched, exported.

The plan comes first: what cannot fit on disk or in memory is refused before anything is fetched.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm import device, fetch, hub, memory, paths
from edgevlm.bundle import MANIFEST, read_manifest
from edgevlm.errors import BundleError, DeviceError, HubError

_CATALOGUE = Path(__file__).parent / "data" / "models.json"
_VALUE_BYTES = 2  # checkpoints are stored in 16 bits
_EXPORT_BYTES_S = 30e6  # of checkpoint, measured with int8 and q4_k_m on two slow cores


@dataclass(frozen=True)
class Known:
    """A model of the catalogue, edgevlm/data/models.json."""

    name: str
    source: fetch.Source
    licence: str
    summary: str
    parameters: int
    tokenizer: fetch.Source | None  # whose tokenizer.json takes the place of the checkpoint's

    @property
    def n_bytes(self) -> int:
        """Of the checkpoint, about."""
        return self.parameters * _VALUE_BYTES

    def memory_bytes(self, language: str) -> int:
        """To run it in its fastest way, about."""
        needs = memory.of_checkpoint(self.parameters, language)
        return memory.peak_bytes(needs, memory.ways(needs)[0])


@dataclass(frozen=True)
class Plan:
    """What a pull will take, before it begins."""

    download_bytes: int
    disk_bytes: int  # at the worst moment, without the download
    installed_bytes: int
    memory_bytes: int  # to run it in its fastest way
    least_memory_bytes: int  # and in its smallest
    export_s: float

    def __str__(self) -> str:
        return (
            f"{self.download_bytes / 1e9:.1f} GB to fetch, {self.disk_bytes / 1e9:.1f} GB of disk "
            f"while it is made ({self.installed_bytes / 1e9:.1f} GB in the end), about "
            f"{self.memory_bytes / 1e9:.1f} GB of memory to run, about "
            f"{max(1, round(self.export_s / 60))} min after the download"
        )


def catalogue() -> list[Known]:
    """Models that `pull` knows by name, smallest first."""
    entries: dict[str, Any] = json.loads(_CATALOGUE.read_text("utf-8"))["models"]
    known = [
        Known(
            name,
            fetch.Source(entry["source"], entry["revision"]),
            entry["licence"],
            entry["summary"],
            entry["parameters"],
            fetch.parse(entry.get("tokenizer", "")),
        )
        for name, entry in entries.items()
    ]
    return sorted(known, key=lambda model: model.parameters)


def find(wanted: str) -> tuple[str, fetch.Source]:
    """The name to install under, and the source.

    Raises:
        HubError: neither a known name nor a hub id.
    """
    for known in catalogue():
        if known.name == wanted:
            return known.name, known.source
    source = fetch.parse(wanted)
    if source is None:
        names = ", ".join(known.name for known in catalogue())
        raise HubError(f"there is no model {wanted!r}: give org/model[@revision] or one of {names}")
    return source.repository.split("/")[1].lower(), source


def plan(listing: fetch.Listing, language: str) -> Plan:
    parameters = listing.n_bytes // _VALUE_BYTES
    installed = memory.installed_bytes(parameters, language)
    needs = memory.of_checkpoint(parameters, language)
    whole = 0 if language == "f16" else listing.n_bytes  # an f16 file, on the way
    return Plan(
        download_bytes=listing.missing_bytes,
        disk_bytes=installed + whole,
        installed_bytes=installed,
        memory_bytes=memory.peak_bytes(needs, memory.ways(needs)[0]),
        least_memory_bytes=memory.least_bytes(needs),
        export_s=listing.n_bytes / _EXPORT_BYTES_S,
    )


def check(needed: Plan) -> None:
    """Refuse what cannot fit.

    Raises:
        DeviceError: not enough disk or memory; the message has the numbers.
    """
    if needed.least_memory_bytes > device.total_memory_bytes():
        raise DeviceError(
            f"this model needs about {needed.least_memory_bytes / 1e9:.1f} GB of memory at the "
            f"least, the machine has {device.total_memory_bytes() / 1e9:.1f}: take a smaller model "
            "or --llm q4_0"
        )
    wants: dict[int, tuple[Path, int]] = {}  # by file system
    for directory, n_bytes in (
        (fetch.cache_directory(), needed.download_bytes),
        (paths.models(), needed.disk_bytes),
    ):
        existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
        number = existing.stat().st_dev
        wants[number] = (existing, wants.get(number, (existing, 0))[1] + n_bytes)
    for existing, n_bytes in wants.values():
        free = shutil.disk_usage(existing).free
        if n_bytes > free:
            raise DeviceError(
                f"this needs {n_bytes / 1e9:.1f} GB on the disk of {existing}, which has "
                f"{free / 1e9:.1f} GB free: make room, or set HF_HOME and EDGEVLM_MODELS"
            )


def pull(
    wanted: str,
    *,
    language: str,
    export: Callable[[Path, Path, dict[str, str], Path | None], object],
    announce: Callable[[str], None],
) -> Path:
    """Install a model; `export` makes the bundle from (checkpoint, out, origin, tokenizer).

    Returns its directory, at once and without a network where it is there already.

    Raises:
        HubError: see `fetch`.
        DeviceError: see `check`.
        BundleError: the checkpoint cannot be exported.
    """
    name, source = find(wanted)
    target = paths.models() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with hub.locked(target.parent / f".{name}.lock"):
        if target.exists():
            installed = read_manifest(target / MANIFEST)["source"]
            if installed.get("id") == source.repository:
                return target
            raise HubError(
                f"{target} is another model ({installed.get('id')}): `edgevlm models remove "
                f"{name}` first"
            )
        try:
            listing = fetch.look_up(source)
        except HubError:
            checkpoint = fetch.cached(source)
            if checkpoint is None:
                raise
            commit = checkpoint.name
            announce(f"edgevlm: the hub cannot be asked; taking {source} from {checkpoint}")
        else:
            needed = plan(listing, language)
            announce(f"edgevlm: {source}: {needed}")
            check(needed)
            checkpoint, commit = fetch.fetch(listing), listing.commit
        origin = {"id": source.repository, "revision": commit}
        export(checkpoint, target, origin, _tokenizer(fetch.Source(source.repository, commit)))
    return target


def _tokenizer(source: fetch.Source) -> Path | None:
    """The tokenizer.json that the catalogue names for a commit."""
    for known in catalogue():
        if known.source == source and known.tokenizer is not None:
            return fetch.fetch_one(known.tokenizer, "tokenizer.json")
    return None


def remove(name: str) -> Path:
    """Delete an installed model; what huggingface_hub fetched for it stays in its cache.

    Raises:
        BundleError: there is no such model.
    """
    target = paths.models() / name
    if not re.fullmatch(r"[\w.-]+", name) or not (target / MANIFEST).is_file():
        raise BundleError(f"there is no installed model {name!r} in {paths.models()}")
    doomed = target.with_name(f".{name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    target.rename(doomed)  # from here on it cannot be opened
    shutil.rmtree(doomed)
    return target
