"""A hub id → the checkpoint's files on this machine, every one checked.

huggingface_hub does the work: resume, progress, HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
It compares sizes only, so the SHA-256 that the hub states is compared here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgevlm.bundle import file_sha256
from edgevlm.errors import HubError

_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# What the exporter reads (code as text: it tells releases apart, and is never run). Weights in
# other formats lie beside these in many repositories.
_WANTED = re.compile(r"[^/]*\.(json|jinja|py)|README\.md|tokenizer\.model|model[^/]*\.safetensors")

_CONFIG = "config.json"


@dataclass(frozen=True)
class Source:
    """A repository on the hub at a branch, tag or commit."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


@dataclass(frozen=True)
class File:
    name: str
    n_bytes: int
    sha256: str | None  # the hub states it for large files
    here: bool  # in the cache already, whole


@dataclass(frozen=True)
class Listing:
    """What a source consists of, before any of it is fetched."""

    source: Source
    commit: str
    files: tuple[File, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files if not file.here)


def parse(text: str) -> Source | None:
    """ "org/model" or "org/model@revision"; None for anything else."""
    match = _SOURCE.fullmatch(text)
    return Source(match[1], match[2] or "main") if match else None


def look_up(source: Source) -> Listing:
    """Ask the hub what there is.

    Raises:
        HubError: offline, no such repository or revision, or no right to see it.
    """
    hub = _hub()
    with _hub_errors(source):
        found = hub.HfApi().model_info(
            source.repository, revision=source.revision, files_metadata=True
        )
    files = []
    for entry in found.siblings or []:
        if _WANTED.fullmatch(entry.rfilename):
            cached = hub.try_to_load_from_cache(
                source.repository, entry.rfilename, revision=found.sha
            )
            sha256 = entry.lfs.sha256 if entry.lfs else None
            files.append(File(entry.rfilename, entry.size or 0, sha256, isinstance(cached, str)))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise HubError(f"{source} holds no model*.safetensors: pickled weights are not read")
    return Listing(source, str(found.sha), tuple(files))


def fetch(listing: Listing) -> Path:
    """The directory that holds the files of `listing`, fetched as far as they are missing.

    Raises:
        HubError: the connection failed (what came is kept for the next try), the disk is full,
            or a file is not what the hub says it is.
    """
    hub, source = _hub(), listing.source
    directory = Path()
    for file in listing.files:
        with _hub_errors(source):
            path = Path(hub.hf_hub_download(source.repository, file.name, revision=listing.commit))
        if not file.here and file.sha256 is not None:
            _check(path, file, source)
        directory = path.parent
    with _hub_errors(source):  # so that the cache knows which commit the revision names
        hub.hf_hub_download(source.repository, _CONFIG, revision=source.revision)
    return directory


def fetch_one(source: Source, name: str) -> Path:
    """One file of a source, from the cache where the hub cannot be asked.

    Raises:
        HubError: it is in neither.
    """
    hub = _hub()
    try:
        with _hub_errors(source):
            return Path(hub.hf_hub_download(source.repository, name, revision=source.revision))
    except HubError:
        found = hub.try_to_load_from_cache(source.repository, name, revision=source.revision)
        if not isinstance(found, str):
            raise
        return Path(found)


def cached(source: Source) -> Path | None:
    """The files of an earlier `fetch` of the same source; no network is asked."""
    found = _hub().try_to_load_from_cache(source.repository, _CONFIG, revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def cache_directory() -> Path:
    """Where huggingface_hub keeps what it fetches."""
    return Path(_hub().constants.HF_HUB_CACHE)


def _hub() -> Any:
    if find_spec("huggingface_hub") is None:
        raise HubError("fetching models needs huggingface_hub: pip install edgevlm[export]")
    import huggingface_hub

    return huggingface_hub


def _check(path: Path, file: File, source: Source) -> None:
    found = file_sha256(path)
    if found != file.sha256:
        blob = path.resolve()
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{file.name} of {source} has SHA-256 {found[:16]}…, the hub says "
            f"{str(file.sha256)[:16]}…: it was removed; pull again, or check HF_ENDPOINT"
        )


@contextmanager
def _hub_errors(source: Source) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{source} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub shows no {source.repository}: it does not exist, or it is private and "
            "HF_TOKEN is missing or wrong"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{source.repository} has no revision {source.revision}") from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"{source} is not on this machine and HF_HUB_OFFLINE forbids to fetch it"
        ) from error
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", "?")
        again = "try again later" if str(code).startswith("5") else "check HF_TOKEN"
        raise HubError(f"the hub answered {code} for {source}: {again}") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{source} could not be fetched: the hub cannot be reached; try again, what came is "
            "kept"
        ) from error
    except OSError as error:
        raise HubError(
            f"{source} could not be fetched: {error or type(error).__name__}; pull again, what "
            "came is kept"
        ) from error
    except _http_errors() as error:
        raise HubError(
            f"the connection to the hub failed while fetching {source} "
            f"({type(error).__name__}): pull again, what came is kept"
        ) from error


def _http_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of the installed huggingface_hub raises of its own."""
    found: list[type[Exception]] = []
    for name in ("httpx2", "httpx"):
        if find_spec(name) is not None:
            module: Any = __import__(name)
            found.append(module.HTTPError)
    return tuple(found)
