"""Weights in a file of their own: the same answers, another model if they differ, and no memory."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from edgevlm_export.bundle import seal
from PIL import Image

import edgevlm
from edgevlm import graph_cache, kernels, paths
from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleError

linux_tells = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="only Linux says what is mapped"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny.llava(tmp_path / "checkpoint", seed=3)
    return tmp_path / "checkpoint"


@pytest.fixture
def apart(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of a tower that is larger than what is kept inside."""
    with monkeypatch.context() as patch:
        patch.setattr(graph_cache, "MOST_BYTES", 1000)
        return export(checkpoint, tmp_path / "apart", vision="int8")


def resident_kb(path: Path) -> int:
    """Of a file's mappings in this process."""
    table = Path("/proc/self/smaps").read_text()
    parts = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", table)
    here = [part for part in parts if part.split("\n")[0].endswith(str(path))]
    return sum(int(re.search(r"^Rss: +(\d+)", part, re.M)[1]) for part in here)


def test_the_picture_is_seen_as_with_weights_inside(
    tmp_path: Path, checkpoint: Path, apart: Path, picture: Image.Image
) -> None:
    inside = export(checkpoint, tmp_path / "inside", vision="int8")
    assert not (inside / "vision.data").exists()
    assert (apart / "vision.data").stat().st_size > 10 * (apart / "vision.onnx").stat().st_size // 9
    found = []
    for bundle in (inside, apart):
        with edgevlm.load(bundle, threads=1) as vlm:
            vlm.encode(picture.rotate(180))  # what was mapped is dropped, and used again
            found.append(vlm.encode(picture).embeddings)
    assert np.array_equal(*found)


@linux_tells
def test_the_first_picture_leaves_room_for_the_language_model(
    apart: Path, picture: Image.Image
) -> None:
    held = []
    with edgevlm.load(apart, threads=1, cache=False) as vlm:
        for _ in range(2):
            vlm.encode(picture)
            held.append(resident_kb(apart / "vision.data"))
    assert held[0] == 0 < held[1]


def test_no_optimized_copy_is_kept(apart: Path, picture: Image.Image) -> None:
    before = graph_cache.usage()
    with edgevlm.load(apart, threads=1) as vlm:
        vlm.encode(picture)
    assert graph_cache.usage() == before and paths.cache("graphs") == graph_cache.root()


def test_other_weights_are_another_model(apart: Path, picture: Image.Image) -> None:
    with edgevlm.load(apart, threads=1) as vlm:
        seen = vlm.encode(picture)
    manifest = dict(open_bundle(apart).manifest)
    data = apart / "vision.data"
    (apart / "bundle.json").unlink()
    data.write_bytes(data.read_bytes()[::-1])
    seal(apart, {key: value for key, value in manifest.items() if key not in ("files", "sha256")})
    with edgevlm.load(apart, threads=1) as vlm:
        other = vlm.encode(picture)
    assert other.model_sha256 != seen.model_sha256 and other.key != seen.key


def test_a_damaged_file_of_weights_is_refused(apart: Path) -> None:
    with (apart / "vision.data").open("r+b") as stream:
        stream.write(b"damaged")
    with pytest.raises(BundleError, match=r"vision\.data"):
        edgevlm.load(apart, threads=1)


@linux_tells
def test_what_is_dropped_leaves_the_process_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mapped file"
    path.write_bytes(bytes(range(256)) * 4096)
    values = np.memmap(path, np.uint8, "r")
    expected = int(values.sum(dtype=np.int64))
    assert resident_kb(path) == 1024
    kernels.drop_mapped(path)
    assert resident_kb(path) == 0
    assert int(values.sum(dtype=np.int64)) == expected
    kernels.drop_mapped(tmp_path / "absent")
