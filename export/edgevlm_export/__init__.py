"""The export stage: a checkpoint directory → a bundle that the runtime opens.

Needs neither torch nor transformers; weights stream from disk to disk. What it needs on top of
the runtime is in the extra `export` (gguf, onnx).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .families import Arrays, Options, Parts
    from .gguf import Language
    from .graph import Graph

__all__ = ["EXPORTERS", "LANGUAGES", "PREFILLS", "VISIONS", "export", "export_pair"]

LANGUAGES = ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0")
VISIONS = ("fp32", "fp16", "int8")
EXPORTERS = ("optimum",)
PREFILLS = ("none", "int8", "fp32")
Progress: TypeAlias = Callable[[str, int, int], None]  # what, steps done, steps in all


def export(
    source: Path | Checkpoint,
    out: Path,
    *,
    family: str | None = None,
    language: str = "f16",
    vision: str = "fp32",
    prefill: str = "none",
    prompt: str | None = None,
    fit: str | None = None,
    tokenizer: Path | None = None,
    release: str | None = None,
    exporter: str | None = None,
    lora: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    imatrix: Path | None = None,
    photos: Sequence[Path] | None = (),
    threads: int | None = None,
    progress: Progress | None = None,
    origin: Mapping[str, str] | None = None,
) -> Path:
    """Write the bundle of `source`, a checkpoint or its directory, into the new directory `out`.

    Args:
        family, prompt, fit: override what the checkpoint says; `prompt` names the language model's
            template, `fit` is "crop", "pad" or "stretch".
        language: one of LANGUAGES; the quantized ones are made by llama.cpp.
        vision: one of VISIONS; int8 keeps in float what it would harm (see gate.py).
        prefill: one of PREFILLS; a second, faster copy of the language model for reading pictures.
        tokenizer: a tokenizer.json to take instead of the checkpoint's own.
        release: of a family whose releases differ and whose checkpoint does not say which it is.
        exporter: "optimum" for a tower that graph.py does not write (see optimum.py).
        lora: directory of a PEFT adapter, merged into the weights.
        adapters: directories of PEFT adapters by name, to be switched at run time.
        imatrix: importance matrix for the quantized languages (imatrix.gguf).
        photos: what int8 is measured on, files or directories; by default drawn pictures. None
            does not measure, and lets every layer be int8.
        threads: by default the physical cores.
        progress: told how far each part is.
        origin: "id" and "revision" of the source; by default the directory's name.

    Raises:
        UnknownFamily: no family knows this checkpoint; the message lists what was seen.
        BundleError: the checkpoint is incomplete, contradictory or not understood, or `out` is
            taken. Nothing is left behind.
    """
    from edgevlm.bundle import adapter_file
    from edgevlm.device import thread_budget
    from edgevlm.errors import BundleError

    from . import bundle, families
    from .checkpoint import Checkpoint
    from .lora import Lora

    _check(language=language, vision=vision, prefill=prefill, imatrix=imatrix, exporter=exporter)
    report: Progress = progress or (lambda what, done, total: None)
    budget = thread_budget(threads)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source, tokenizer)
    source = checkpoint.directory
    adapter = Lora(lora) if lora is not None else None
    if adapter is not None:
        checkpoint.adapt(adapter)
    switched = {adapter_file(key): Lora(path) for key, path in (adapters or {}).items()}
    for one in switched.values():
        checkpoint.accompany(one)
    name, module = families.find(checkpoint, family)
    options = families.Options(prompt, fit, release, exporter)
    parts = module.parts(checkpoint, options)
    if exporter is not None and not parts.vision.has_inserted:
        raise BundleError(f"exporter {exporter!r}: the towers of family {name!r} are written here")
    for one in (*([adapter] if adapter else []), *switched.values()):
        one.check(checkpoint)
    with bundle.writing(out) as directory:
        for file, one in switched.items():
            one.write(directory / file, parts.language)
        _write_language(parts, directory, language, imatrix, budget, report)
        if prefill != "none":
            _write_prefill(parts.language, directory, prefill, report)
        shutil.copyfile(checkpoint.tokenizer, directory / "tokenizer.json")
        manifest = {
            "name": out.resolve().name,
            "family": name,
            "source": {
                **(origin or {"id": source.resolve().name, "revision": ""}),
                **({"lora": lora.resolve().name} if lora is not None else {}),
            },
            "licence": _licence(source),
            **parts.manifest,
            "n_embd": parts.language.n_embd,
            "n_ctx": bundle.context(parts.language.n_ctx),
            "quantization": _kinds(vision, language, prefill),
            "options": _chosen(options),
        }
        _write_vision(parts.vision, directory, manifest, photos, budget, report)
        bundle.seal(directory, manifest)
    return out


def export_pair(
    model: Path,
    mmproj: Path,
    out: Path,
    *,
    vision: str = "fp32",
    prefill: str = "none",
    prompt: str | None = None,
    fit: str | None = None,
    release: str | None = None,
    photos: Sequence[Path] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the bundle of a pair of GGUF files: `model` is copied, `mmproj` becomes our graph.

    Arguments as for `export`; `fit` is "pad" by default, as LLaVA was trained. Moondream's pair,
    which does not tell its release, needs `release`.

    Raises:
        BundleError: a file is not what it should be, the two do not belong together, or `out` is
            taken. Nothing is left behind.
    """
    from edgevlm.device import thread_budget

    from . import bundle, families, pair

    _check(language="f16", vision=vision, prefill=prefill, imatrix=None)
    report: Progress = progress or (lambda what, done, total: None)
    planned = pair.plan(model, mmproj, prompt, fit, release)
    with bundle.writing(out) as directory:
        shutil.copyfile(model, directory / "language.gguf")
        _write_arrays(planned.arrays, directory, "float32")
        report("language", 1, 1)
        for name, content in planned.texts.items():
            (directory / name).write_text(content, encoding="utf-8")
        if prefill != "none":
            _write_prefill(planned.files.language(), directory, prefill, report)
        manifest = {
            "name": out.resolve().name,
            "source": {"id": planned.files.name, "revision": ""},
            **planned.manifest,
            "quantization": _kinds(vision, planned.files.quantization, prefill),
            "options": _chosen(families.Options(prompt, fit, release)),
        }
        _write_vision(planned.vision, directory, manifest, photos, thread_budget(threads), report)
        bundle.seal(directory, manifest)
    return out


def _check(
    *,
    language: str,
    vision: str,
    prefill: str,
    imatrix: Path | None,
    exporter: str | None = None,
) -> None:
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r}; known: {', '.join(LANGUAGES)}")
    if vision not in VISIONS:
        raise ValueError(f"vision={vision!r}; known: {', '.join(VISIONS)}")
    if exporter not in (None, *EXPORTERS):
        raise ValueError(f"exporter={exporter!r}; known: {', '.join(EXPORTERS)}")
    if prefill not in PREFILLS:
        raise ValueError(f"prefill={prefill!r}; known: {', '.join(PREFILLS)}")
    if imatrix is not None and language in ("f32", "f16"):
        raise ValueError(f"an imatrix is for quantized languages; language={language!r}")


def _write_language(
    parts: Parts,
    directory: Path,
    kind: str,
    imatrix: Path | None,
    threads: int,
    report: Progress,
) -> None:
    """language.gguf, through an f16 file of its own where llama.cpp quantizes; then the arrays."""
    from . import gguf, quantize

    file = directory / "language.gguf"
    if kind in gguf.DTYPES:
        gguf.counted(parts.language, partial(report, "language")).save(file, kind)
    else:
        whole = directory / "language.f16.gguf"
        gguf.counted(parts.language, partial(report, "language f16")).save(whole, "f16")
        quantize.quantize(
            whole, file, kind,
            imatrix=imatrix, threads=threads, progress=partial(report, f"language {kind}"),
        )  # fmt: skip
        whole.unlink()
    _write_arrays(parts.arrays, directory, "float32" if kind == "f32" else "float16")


def _write_arrays(files: Mapping[str, Arrays], directory: Path, dtype: str) -> None:
    import numpy as np

    for name, arrays in files.items():
        values: dict[str, Any] = {key: load().astype(dtype) for key, load in arrays.items()}
        np.savez(directory / name, **values)


def _write_prefill(language: Language, directory: Path, kind: str, report: Progress) -> None:
    from . import prefill

    prefill.write(language, directory, kind, progress=partial(report, f"prefill {kind}"))


def _chosen(options: Options) -> dict[str, str]:
    """The section `options` of bundle.json: what the caller decided."""
    return {name: value for name, value in vars(options).items() if value is not None}


def _kinds(vision: str, language: str, prefill: str) -> dict[str, str]:
    """The section `quantization` of bundle.json."""
    kinds = {"vision": vision, "language": language}
    return kinds if prefill == "none" else {**kinds, "prefill": prefill}


def _write_vision(
    graph: Graph,
    directory: Path,
    manifest: dict[str, Any],
    photos: Sequence[Path] | None,
    threads: int,
    report: Progress,
) -> None:
    """vision.onnx, with its weights apart where they are many; for int8, what the gate found goes
    into the card."""
    from edgevlm import graph_cache

    from . import gate, precision
    from . import photos as pictures

    model, kind = graph.model(), manifest["quantization"]["vision"]
    if kind == "fp16":
        model = precision.fp16(model)
    elif kind == "int8" and photos is None:
        model = precision.int8(model)
    elif kind == "int8" and photos is not None:
        family = gate.family_of(directory, manifest)
        seen = list(pictures.read(photos))
        verdict = gate.Gate(
            model, family, seen, threads=threads, progress=partial(report, "int8")
        ).choose()
        model = precision.int8(model, verdict.float_layers)
        parity = {**manifest["card"]["parity"], "vision_int8": verdict.card()}
        manifest["card"] = {**manifest["card"], "parity": parity}
    data = directory / "vision.data" if model.n_bytes > graph_cache.MOST_BYTES else None
    model.save(directory / "vision.onnx", data=data, progress=partial(report, "vision"))


def _licence(source: Path) -> str:
    """The licence that the model card's front matter names."""
    card = source / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"\A---\n(?:(?!---).*\n)*?license:\s*(\S+)", text)
    return found[1] if found else "unknown"
