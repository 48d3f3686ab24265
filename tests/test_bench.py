"""`edgevlm bench`: what is measured, on what machine, and what is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from edgevlm_export import export
from PIL import Image

import edgevlm
from edgevlm.bench import limits, machine, mtmd, photo, plot, report, run
from edgevlm.cli import run as command
from edgevlm.errors import BackendError

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    tiny.llava(directory / "checkpoint", seed=1)
    return export(directory / "checkpoint", directory / "tiny", language="f32")


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes seconds and gigabytes; its own test does it small."""
    monkeypatch.setattr(
        machine, "measure", lambda threads: {"read_gb_s": 20.0, "gemm_gflop_s": 100.0}
    )


@pytest.fixture
def snapshot(tmp_path: Path, picture: Image.Image) -> str:
    picture.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_json_has_the_stages_the_machine_and_the_settings(
    bundle: Path, snapshot: str, tmp_path: Path, capsys: Captured
) -> None:
    out, drawn = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["bench", str(bundle), "--photo", snapshot, "-n", "3", "--rounds", "2"]
    assert command([*arguments, "--json", str(out), "--plot", str(drawn)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("edgevlm: round") == 2
    result = json.loads(out.read_text())
    assert set(result["stages"]) == set(run.STAGES)
    assert set(run.COMPARED) == {"encode", "prefill", "first_token", "decode", "total"}
    assert all(ms > 0 for ms in result["stages"].values())
    stages = result["stages"]
    parts = sum(stages[s] for s in ("image_decode", "preprocess", "encode", "prefill"))
    assert parts <= stages["first_token"] * 1.5  # medians of stages are of different rounds
    assert result["peer"] is None and result["ratios"] is None
    assert result["settings"]["photo"]["image_tokens"] == 16
    assert result["machine"]["cores"] >= 1
    assert result["memory"]["peak_rss_bytes"] > 10_000_000
    assert result["model"]["size_bytes"] > 0
    assert "onnxruntime" in result["versions"]
    for stage in ("encode", "prefill", "decode", "first_token"):
        assert result["limits"][stage]["percent"] > 0
        assert stage.replace("decode", "a token").replace("_", " ") in captured.out
    with Image.open(drawn) as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_json_goes_to_stdout_alone(bundle: Path, snapshot: str, capsys: Captured) -> None:
    arguments = ["bench", "-m", str(bundle), "--photo", snapshot, "-n", "2", "--rounds", "1"]
    assert command([*arguments, "--json", "-", "-q"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["format"] == run.FORMAT
    assert captured.err == ""


def test_every_round_is_another_photo(bundle: Path, picture: Image.Image, tmp_path: Path) -> None:
    pixels = np.asarray(picture)
    with edgevlm.load(bundle) as vlm:
        keys = set()
        for number in range(3):
            photo.save_another(pixels, tmp_path / f"{number}.jpg")
            keys.add(vlm.encode(tmp_path / f"{number}.jpg").key)
    assert len(keys) == 3


def test_the_drawn_photo_is_the_largest_in_one_view() -> None:
    class Views:
        def __init__(self, n_tiles: int) -> None:
            self.n_tiles = n_tiles

    def layout(height: int, width: int) -> Any:
        return Views(1 if width < 700 else 4)

    assert photo.pixels(None, layout).shape == (480, 640, 3)
    assert photo.pixels(None, lambda h, w: Views(5)).shape[:2] == photo.SIZES_PX[0]  # type: ignore[arg-type, return-value]


def test_a_share_of_the_limit_is_what_the_machine_needs_at_least() -> None:
    stages = {"encode": 500.0, "decode": 100.0, "prefill": 2000.0, "preprocess": 10.0}
    stages |= {"load": 1000.0, "first_token": 2600.0}
    work: dict[str, dict[str, float]] = {
        "load": {limits.BYTES: 2e9},
        "preprocess": {limits.BYTES: 2e7},
        "encode": {limits.FLOPS: 5e10},
        "prefill": {limits.FLOPS: 1e11},
        "decode": {limits.BYTES: 1e9},
    }
    found = limits.shares(stages, work, {limits.BYTES: 20.0, limits.FLOPS: 200.0})
    assert found["encode"]["least_ms"] == 250 and found["encode"]["percent"] == 50
    assert found["prefill"]["percent"] == 25
    assert found["decode"]["percent"] == 50
    assert found["load"]["percent"] == 10
    assert found["first_token"]["least_ms"] == 1 + 250 + 500 + 50


def test_the_two_rates_are_of_this_order() -> None:
    assert 0.1 < machine.read_gb_s(2, n_bytes=32 << 20) < 5000
    assert 0.1 < machine.gemm_gflop_s(256) < 100_000


def pretend(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def answers(**said: str) -> machine.Ask:
    def ask(program: Sequence[str]) -> str:
        return said.get(program[0], "")

    return ask


def test_a_raspberry_pi_says_that_it_was_throttled(tmp_path: Path) -> None:
    root = pretend(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "proc/cpuinfo": "processor : 0\nFeatures\t: fp asimd aes asimdhp asimddp\n",
            "sys/class/thermal/thermal_zone0/temp": "81250\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
        },
    )
    what = machine.describe(root)
    assert what["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert what["features"] == ["asimd", "asimdhp", "asimddp"]
    state = machine.state(root, answers(vcgencmd="throttled=0x50005\n"))
    assert state["hottest_c"] == 81.25
    assert (state["frequency_mhz"], state["frequency_max_mhz"]) == (1500, 2400)
    assert state["governor"] == "ondemand"
    assert state["throttled"] == (
        "under-voltage now, throttled now, under-voltage since boot, throttled since boot"
    )
    assert machine.state(root, answers(vcgencmd="throttled=0x0"))["throttled"] == "no"


def test_a_pi_without_vcgencmd_is_asked_through_sysfs(tmp_path: Path) -> None:
    root = pretend(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": "20000\n"})
    assert machine.state(root, answers())["throttled"] == "frequency capped since boot"


def test_a_jetson_says_its_power_mode(tmp_path: Path) -> None:
    line = "RAM 2345/7620MB CPU [12%@1510,5%@1510] cpu@48.5C VDD_IN 5012mW/5012mW"
    said = answers(nvpmodel="NV Power Mode: 15W\n0\n", tegrastats=f"{line}\n{line}\n")
    state = machine.state(tmp_path, said)
    assert state["power_mode"] == "15W"
    assert state["tegrastats"] == line


def test_a_machine_that_tells_nothing_is_described_without_it(tmp_path: Path) -> None:
    state = machine.state(tmp_path, answers())
    assert set(state) == {"load", "memory_available_bytes"}
    counted = {"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "7\n"}
    assert machine.state(pretend(tmp_path, counted), answers())["throttle_events"] == 7


def test_a_program_that_goes_on_for_ever_is_read_and_left() -> None:
    assert machine._ask(["sh", "-c", "echo one; echo two; exec sleep 60"]).splitlines()[0] == "one"
    assert machine._ask(["no-such-program-here"]) == ""


@pytest.fixture
def compared() -> dict[str, Any]:
    """A made-up result with a peer."""
    stages = {
        "load": 900.0, "image_decode": 40.0, "preprocess": 8.0, "encode": 500.0,
        "prefill": 2000.0, "first_token": 2600.0, "decode": 90.0, "total": 8270.0,
    }  # fmt: skip
    peer = {name: 3 * ms for name, ms in stages.items()}
    state = {"load": 0.4, "hottest_c": 61.0, "throttled": "no", "frequency_mhz": 2400}
    return {
        "model": {
            "name": "random-moondream2", "licence": "random-weights", "size_bytes": 10**9,
            "quantization": {"vision": "int8", "language": "q4_k_m"},
        },
        "stages": stages,
        "peer": peer,
        "ratios": {stage: 3.0 for stage in run.COMPARED},
        "spread": {"stages": {"encode": [480.0, 530.0]}, "peer": {}},
        "limits": {"encode": {"by": "gemm_gflop_s", "percent": 42.0, "least_ms": 210.0}},
        "tokens_per_s": 11.1,
        "prefill_tokens_per_s": 370.0,
        "memory": {"peak_rss_bytes": 2 * 10**9, "peer_peak_rss_bytes": 3 * 10**9},
        "machine": {
            "board": "", "cpu": "A CPU", "cores": 2, "features": ["avx2"], "memory_bytes": 10**10,
            "system": "Linux 6", "architecture": "x86_64", "read_gb_s": 20.0,
            "gemm_gflop_s": 200.0, "before": state, "after": state,
        },
        "settings": {
            "threads": 2, "rounds": 3, "max_tokens": 64,
            "photo": {"file": "drawn", "input_px": [372, 372], "model_px": [378, 378],
                      "image_tokens": 730, "prompt_tokens": 738},
            "peer": {"name": "libmtmd", "mmproj": "m.gguf", "flash_attention": "auto",
                     "image_tokens": 729, "prompt_tokens": 737},
        },
    }  # fmt: skip


def test_the_report_names_peer_ratio_limit_and_randomness(compared: dict[str, Any]) -> None:
    text = "\n".join(report.lines(compared))
    assert "random weights: the answers are noise" in text
    assert "3.00×" in text
    assert "480–530" in text
    assert "42 % (float32 product)" in text
    assert "61 °C" in text and "throttled: no" in text


def test_the_plot_draws_both(compared: dict[str, Any]) -> None:
    both = np.asarray(plot.draw(compared))
    compared["peer"] = compared["ratios"] = None
    alone = np.asarray(plot.draw(compared))
    assert both.shape[0] > alone.shape[0]
    assert len(np.unique(both.reshape(-1, 3), axis=0)) > 20


def test_a_missing_libmtmd_says_how_to_build_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured
) -> None:
    monkeypatch.setattr(mtmd.llama, "library_path", lambda: tmp_path / "libllama.so")
    with pytest.raises(BackendError, match=r"\./install\.sh bench"):
        mtmd.check_installed()
    mmproj = tmp_path / "mmproj.gguf"
    mmproj.touch()
    assert command(["bench", str(bundle), "--vs", "mtmd", "--mmproj", str(mmproj)]) == 1
    assert "./install.sh bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--vs", "mtmd"], ["--random", "smolvlm-256m"], ["--max-tokens", "1"]]
)
def test_options_that_cannot_be_are_refused(bundle: Path, arguments: list[str]) -> None:
    assert command(["bench", str(bundle), *arguments]) == 2


def test_a_convolutional_tower_has_no_estimate() -> None:
    work: dict[str, dict[str, float]] = {"prefill": {limits.FLOPS: 1e11}}
    found = limits.shares({"prefill": 500.0}, work, {limits.FLOPS: 200.0})
    assert found["prefill"]["percent"] == 100
    assert "encode" not in found and "first_token" not in found
