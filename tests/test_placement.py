"""Which stage runs where, decided for machines that are not this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import edgevlm
from edgevlm import device, hub, placement, probe, sessions
from edgevlm.answer import Devices
from edgevlm.bundle import Bundle
from edgevlm.cli import run
from edgevlm.device import Support
from edgevlm.errors import DeviceError
from edgevlm.placement import Found, Placement, place

WORKS = Support(True, "")
ORT_PLAIN = Support(False, "the installed onnxruntime was built without CUDA")
ORT_BROKEN = Support(True, "libcudnn.so.9 is missing")
LLAMA_PLAIN = Support(False, "the installed llama.cpp was built without CUDA")
LLAMA_BROKEN = Support(True, "llama.cpp fails there: it died of SIGABRT")

GB = 10**9


def found(gpu: bool, onnxruntime: Support, llama: Support, free_bytes: int = 8 * GB) -> Found:
    return Found(gpu, onnxruntime, llama, free_bytes)


CPU, CUDA = Devices(), Devices("cuda", "cuda")


def test_where_everything_is_there_everything_runs_on_the_gpu_without_a_word() -> None:
    for wanted in ("auto", "cuda"):
        assert place(wanted, "fp16", 5 * GB, found(True, WORKS, WORKS)) == Placement(CUDA)


@pytest.mark.parametrize("gpu", [False, True])
def test_plain_libraries_are_a_plain_cpu_machine_and_no_line(gpu: bool) -> None:
    for vision in ("fp32", "int8", None):
        assert place("auto", vision, 5 * GB, found(gpu, ORT_PLAIN, LLAMA_PLAIN)) == Placement(CPU)


@pytest.mark.parametrize(
    ("machine", "devices", "says"),
    [
        (found(True, WORKS, LLAMA_PLAIN), Devices("cuda", "cpu"), LLAMA_PLAIN.problem),
        (found(True, WORKS, LLAMA_BROKEN), Devices("cuda", "cpu"), "SIGABRT"),
        (found(True, ORT_PLAIN, WORKS), Devices("cpu", "cuda"), ORT_PLAIN.problem),
        (found(True, ORT_BROKEN, WORKS), Devices("cpu", "cuda"), "libcudnn"),
        (found(False, ORT_BROKEN, LLAMA_BROKEN), CPU, "libcudnn"),
    ],
)
def test_auto_takes_what_works_and_says_what_does_not(
    machine: Found, devices: Devices, says: str
) -> None:
    placed = place("auto", "fp32", 5 * GB, machine)
    assert placed.devices == devices
    assert says in placed.note
    assert "\n" not in placed.note


def test_an_int8_vision_graph_stays_on_the_cpu() -> None:
    placed = place("auto", "int8", 5 * GB, found(True, WORKS, WORKS))
    assert placed.devices == Devices("cpu", "cuda")
    assert "--vision fp16" in placed.note


def test_cuda_refuses_an_int8_vision_graph_and_names_no_library() -> None:
    with pytest.raises(DeviceError, match="--vision fp16") as refused:
        place("cuda", "int8", 5 * GB, found(True, WORKS, WORKS))
    assert "pip install" not in str(refused.value)


ORT_COMMAND = "pip install 'onnxruntime-gpu"
LLAMA_COMMAND = "CMAKE_ARGS=-DGGML_CUDA=on pip install"


@pytest.mark.parametrize(
    ("machine", "commands"),
    [
        (found(True, ORT_PLAIN, LLAMA_PLAIN), (ORT_COMMAND, LLAMA_COMMAND)),
        (found(False, ORT_PLAIN, LLAMA_PLAIN), (ORT_COMMAND, LLAMA_COMMAND, "no NVIDIA GPU")),
        (found(True, ORT_BROKEN, WORKS), (ORT_COMMAND, "libcudnn")),
        (found(True, WORKS, LLAMA_BROKEN), (LLAMA_COMMAND, "SIGABRT")),
    ],
)
def test_cuda_that_is_not_all_there_is_an_error_with_the_way_there(
    machine: Found, commands: tuple[str, ...]
) -> None:
    with pytest.raises(DeviceError) as refused:
        place("cuda", "fp32", 5 * GB, machine)
    message = str(refused.value)
    assert all(command in message for command in commands)
    for command in {ORT_COMMAND, LLAMA_COMMAND} - {*commands}:
        assert command not in message
    assert refused.value.exit_code == 6


def test_cpu_looks_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find", lambda: pytest.fail("looked"))
    assert placement.choose("cpu", Bundle(Path(), {})) == Placement(CPU)


def test_the_command_asks_for_what_is_pinned() -> None:
    requirements = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"{probe.REQUIREMENT}"' in requirements


def test_a_gpu_that_was_hidden_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Path, "exists", lambda path: True)
    assert device.has_nvidia_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device.has_nvidia_gpu()


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        edgevlm.Settings(device="gpu")


def test_a_build_without_cuda_says_so() -> None:
    if "CUDAExecutionProvider" in sessions.providers():
        pytest.skip("this ONNX Runtime was built with CUDA")
    assert sessions.cuda() == ORT_PLAIN


def test_the_graph_that_tries_a_provider_computes() -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(sessions._NEGATE, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": [3.0]})[0].tolist() == [-3.0]


def test_a_gpu_on_which_llama_cpp_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """This library has no GPU, so the child fails as on a machine whose GPU does not work."""
    monkeypatch.setattr(probe, "_try", lambda **_: "on the GPU it died of SIGABRT")
    assert "SIGABRT" in probe.cuda_finding(["a card"])
    monkeypatch.setattr(probe, "_try", lambda **_: "")
    assert probe.cuda_finding(["a card"]) == ""
    monkeypatch.setattr(probe, "_try", lambda **_: pytest.fail("tried again"))
    assert probe.cuda_finding(["a card"]) == ""
    assert "no NVIDIA GPU" in probe.cuda_finding([])


def test_the_command_line_ends_with_6(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(placement, "find", lambda: found(False, ORT_PLAIN, LLAMA_PLAIN))
    monkeypatch.setattr("edgevlm.engine.open_bundle", lambda path: hub.packaged("nano"))
    assert run(["describe", "-m", str(tmp_path), "photo.jpg", "--device", "cuda"]) == 6
    said = capsys.readouterr().err
    assert ORT_COMMAND in said and LLAMA_COMMAND in said


def test_a_language_model_that_does_not_fit_the_gpu_stays_on_the_cpu() -> None:
    small = found(True, WORKS, WORKS, free_bytes=5 * GB)
    placed = place("auto", "fp16", 5 * GB, small)
    assert placed.devices == Devices("cuda", "cpu")
    assert "6.1 GB" in placed.note and "5.0 free" in placed.note
    with pytest.raises(DeviceError, match=r"6\.1 GB"):
        place("cuda", "fp16", 5 * GB, small)


def test_llama_cpp_is_imported_without_its_high_level_half_and_left_whole_for_others() -> None:
    program = (
        "import sys, edgevlm.llama\n"
        "assert not [name for name in sys.modules if name.startswith(('llama_cpp', 'jinja2'))]\n"
        "import llama_cpp\n"
        "assert llama_cpp.Llama and llama_cpp.llama_cpp.llama_decode\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
