"""A published model's name → a bundle of its shape with random weights, to measure speed with.

The exporter runs as it does on a checkpoint; only the values are drawn instead of read, one tensor
at a time. Speed does not depend on values; answers are noise. The same seed gives the same bundle.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgevlm import paths
from edgevlm.bundle import MANIFEST, read_manifest
from edgevlm.errors import BundleError

from . import Progress, export, mmproj
from .checkpoint import Checkpoint, Entry
from .random_shapes import SHAPES, Shape

NAMES = tuple(SHAPES)
SEED = 0
# Words of the usual questions are one token each; Moondream's templates know one by its id.
_WORDS = (
    "Describe", "Ġthis", "Ġimage", "Ġin", "Ġone", "Ġshort", "Ġsentence", "Ġdetail",
    "What", "Ġis", "Ġthe", "Ġpicture", "Which", "Ġcolours", "Ġdo", "Ġyou", "Ġsee",
)  # fmt: skip
_FIXED = {"query": 15381}


def cached(name: str, *, progress: Progress | None = None) -> Path:
    """The bundle in the user's cache; made where there is none, or another exporter's."""
    directory = paths.cache("random", f"random-{name}")
    if not _is_current(directory):
        if directory.is_symlink():  # to another disk: what lies there is the user's to remove
            directory.unlink()
        elif directory.exists():
            shutil.rmtree(directory)
        write(name, directory, progress=progress)
    return directory


def _is_current(directory: Path) -> bool:
    try:
        source = read_manifest(directory / MANIFEST)["source"]
    except BundleError:  # none yet, damaged, or a format of another version
        return False
    return bool(source.get("revision") == _revision(SEED))


def _revision(seed: int) -> str:
    """What decides the bundle's bytes besides its name: the seed, and the exporter's sources."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    mark = zlib.crc32(b"".join(path.read_bytes() for path in sources))
    return f"seed {seed}, exporter {mark:08x}"


def cached_mmproj(name: str, *, seed: int = SEED) -> Path:
    """The same tower and projector for llama.cpp, kept beside `cached`."""
    path = paths.cache("random", f"random-{name}.mmproj-f16.gguf")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch) / path.name
            mmproj.write(RandomCheckpoint(SHAPES[name], Path(scratch), seed), whole)
            whole.replace(path)
    return path


def write(
    name: str,
    out: Path,
    *,
    seed: int = SEED,
    language: str = "q4_k_m",
    vision: str = "int8",
    prefill: str = "int8",
    progress: Progress | None = None,
) -> Path:
    """Write a bundle in the shape of `name`, one of NAMES; arguments as for `export`.

    int8 is not gated: what the gate looks for, outliers, random weights do not have.
    """
    shape = SHAPES[name]
    with TemporaryDirectory() as scratch:
        return export(
            RandomCheckpoint(shape, Path(scratch), seed),
            out,
            language=language,
            vision=vision,
            prefill=prefill,
            photos=None,
            progress=progress,
            origin={"id": f"random weights in the shape of {name}", "revision": _revision(seed)},
            prompt=shape.options.get("prompt"),
            release=shape.options.get("release"),
        )


class RandomCheckpoint(Checkpoint):
    """A checkpoint whose tensors are drawn when they are asked for; its JSON files are real."""

    def __init__(self, shape: Shape, directory: Path, seed: int) -> None:
        """`directory` receives the JSON files."""
        self._shape = shape
        self._seed = seed
        files = {
            "config.json": shape.config,
            "preprocessor_config.json": shape.processor,
            "tokenizer_config.json": {
                "bos_token": shape.bos or None,
                "eos_token": shape.eos,
                "add_bos_token": bool(shape.bos),
            },
        }
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content))
        _tokenizer(shape).save(str(directory / "tokenizer.json"))
        (directory / "README.md").write_text("---\nlicense: random-weights\n---\n")
        super().__init__(directory)

    def _find(self) -> dict[str, Entry]:
        return {
            name: Entry(Path(), "F32", shape, 0, 0) for name, shape in self._shape.tensors.items()
        }

    def get(self, name: str) -> npt.NDArray[np.float32]:
        """Norms as initialised, matrices with variance 1 / fan-in."""
        shape = self.shape(name)
        if len(shape) == 1:
            fill = np.ones if name.endswith(".weight") else np.zeros
            return fill(shape, np.float32)
        random = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        values = random.standard_normal(shape, np.float32)
        values *= np.float32(np.prod(shape[1:])) ** np.float32(-0.5)
        return values


def _tokenizer(shape: Shape) -> Tokenizer:
    """Byte-level BPE in the published size: bytes, a few words, special tokens, unused rest."""
    pieces = [word[:end] for word in (*_FIXED, *_WORDS) for end in range(2, len(word) + 1)]
    taken = {*shape.special.values(), *_FIXED.values()}
    free = (index for index in range(shape.n_vocab) if index not in taken)
    ids = dict(_FIXED)
    for piece in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces):
        if piece not in ids:
            ids[piece] = next(free)
    ids |= {f"unused{index}": index for index in free}
    merges = list(dict.fromkeys((piece[:-1], piece[-1]) for piece in pieces))
    made = Tokenizer(models.BPE(vocab={**ids, **shape.special}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in shape.special])
    return made
