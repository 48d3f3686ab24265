"""The kept copy of an optimized graph: the same numbers, and never a damaged one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm import device, graph_cache, hub, sessions
from edgevlm.cancel import Cancel
from edgevlm.sessions import Session

Embed = Callable[..., np.ndarray]
NANO = hub.packaged("nano")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the copy of nano's graph is to be; nothing is there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return graph_cache.directory(NANO.sha256("vision.onnx"), sessions.maker())


@pytest.fixture
def embed(picture: Image.Image) -> Iterator[Embed]:
    cancel = Cancel()
    square = picture.convert("RGB").resize((260, 260))
    patches = np.asarray(square).reshape(1, 1, 260 * 260 * 3)

    def run(sha256: str = NANO.sha256("vision.onnx")) -> np.ndarray:
        session = Session(NANO.file("vision.onnx"), 1, sha256=sha256)
        return session.run({"patches": patches}, cancel)

    yield run
    cancel.close()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_copy_gives_the_same_numbers_to_the_last_bit(kept: Path, embed: Embed) -> None:
    plain = embed(sha256="")
    assert not kept.exists()
    making, using = embed(), embed()
    assert graph_cache.find(kept) is not None
    assert np.array_equal(making, plain)
    assert np.array_equal(using, plain)


def test_the_copy_is_what_is_used(
    kept: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed()
    monkeypatch.setattr(graph_cache, "keep", lambda *_: pytest.fail("made again"))
    embed()


@pytest.mark.parametrize("damage", [b"", b"not a graph", None])
def test_a_damaged_copy_is_made_again(kept: Path, embed: Embed, damage: bytes | None) -> None:
    plain = embed()
    good = files(kept)
    graph = kept / "vision.onnx"
    half = bytearray(good["vision.onnx"])
    half[len(half) // 2] ^= 1  # the same size, one bit of a weight
    graph.write_bytes(bytes(half) if damage is None else damage)
    assert graph_cache.find(kept) is None
    assert np.array_equal(embed(), plain)
    assert graph_cache.find(kept) is not None


def test_a_lost_or_unreadable_entry_is_no_copy(kept: Path, embed: Embed) -> None:
    plain = embed()
    for entry in ("", "{}", "[]", '{"bytes": 1, "sha256": ""}'):
        (kept / "entry.json").write_text(entry)
        assert graph_cache.find(kept) is None
    (kept / "entry.json").unlink()
    assert np.array_equal(embed(), plain)


def test_another_cpu_or_version_makes_its_own_and_the_old_one_goes(
    kept: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed()
    monkeypatch.setattr(device, "cpu_features", lambda: "fewer")
    embed()
    assert not kept.exists()
    assert len([*kept.parent.iterdir()]) == 1


def test_a_copy_that_vanishes_while_it_is_opened_fails_nothing(
    kept: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embed()
    monkeypatch.setattr(graph_cache, "find", lambda _: kept / "gone.onnx")
    assert np.array_equal(embed(), plain)


def test_a_cache_that_cannot_be_written_fails_nothing(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert embed().shape[-1] == NANO.manifest["n_embd"]


def test_large_graphs_are_not_copied(
    kept: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_cache, "MOST_BYTES", 1000)
    embed()
    assert not kept.exists()
