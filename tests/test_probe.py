"""The probe: a llama.cpp that dies is found out in a child, and lived with."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgevlm_export import probe as probe_writer

from edgevlm import probe
from edgevlm.errors import BackendError

# A llama_cpp package whose native code dies as the AMX build does; which settings it survives is
# filled in. It shadows the real one in the probe's child process.
DYING = """
import os, signal
from types import SimpleNamespace
LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
class lib: pass
def llama_log_callback(f): return f
def ggml_abort_callback(p): return p
def llama_model_default_params(): return SimpleNamespace()
def llama_model_load_from_file(path, params):
    if {dies}:
        os.kill(os.getpid(), signal.SIGSEGV)
    os._exit(0)
def __getattr__(name):
    return lambda *a: 1
"""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str) -> None:
    package = tmp_path / "shadow" / "llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "llama_cpp.py").write_text(DYING.format(dies=dies))
    monkeypatch.syspath_prepend(str(package.parent))


def test_a_healthy_library_may_repack(empty_cache: Path) -> None:
    assert probe.verdict() == probe.Verdict(extra_buffers=True, finding="")


def test_the_verdict_is_remembered(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe.verdict()
    monkeypatch.setattr(probe, "_try", lambda **_: pytest.fail("probed again"))
    assert probe.verdict() == first


def test_another_library_is_probed_again(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_try", lambda **_: "")
    monkeypatch.setattr(probe, "_fingerprint", lambda: "one")
    probe.verdict()
    probed: list[bool] = []
    monkeypatch.setattr(probe, "_fingerprint", lambda: "two")
    monkeypatch.setattr(probe, "_try", lambda **_: probed.append(True) or "")
    probe.verdict()
    assert probed == [True]


def test_a_crash_is_a_finding_and_the_safe_settings_are_used(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow(tmp_path, monkeypatch, dies="params.use_extra_bufts")
    verdict = probe.verdict()
    assert not verdict.extra_buffers
    assert "SIGSEGV" in verdict.finding


def test_a_library_that_never_runs_is_an_error_with_the_way_out(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow(tmp_path, monkeypatch, dies="True")
    with pytest.raises(BackendError, match=r"SIGSEGV.*pip install"):
        probe.verdict()


def test_a_damaged_memory_of_the_verdict_is_replaced(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_fingerprint", lambda: "one")
    (empty_cache / "edgevlm/probe").mkdir(parents=True)
    (empty_cache / "edgevlm/probe/one.json").write_text("{half")
    assert probe.verdict().extra_buffers
    assert "true" in (empty_cache / "edgevlm/probe/one.json").read_text()


def test_a_source_tree_in_the_working_directory_is_not_what_is_probed(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edgevlm").mkdir()
    (tmp_path / "edgevlm" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    monkeypatch.chdir(tmp_path)
    assert probe._try(extra_buffers=True) == ""


def test_the_tiny_model_is_what_its_writer_writes(tmp_path: Path) -> None:
    probe_writer.write(tmp_path / "probe.gguf")
    assert (tmp_path / "probe.gguf").read_bytes() == probe._MODEL.read_bytes()


def test_the_probe_itself_runs_with_both_settings() -> None:
    assert probe._try(extra_buffers=True) == ""
    assert probe._try(extra_buffers=False) == ""
