"""A Hugging Face checkpoint directory → its JSON files and its tensors, one at a time.

Reads safetensors directly: the format is an 8-byte header length, a JSON header and raw data, and
numpy has no bfloat16, so the library's numpy reader cannot serve the usual bf16 checkpoints.
Nothing is read before `get`: peak memory is the largest tensor, not the model.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleError

# safetensors dtype -> (little-endian storage, bytes per value)
_FLOATS = {"F64": ("<f8", 8), "F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}
Config: TypeAlias = dict[str, Any]
Kinds: TypeAlias = Mapping[str, type | tuple[type, ...]]
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start_bytes: int
    stop_bytes: int


class Adapter(Protocol):
    """What changes tensors on their way out of a checkpoint; see lora.py."""

    def rename(self, rule: Callable[[str], str]) -> None: ...

    def merged(self, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]: ...


class Checkpoint:
    """One checkpoint directory; `rename` maps stored tensor names to the ones a family asks for."""

    def __init__(self, directory: Path, tokenizer: Path | None = None) -> None:
        """`tokenizer` is a tokenizer.json that takes the place of the checkpoint's own."""
        if not directory.is_dir():
            raise BundleError(f"{directory} is not a directory: give a checkpoint's directory")
        self.directory = directory
        self.tokenizer = tokenizer or directory / "tokenizer.json"
        config = self.json("config.json")
        if config is None:
            raise BundleError(f"{directory} has no config.json: it is not a checkpoint")
        self.config = config
        self._entries = self._find()
        self._adapter: Adapter | None = None
        self._renamed: list[Adapter] = []

    def _find(self) -> dict[str, Entry]:
        return _entries(self.directory)

    def adapt(self, adapter: Adapter) -> None:
        """From now on `get` gives the tensors with `adapter` merged into them."""
        self._adapter = adapter
        self.accompany(adapter)

    def accompany(self, adapter: Adapter) -> None:
        """`adapter`'s tensors are renamed with the checkpoint's from now on."""
        self._renamed.append(adapter)

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in the JSON file `name`, or None when there is no such file."""
        path = self.tokenizer if name == "tokenizer.json" else self.directory / name
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BundleError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise BundleError(f"{path} holds a {type(value).__name__}, not an object")
        return value

    def rename(self, rule: Callable[[str], str]) -> None:
        """Apply `rule` to every tensor name; two names that become one are an error."""
        renamed: dict[str, Entry] = {}
        for name, entry in self._entries.items():
            if (new := rule(name)) in renamed:
                raise BundleError(f"{self.directory} holds {new} twice, once as {name}")
            renamed[new] = entry
        self._entries = renamed
        for adapter in self._renamed:
            adapter.rename(rule)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def axes(self, name: str, count: int) -> tuple[int, ...]:
        """The shape of `name`, which must have so many axes."""
        if len(found := self.shape(name)) != count:
            raise BundleError(
                f"{name} is {list(found)} in {self.directory}; it must have {count} axes"
            )
        return found

    def expect(self, name: str, *shape: int) -> str:
        """`name`, once its shape is known to be `shape`; BundleError names both otherwise."""
        if (found := self.shape(name)) != shape:
            raise BundleError(
                f"{name} is {list(found)} in {self.directory}; config.json and the other tensors "
                f"make it {list(shape)}"
            )
        return name

    def get(self, name: str) -> npt.NDArray[np.float32]:
        """Tensor `name` as float32; BundleError for NaN, Inf and quantized storage."""
        values = read(name, self._entry(name))
        return values if self._adapter is None else self._adapter.merged(name, values)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise BundleError(f"{name} is missing in {self.directory}")
        return self._entries[name]


def read(name: str, entry: Entry) -> npt.NDArray[np.float32]:
    """The tensor as float32; BundleError for NaN, Inf and quantized storage."""
    if entry.dtype not in _FLOATS:
        raise BundleError(
            f"{name} is stored as {entry.dtype}; only {', '.join(_FLOATS)} can be exported: "
            "take the unquantized checkpoint"
        )
    storage, _ = _FLOATS[entry.dtype]
    count = math.prod(entry.shape)
    raw = np.fromfile(entry.file, dtype=storage, count=count, offset=entry.start_bytes)
    if raw.size != count:
        raise BundleError(f"{entry.file} ends inside {name}: fetch it again")
    if entry.dtype == "BF16":  # the upper half of a float32
        raw = np.left_shift(raw, np.uint32(16), dtype=np.uint32).view(np.float32)
    values = raw.astype(np.float32, copy=False).reshape(entry.shape)
    # NaN and Inf both show in the extremes, without a second array
    if count and not np.isfinite([values.min(), values.max()]).all():
        raise BundleError(f"{name} in {entry.file.name} holds NaN or Inf: fetch it again")
    return values


NUMBER = (int, float)


def section(value: object, kinds: Kinds, where: Path) -> Config:
    """An object of a config without its nulls, which mean "the default" everywhere.

    BundleError when `value` is no object or a key of `kinds` has another type.
    """
    if not isinstance(value, dict):
        raise BundleError(f"{where} holds {value!r:.60} where an object is needed")
    present = {key: item for key, item in value.items() if item is not None}
    for key, kind in kinds.items():
        if key in present and not isinstance(present[key], kind):
            raise BundleError(f"{where} says {key} = {present[key]!r:.60}, which has another type")
    return present


def whole_number(config: Mapping[str, Any], key: str, where: Path) -> int:
    """A size in a config; BundleError when it is absent or no positive integer."""
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise BundleError(f"{where} says {key} = {value!r}; a positive integer is needed")
    return value


def _entries(directory: Path) -> dict[str, Entry]:
    """Every tensor of the directory's shards, checked against the index where there is one."""
    single = directory / "model.safetensors"
    index = directory / _INDEX
    if not index.is_file():
        if not single.is_file():
            raise BundleError(
                f"{directory} has neither model.safetensors nor {_INDEX}: pickled and GGUF "
                "weights are not read here"
            )
        return header(single)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{index} is not a safetensors index: fetch it again") from error
    entries: dict[str, Entry] = {}
    for shard in shards:
        if not (directory / shard).is_file():
            raise BundleError(f"{shard} is named in {index} and not there: fetch it")
        found = header(directory / shard)
        if twice := entries.keys() & found.keys():
            raise BundleError(f"{min(twice)} is in {shard} and in another shard: fetch both again")
        entries |= found
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise BundleError(f"{name} is missing in {directory / shard}, where {_INDEX} puts it")
    return entries


def header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file (format: safetensors README, "Format")."""
    size_bytes = file.stat().st_size
    broken = f"{file} is not a whole safetensors file: fetch it again"
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8 or (header_bytes := struct.unpack("<Q", prefix)[0]) > size_bytes - 8:
            raise BundleError(broken)
        try:
            listed = json.loads(stream.read(header_bytes))
            listed.pop("__metadata__", None)
            entries = {n: _entry(file, item, 8 + header_bytes) for n, item in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BundleError(broken) from error
    for entry in entries.values():
        if entry.stop_bytes > size_bytes:
            raise BundleError(broken)
        _, value_bytes = _FLOATS.get(entry.dtype, ("", 0))
        if value_bytes and entry.stop_bytes - entry.start_bytes != value_bytes * math.prod(
            entry.shape
        ):
            raise BundleError(broken)
    return entries


def _entry(file: Path, item: Any, data_bytes: int) -> Entry:
    """One line of the header; `data_bytes` is where the data begins. ValueError when it is odd."""
    dtype, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
    numbers = (*shape, start, stop)
    if not (isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in numbers)):
        raise ValueError(f"{dtype!r}, {numbers!r:.60}")
    if start > stop:
        raise ValueError(f"{start} is behind {stop}")
    return Entry(file, dtype, shape, data_bytes + start, data_bytes + stop)
