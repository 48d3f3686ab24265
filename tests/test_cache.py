"""Image embeddings are made once for a photo, and nothing that happens to the cache is an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from PIL import Image
from test_paths import full_disk

import edgevlm
from edgevlm import cache, graph_cache
from edgevlm.cli import run

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cached")
    tiny.llava(directory / "checkpoint", seed=1)
    return export(directory / "checkpoint", directory / "bundle", language="f32")


@pytest.fixture
def photo(tmp_path: Path, picture: Image.Image) -> Path:
    picture.save(tmp_path / "photo.jpg", quality=95)
    return tmp_path / "photo.jpg"


def ask(bundle: Path, source: object, **settings: object) -> edgevlm.Answer:
    """What a new process would answer: nothing in memory, the disk as it is."""
    with edgevlm.load(bundle, **settings) as vlm:
        return vlm.ask(source, QUESTION, max_tokens=12)  # type: ignore[arg-type]


def stored() -> list[Path]:
    return sorted(cache.directory().glob("*"))


@pytest.fixture
def entry() -> cache.Entry:
    return cache.entry(np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32))


@pytest.fixture
def disk(tmp_path: Path) -> cache.Disk:
    return cache.Disk(tmp_path / "embeddings", 1 << 20)


def test_the_same_photo_is_neither_decoded_nor_encoded_again(bundle: Path, photo: Path) -> None:
    alone = ask(bundle, photo, cache=False)
    first, second = ask(bundle, photo), ask(bundle, photo)
    assert (alone.cache, first.cache, second.cache) == ("miss", "miss", "hit")
    timings = second.timings
    assert timings.decode_ms == timings.preprocess_ms == timings.encode_ms == 0
    assert alone.text == first.text == second.text
    assert second.input_px == ((90, 130),) and second.model_px == ((56, 56),)


def test_a_hit_gives_the_same_embeddings_bit_for_bit(bundle: Path, photo: Path) -> None:
    encoded = []
    for settings in ({"cache": False}, {}, {}):
        with edgevlm.load(bundle, **settings) as vlm:
            encoded += [vlm.encode(photo), vlm.encode(photo)]
    assert len({(image.embeddings.tobytes(), image.key) for image in encoded}) == 1


def test_content_counts_and_not_the_name(bundle: Path, photo: Path, tmp_path: Path) -> None:
    ask(bundle, photo)
    copy = tmp_path / "copy.png"
    shutil.copy(photo, copy)
    assert ask(bundle, copy).cache == "hit"
    assert ask(bundle, photo.read_bytes()).cache == "hit"
    assert ask(bundle, BytesIO(photo.read_bytes())).cache == "hit"
    Image.new("RGB", (130, 90), "red").save(photo)
    assert ask(bundle, photo).cache == "miss"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_are_known_again(bundle: Path, picture: Image.Image, mode: str) -> None:
    image = picture.convert(mode)
    assert [ask(bundle, image).cache, ask(bundle, image).cache] == ["miss", "hit"]
    image.putpixel((3, 3), 1 if mode in "LP" else (1,) * len(mode))
    assert ask(bundle, image).cache == "miss"


def test_arrays_of_the_same_bytes_and_another_shape_differ(bundle: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    assert ask(bundle, pixels).cache == "miss"
    assert ask(bundle, pixels.copy()).cache == "hit"
    assert ask(bundle, pixels.reshape(80, 60, 3)).cache == "miss"


def test_what_changes_the_embeddings_changes_the_key(
    bundle: Path, photo: Path, tmp_path: Path
) -> None:
    ask(bundle, photo)
    assert ask(bundle, photo, exact_decode=True).cache == "miss"
    tiny.llava(tmp_path / "checkpoint", seed=2)
    other = export(tmp_path / "checkpoint", tmp_path / "other", language="f32")
    assert ask(other, photo).cache == "miss"


def test_several_pictures_are_a_hit_when_none_was_encoded(
    bundle: Path, photo: Path, picture: Image.Image
) -> None:
    ask(bundle, photo)
    assert ask(bundle, [photo, photo]).cache == "hit"
    assert ask(bundle, [photo, picture]).cache == "miss"
    assert ask(bundle, [photo, picture]).cache == "hit"


def test_without_the_cache_nothing_is_written(bundle: Path, photo: Path) -> None:
    ask(bundle, photo, cache=False)
    assert stored() == []


def test_embeddings_cannot_be_changed_under_the_cache(bundle: Path, photo: Path) -> None:
    with edgevlm.load(bundle) as vlm, pytest.raises(ValueError, match="read-only"):
        vlm.encode(photo).embeddings[0] = 0


def test_a_damaged_photo_is_an_error_however_well_its_beginning_is_known(
    bundle: Path, photo: Path
) -> None:
    ask(bundle, photo)
    photo.write_bytes(photo.read_bytes()[:-400])
    for _ in range(2):
        with pytest.raises(edgevlm.ImageError, match="damaged"):
            ask(bundle, photo)


def test_what_is_decoded_is_what_was_hashed(
    bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody writes the file between hash and decode."""
    expected = ask(bundle, photo, cache=False).text
    key = cache.key

    def overwriting(*parts: str) -> str:
        Image.new("RGB", (130, 90), "red").save(photo, quality=95)
        return key(*parts)

    monkeypatch.setattr(cache, "key", overwriting)
    assert ask(bundle, photo).text == expected


def test_a_file_too_long_to_be_held_is_answered_without_the_cache(
    bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.image._HELD_BYTES", 100)
    assert ask(bundle, photo).text == ask(bundle, photo).text
    assert stored() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        lambda data: data[:9] + b"\xff" + data[10:],
    ],
)
def test_a_damaged_entry_is_a_miss_and_goes(disk: cache.Disk, entry: cache.Entry, damage) -> None:  # type: ignore[no-untyped-def]
    disk.write("key", entry)
    (path,) = disk.directory.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert disk.read("key") is None
    assert not path.exists()


def test_the_folder_is_private(disk: cache.Disk, entry: cache.Entry) -> None:
    disk.write("key", entry)
    assert disk.directory.stat().st_mode & 0o777 == 0o700


def test_the_bound_holds_and_the_least_recently_used_go_first(
    tmp_path: Path, entry: cache.Entry
) -> None:
    n_bytes = entry.embeddings.nbytes + 48
    disk = cache.Disk(tmp_path, 16 * n_bytes)
    for n in range(16):
        disk.write(f"{n:02}", entry)
        os.utime(tmp_path / f"{n:02}", (n, n))
        assert disk.usage()[1] <= 16 * n_bytes
    assert disk.read("00") is not None  # used again, and so the last to go
    for n in range(16, 24):
        disk.write(f"{n:02}", entry)
        assert disk.usage()[1] <= 16 * n_bytes
    left = {path.name for path in tmp_path.iterdir()}
    assert "00" in left and "23" in left and "01" not in left
    assert len(left) >= 13  # an eighth is made free at a time


def test_what_does_not_fit_is_not_kept(tmp_path: Path, entry: cache.Entry) -> None:
    disk = cache.Disk(tmp_path, 100)
    disk.write("key", entry)
    assert disk.usage() == (0, 0)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, entry: cache.Entry) -> None:
    monkeypatch.setattr(cache, "EMBEDDINGS_BYTES", 3 * entry.embeddings.nbytes)
    kept = cache.Cache(0)  # nothing on disk
    for key in "abc":
        kept.put(key, entry)
    assert kept.get("a") is entry
    kept.put("d", entry)
    assert [kept.get(key) is not None for key in "abcd"] == [True, False, True, True]


def test_a_full_disk_costs_the_entry_and_nothing_else(disk: cache.Disk, entry: cache.Entry) -> None:
    with full_disk():
        disk.write("key", entry)
    assert disk.read("key") is None
    assert disk.usage() == (0, 0)


def test_a_disk_that_cannot_be_written_is_no_error(
    bundle: Path, photo: Path, entry: cache.Entry
) -> None:
    cache.directory().parent.mkdir(parents=True, exist_ok=True)
    cache.directory().write_text("a file where the folder should be")
    try:
        assert [ask(bundle, photo).cache, ask(bundle, photo).cache] == ["miss", "miss"]
    finally:
        cache.directory().unlink()


WRITER = """
import sys, numpy as np
from pathlib import Path
from edgevlm import cache
random = np.random.default_rng(int(sys.argv[2]))
disk = cache.Disk(Path(sys.argv[1]), 40 * 300_000)
print("ready", flush=True)
for n in range(int(sys.argv[3])):
    n = int(random.integers(60))
    found = disk.read(str(n))
    made = np.full((64, 1024), n, np.float32)
    assert found is None or (found.embeddings == made).all()
    if found is None:
        disk.write(str(n), cache.entry(made))
"""


def writer(directory: Path, seed: int, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(directory), str(seed), str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    children = [writer(tmp_path, seed, 200) for seed in range(2)]
    for child in children:
        assert child.communicate(timeout=120)[1] == ""
        assert child.returncode == 0
    entries, n_bytes = cache.Disk(tmp_path).usage()
    assert entries > 20
    assert n_bytes <= 40 * 300_000 * 9 // 8  # each looks at the folder once an eighth is written


def test_kill_9_leaves_whole_entries(tmp_path: Path) -> None:
    for seed in range(4):
        child = writer(tmp_path, seed, 1_000_000)
        assert child.stdout is not None and child.stderr is not None
        with child.stdout, child.stderr:
            child.stdout.readline()
            time.sleep(0.02 * (seed + 1))
            child.kill()
            child.wait()
    disk = cache.Disk(tmp_path, 40 * 300_000)
    for path in tmp_path.glob("[!.]*"):
        found = disk.read(path.name)
        assert found is not None and (found.embeddings == float(path.name)).all()


def test_what_a_killed_process_left_half_written_goes_after_an_hour(
    tmp_path: Path, entry: cache.Entry
) -> None:
    for name, age_s in ((".old.1234", 4000), (".new.1234", 10)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    cache.Disk(tmp_path, 1 << 20).write("key", entry)
    assert {path.name for path in tmp_path.iterdir()} == {".new.1234", "key"}


def test_threads_share_a_cache(entry: cache.Entry) -> None:
    kept = cache.Cache(1 << 20)
    found: list[bool] = []

    def work() -> None:
        for n in range(50):
            kept.put(str(n % 5), entry)
            found.append(kept.get(str(n % 5)) is not None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found) and len(found) == 200


@pytest.fixture
def by_command_line(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> Iterator[None]:
    monkeypatch.setenv("EDGEVLM_MODEL", str(bundle))
    monkeypatch.setenv("EDGEVLM_MAX_TOKENS", "3")
    yield


def test_the_command_line_shows_and_clears_it(
    capsys: pytest.CaptureFixture[str], photo: Path, by_command_line: None
) -> None:
    assert run(["cache", "clear"]) == 0  # graphs of other tests
    assert run(["cache", "info"]) == 0
    assert capsys.readouterr().out.startswith("0 photos, 0.0 MB in ")
    assert run(["describe", str(photo)]) == 0
    assert len(stored()) == 1
    capsys.readouterr()
    assert run(["cache", "info"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in shown] == ["1 photo", "1 graph"]
    assert run(["cache", "info", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)
    assert (kept["entries"], kept["directory"]) == (1, str(cache.directory()))
    copies = [*graph_cache.root().rglob("*.onnx")]
    assert (kept["graphs"]["entries"], len(copies)) == (1, 1)
    assert kept["graphs"]["bytes"] == copies[0].stat().st_size
    assert run(["cache", "clear"]) == 0
    assert "1 photo and 1 graph" in capsys.readouterr().err
    assert stored() == [*graph_cache.root().rglob("*")] == []
    assert graph_cache.usage() == (0, 0)
    assert run(["cache", "clear"]) == 0
    assert run(["describe", str(photo), "--no-cache"]) == 0
    assert stored() == []


def test_the_environment_switches_it_off(
    photo: Path, by_command_line: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_CACHE", "0")
    assert run(["describe", str(photo)]) == 0
    assert stored() == []
