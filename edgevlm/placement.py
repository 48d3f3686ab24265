"""Which stage runs where: what was asked for and what this machine has in, a `Placement` out.

`place` only decides, so that every machine can be tested on any; `find` looks. Pictures are always
prepared on the CPU: the kernels' result is the same everywhere, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm import device, probe
from edgevlm.answer import Devices
from edgevlm.bundle import Bundle
from edgevlm.device import Support
from edgevlm.errors import DeviceError

# Both distributions of ONNX Runtime are one package on disk: the other one has to go first.
_ONNXRUNTIME = "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
_LLAMA = (
    "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-deps --no-cache-dir "
    f"--no-binary llama-cpp-python {probe.REQUIREMENT}"
)
_WORKSPACE_BYTES = 1 << 30  # beside the weights: keys and values, activations, cuDNN


@dataclass(frozen=True)
class Found:
    """What this machine has for CUDA. `gpu`: the system shows an NVIDIA GPU."""

    gpu: bool
    onnxruntime: Support
    llama: Support
    free_bytes: int  # on the first GPU


@dataclass(frozen=True)
class Placement:
    """Where the stages run. `note`: what stays on the CPU though part of what it needs is there."""

    devices: Devices
    note: str = ""


def choose(wanted: str, bundle: Bundle) -> Placement:
    """Where the stages of a model run on this machine.

    `wanted` is of `settings.DEVICES`; "auto" takes what is there, "cuda" nothing less than all.

    Raises:
        DeviceError: "cuda" was asked for and is not all there.
    """
    if wanted == "cpu":
        return Placement(Devices())
    vision = bundle.manifest["quantization"].get("vision")
    return place(wanted, vision, bundle.n_bytes, find())


def place(wanted: str, vision: str | None, n_bytes: int, found: Found) -> Placement:
    """`choose`, for a vision graph in this format, files of that size, and what was found."""
    encoder, language = found.onnxruntime.problem, found.llama.problem
    # There are no CUDA kernels for int8 graphs (MatMulIntegerToFloat): a CUDA session would
    # compute them on the CPU all the same, and copy what goes in and out.
    if vision == "int8":
        encoder = "vision.onnx is int8, for CPUs only (export the model with --vision fp16)"
    needed = n_bytes + _WORKSPACE_BYTES
    if not language and found.free_bytes < needed:
        language = f"it needs {needed / 1e9:.1f} GB; the GPU has {found.free_bytes / 1e9:.1f} free"
    lacks = {"image encoder": encoder, "language model": language}
    reasons = "; ".join(f"the {what}, because {lack}" for what, lack in lacks.items() if lack)
    if wanted == "cuda" and reasons:
        raise DeviceError(f"cuda was asked for and cannot run {reasons}{_remedy(found)}")
    half = found.onnxruntime.built or found.llama.built
    return Placement(
        Devices(encode="cpu" if encoder else "cuda", language="cpu" if language else "cuda"),
        f"the CPU runs {reasons}" if half and reasons else "",
    )


def _remedy(found: Found) -> str:
    commands = [
        command
        for support, command in ((found.onnxruntime, _ONNXRUNTIME), (found.llama, _LLAMA))
        if support.problem
    ]
    if not commands:
        return ""
    no_gpu = "" if found.gpu else "This machine shows no NVIDIA GPU; where there is one, "
    return f". {no_gpu}install what it needs with `{'` and `'.join(commands)}`"


def find() -> Found:
    """Try both libraries; a build with CUDA is asked to compute something."""
    from edgevlm import llama, sessions  # here, because this loads both libraries

    gpus = llama.cuda_gpus()
    if gpus is None:
        language = Support(False, "the installed llama.cpp was built without CUDA")
    else:
        language = Support(True, probe.cuda_finding(gpus))
    return Found(device.has_nvidia_gpu(), sessions.cuda(), language, llama.cuda_free_bytes())
