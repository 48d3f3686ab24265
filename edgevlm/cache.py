"""Image embeddings that were made before: by the photo's content, the model and the settings.

In memory for this process and on disk for all; bounded, the least recently used go first. A file
is written whole and carries its checksum, so that other processes, kill -9 and full disks cost a
second encoding at worst, never an answer. Photos can be guessed from them: the folder is private.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevlm import paths
from edgevlm.memory import EMBEDDINGS_BYTES

_REVISION = 1  # raise it when the same file and layout give other patches or embeddings
_HEADER = struct.Struct("<8sII32s")  # magic, n_tokens, n_embd, SHA-256 of what follows
_MAGIC = b"EDGEVLM1"
_ABANDONED_S = 3600.0  # a temporary file this old belongs to a process that was killed


@dataclass(frozen=True)
class Entry:
    """Embeddings float32 [n_tokens, n_embd], read-only, and their SHA-256."""

    embeddings: NDArray[np.float32]
    sha256: str


def entry(embeddings: NDArray[np.float32]) -> Entry:
    """An entry of new embeddings, which nobody may change from now on."""
    embeddings.flags.writeable = False
    return Entry(embeddings, hashlib.sha256(embeddings.data).hexdigest())


def key(*parts: str) -> str:
    """Of the content's digest and all that decides what the model makes of it."""
    return hashlib.sha256("\n".join((str(_REVISION), *parts)).encode()).hexdigest()


def directory() -> Path:
    return paths.cache("embeddings")


class Cache:
    """Entries by `key`, for any number of threads and processes."""

    def __init__(self, disk_bytes: int) -> None:
        self._lock = threading.Lock()
        self._memory: OrderedDict[str, Entry] = OrderedDict()
        self._disk = Disk(directory(), disk_bytes)

    def get(self, key: str) -> Entry | None:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        found = self._disk.read(key)
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, key: str, made: Entry) -> None:
        self._remember(key, made)
        self._disk.write(key, made)

    def _remember(self, key: str, made: Entry) -> None:
        with self._lock:
            self._memory[key] = made
            n_bytes = sum(held.embeddings.nbytes for held in self._memory.values())
            while n_bytes > EMBEDDINGS_BYTES:
                n_bytes -= self._memory.popitem(last=False)[1].embeddings.nbytes


class Disk:
    """One file an entry, named by its key; the time of its last change is that of its last use."""

    def __init__(self, directory: Path, most_bytes: int = 0) -> None:
        self.directory = directory
        self._most_bytes = most_bytes
        self._room_bytes = 0  # what may be written before the folder is looked at again

    def read(self, key: str) -> Entry | None:
        path = self.directory / key
        try:
            data = path.read_bytes()
        except OSError:
            return None
        found = _parse(data)
        try:
            if found is None:  # torn by a power failure, or damaged
                path.unlink(missing_ok=True)
            else:
                os.utime(path)
        except OSError:
            pass  # a read-only disk
        return found

    def write(self, key: str, made: Entry) -> None:
        data = _HEADER.pack(_MAGIC, *made.embeddings.shape, bytes.fromhex(made.sha256))
        n_bytes = len(data) + made.embeddings.nbytes
        if n_bytes > self._most_bytes:
            return
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
            if n_bytes > self._room_bytes:
                self._make_room(n_bytes)
            paths.write_atomic(self.directory / key, data + made.embeddings.tobytes())
            self._room_bytes -= n_bytes
        except OSError:
            pass  # a full or read-only disk

    def usage(self) -> tuple[int, int]:
        """Entries, and their bytes."""
        sizes = [n_bytes for _, n_bytes, _ in self._files()]
        return len(sizes), sum(sizes)

    def clear(self) -> None:
        """Remove every entry. Raises OSError."""
        for _, _, path in self._files():
            path.unlink(missing_ok=True)

    def _make_room(self, n_bytes: int) -> None:
        """Remove what was not used for longest. Looked at once for each eighth that is written,
        because other processes write, too, and looking takes a while."""
        files = self._files()
        total = sum(size for _, size, _ in files)
        share = max(n_bytes, self._most_bytes // 8)
        for used, size, path in files:
            abandoned = path.name.startswith(".") and time.time() - used > _ABANDONED_S
            if abandoned or total > self._most_bytes - share:
                path.unlink(missing_ok=True)
                total -= size
        self._room_bytes = share

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path), least recently used first; half-written ones, too."""
        found = []
        for path in self.directory.glob("*") if self.directory.is_dir() else ():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process removed it
            found.append((stat.st_mtime, stat.st_size, path))
        return sorted(found)


def _parse(data: bytes) -> Entry | None:
    """An entry, if this is a whole one."""
    if len(data) < _HEADER.size:
        return None
    magic, n_tokens, n_embd, digest = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    if magic != _MAGIC or len(body) != 4 * n_tokens * n_embd:
        return None
    if hashlib.sha256(body).digest() != digest:
        return None
    return Entry(np.frombuffer(body, "<f4").reshape(n_tokens, n_embd), digest.hex())
