"""The head of a GGUF file, against the gguf package that writes it."""

from __future__ import annotations

from pathlib import Path

import gguf as writer
import pytest

from edgevlm import gguf
from edgevlm.errors import BundleError

PROBE = Path(gguf.__file__).parent / "data" / "probe.gguf"


def written(path: Path, *, kv_heads: int | list[int] = 2, key_length: int | None = None) -> Path:
    head = writer.GGUFWriter(path, "llama")
    head.add_name("größe")
    head.add_block_count(5)
    head.add_embedding_length(64)
    head.add_feed_forward_length(96)
    head.add_head_count(4)
    head.add_head_count_kv(kv_heads)
    if key_length is not None:
        head.add_key_length(key_length)
    head.add_token_list([b"a", b"bc", b"def"])
    head.add_uint32("llama.after_the_vocabulary", 1)
    head.write_header_to_file()
    head.write_kv_data_to_file()
    head.close()
    return path


def test_the_shape_is_what_was_written(tmp_path: Path) -> None:
    assert gguf.read_shape(written(tmp_path / "a.gguf")) == gguf.Shape(
        n_layers=5, n_heads=4, kv_width=2 * (16 + 16), n_embd=64, n_ff=96, n_vocab=3
    )


def test_heads_may_have_a_width_of_their_own_and_differ_by_layer(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", kv_heads=[1, 4, 2, 1, 1], key_length=40)
    assert gguf.read_shape(path).kv_width == 4 * (40 + 16)


def test_it_agrees_with_the_reader_of_that_package() -> None:
    fields = writer.GGUFReader(PROBE).fields
    kind = fields["general.architecture"].contents()
    shape = gguf.read_shape(PROBE)
    assert shape.n_layers == fields[f"{kind}.block_count"].contents()
    assert shape.n_embd == fields[f"{kind}.embedding_length"].contents()
    assert shape.n_ff == fields[f"{kind}.feed_forward_length"].contents()
    assert shape.n_vocab == 0  # it has none


@pytest.mark.parametrize("n_bytes", [0, 3, 24, 60, 150])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, n_bytes: int) -> None:
    whole = written(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[:n_bytes])
    with pytest.raises(BundleError, match=r"b\.gguf (cannot be read|does not give)"):
        gguf.read_shape(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GGML" + b"\0" * 60, "does not begin"),
        (b"GGUF\x01" + b"\0" * 60, "does not begin"),
        (b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\1" + b"\0" * 7 + b"\xff" * 40, "a text of"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "b.gguf").write_bytes(data)
    with pytest.raises(BundleError, match=why):
        gguf.read_shape(tmp_path / "b.gguf")
    with pytest.raises(BundleError, match="cannot be read"):
        gguf.read_shape(tmp_path / "missing.gguf")
