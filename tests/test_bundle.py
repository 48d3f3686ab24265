"""A model directory opens only when it is whole, of one piece and of this version's format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevlm import bundle as bundles
from edgevlm import paths
from edgevlm.bundle import MANIFEST, manifest_text, open_bundle, read_manifest
from edgevlm.errors import BundleError

PARTS = {
    "vision.onnx": b"\x00vision" * 50,
    "language.gguf": b"GGUF language" * 70,
    "tokenizer.json": b"{}",
}


def manifest(parts: dict[str, bytes]) -> dict[str, Any]:
    return {
        "format": 1,
        "name": "tiny",
        "family": "llava",
        "source": {"id": "someone/tiny", "revision": "1"},
        "licence": "apache-2.0",
        "exporter": "0.1.0",
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in parts.items()
        },
        "image": {},
        "prompt": {},
        "generation": {"stop_token_ids": [2], "max_tokens": 256, "repeat_penalty": 1.0},
        "n_embd": 64,
        "n_ctx": 512,
        "quantization": {},
        "card": {},
    }


def write(directory: Path, parts: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, data in parts.items():
        (directory / name).write_bytes(data)
    (directory / MANIFEST).write_text(json.dumps(manifest(parts)))
    return directory


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write(tmp_path / "bundle", PARTS)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts are remembered at once, as if the files had been there for long."""
    monkeypatch.setattr(bundles, "_SETTLED_NS", -(10**12))


def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    read = json.loads((bundle / MANIFEST).read_text())
    edit(read)
    (bundle / MANIFEST).write_text(json.dumps(read))
    return bundle


def test_a_changed_number_in_the_manifest_is_noticed(bundle: Path) -> None:
    whole = manifest_text(json.loads((bundle / MANIFEST).read_text()))
    (bundle / MANIFEST).write_text(whole)
    open_bundle(bundle)
    (bundle / MANIFEST).write_text(whole.replace('"n_ctx": 512', '"n_ctx": 513'))
    with pytest.raises(BundleError, match="is not as it was written"):
        open_bundle(bundle)
    change(bundle, lambda m: m.pop("sha256"))  # as in bundles of the first exporter
    assert open_bundle(bundle).manifest["n_ctx"] == 513


def flip(path: Path, at: int) -> None:
    """One bit of one byte, in place; size and modification time stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_whole_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.name == "tiny"
    assert opened.n_bytes == sum(map(len, PARTS.values()))
    assert opened.file("vision.onnx").read_bytes() == PARTS["vision.onnx"]
    assert opened.sha256("vision.onnx") == hashlib.sha256(PARTS["vision.onnx"]).hexdigest()
    assert opened.has("tokenizer.json")
    assert not opened.has("region.npz")


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no bundle\.json.*models list"):
        open_bundle(tmp_path / "nowhere")


def test_a_directory_without_a_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        open_bundle(bundle)


def test_a_file_in_place_of_the_directory_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="is a file; a model is a directory"):
        open_bundle(bundle / "vision.onnx")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        json.dumps(PARTS["vision.onnx"].hex()).encode(),
        b"[]",
        b"null",
        b"{}",
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=MANIFEST):
        open_bundle(bundle)


def test_a_directory_in_place_of_the_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        open_bundle(bundle)


@pytest.mark.parametrize(("number", "remedy"), [(2, "update edgevlm"), (0, "export the model")])
def test_another_format_is_refused_with_what_to_do(bundle: Path, number: int, remedy: str) -> None:
    change(bundle, lambda read: read.update(format=number))
    with pytest.raises(BundleError, match=f"format {number}; this version reads 1: {remedy}"):
        open_bundle(bundle)


@pytest.mark.parametrize("number", ["1", 1.0, True, None])
def test_a_format_that_is_no_whole_number_is_refused(bundle: Path, number: object) -> None:
    change(bundle, lambda read: read.update(format=number))
    with pytest.raises(BundleError, match="no format number"):
        open_bundle(bundle)


KEYS = [(key,) for key in manifest({}) if key != "exporter"]
KEYS += [("generation", key) for key in ("stop_token_ids", "max_tokens", "repeat_penalty")]
KEYS += [("files", "vision.onnx", "bytes"), ("files", "vision.onnx", "sha256")]


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_a_missing_key_is_refused_by_name(bundle: Path, key: tuple[str, ...]) -> None:
    def remove(read: dict[str, Any]) -> None:
        for part in key[:-1]:
            read = read[part]
        del read[key[-1]]

    change(bundle, remove)
    with pytest.raises(BundleError, match=key[-1]):
        open_bundle(bundle)


WRONG: dict[type, list[object]] = {
    str: [None, 1, True, ["a"], {}],
    int: [None, "1", 0.5, True, [1], {}, -1],
    float: [None, "1", True, [1], {}],
    list: [None, "1", 1, {}],
    dict: [None, "1", 1, []],
}


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_a_value_of_another_type_is_refused(bundle: Path, key: tuple[str, ...]) -> None:
    right: Any = manifest(PARTS)
    for part in key:
        right = right[part]

    for wrong in WRONG[type(right)]:

        def replace(read: dict[str, Any], wrong: object = wrong) -> None:
            for part in key[:-1]:
                read = read[part]
            read[key[-1]] = wrong

        change(bundle, replace)
        with pytest.raises(BundleError):
            open_bundle(bundle)


@pytest.mark.parametrize("name", ["vision.onnx", "language.gguf"])
def test_a_manifest_without_a_part_is_refused(bundle: Path, name: str) -> None:
    change(bundle, lambda read: read["files"].pop(name))
    with pytest.raises(BundleError, match=f"lists no {name}"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\..\\b", "nul\0", "new\nline", ".hidden"],
)
def test_a_file_outside_the_directory_is_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_bytes(b"x")
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    change(bundle, lambda read: read["files"].update({name: entry}))
    with pytest.raises(BundleError, match="names must be plain"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", PARTS)
def test_the_manifest_alone_can_be_read_without_the_files(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert read_manifest(bundle / MANIFEST)["files"][name]["bytes"] == len(PARTS[name])


@pytest.mark.parametrize("name", PARTS)
def test_a_truncated_file_is_refused_with_both_sizes(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(PARTS[name][:-1])
    size = len(PARTS[name])
    with pytest.raises(BundleError, match=f"{name} has {size - 1} bytes.*says {size}"):
        open_bundle(bundle)


def test_a_directory_in_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").mkdir()
    n_bytes = (bundle / "tokenizer.json").stat().st_size
    change(bundle, lambda read: read["files"]["tokenizer.json"].update(bytes=n_bytes))
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_flipped_bit_is_refused(bundle: Path, name: str, place: str) -> None:
    size = len(PARTS[name])
    flip(bundle / name, {"first": 0, "middle": size // 2, "last": size - 1}[place])
    with pytest.raises(BundleError, match=f"{name} has SHA-256.*damaged"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", PARTS)
def test_one_flipped_bit_is_refused_right_after_the_bundle_was_found_good(
    bundle: Path, name: str
) -> None:
    for at in range(2):
        open_bundle(bundle)
        flip(bundle / name, at)  # within one tick of the file system's clock
        with pytest.raises(BundleError, match=name):
            open_bundle(bundle)
        flip(bundle / name, at)


@pytest.mark.parametrize("name", PARTS)
def test_one_flipped_bit_is_refused_although_a_good_verdict_is_remembered(
    bundle: Path, settled: None, name: str
) -> None:
    open_bundle(bundle)
    time.sleep(0.02)  # at least one tick
    flip(bundle / name, 1)
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle)


def test_a_replaced_file_is_refused_although_a_good_verdict_is_remembered(
    bundle: Path, settled: None
) -> None:
    open_bundle(bundle)
    before = (bundle / "vision.onnx").stat()
    other = bundle / "other"
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(bundle / "vision.onnx")
    with pytest.raises(BundleError, match=r"vision\.onnx"):
        open_bundle(bundle)


def test_an_unchanged_file_is_hashed_once(
    bundle: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_bundle(bundle)
    monkeypatch.setattr(bundles, "file_sha256", lambda path: pytest.fail(f"{path} was hashed"))
    open_bundle(bundle)


def test_a_fresh_file_is_hashed_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_bundle(bundle)
    hashed = []
    real = bundles.file_sha256
    monkeypatch.setattr(bundles, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    open_bundle(bundle)
    assert hashed == list(PARTS)


def test_a_verdict_does_not_pass_for_another_checksum(bundle: Path, settled: None) -> None:
    open_bundle(bundle)
    change(bundle, lambda read: read["files"]["vision.onnx"].update(sha256="0" * 64))
    with pytest.raises(BundleError, match=r"vision\.onnx has SHA-256"):
        open_bundle(bundle)


def test_the_part_of_another_model_is_refused(bundle: Path, settled: None, tmp_path: Path) -> None:
    other = write(tmp_path / "other", {**PARTS, "vision.onnx": PARTS["vision.onnx"][::-1]})
    open_bundle(bundle)
    open_bundle(other)  # both are known to be good
    shutil.copy2(other / "vision.onnx", bundle / "vision.onnx")
    with pytest.raises(BundleError, match="belongs to another model"):
        open_bundle(bundle)


def test_a_cache_that_cannot_be_written_only_costs_time(
    bundle: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle / "vision.onnx"))
    assert open_bundle(bundle).name == open_bundle(bundle).name


def test_a_damaged_cache_only_costs_time(bundle: Path, settled: None) -> None:
    open_bundle(bundle)
    for verdict in paths.cache("verified").iterdir():
        verdict.write_bytes(b"\xff\x00")
    open_bundle(bundle)
    flip(bundle / "vision.onnx", 3)
    with pytest.raises(BundleError):
        open_bundle(bundle)


def test_a_bundle_may_be_a_link(bundle: Path) -> None:
    (bundle.parent / "link").symlink_to(bundle)
    assert open_bundle(bundle.parent / "link").name == "tiny"
