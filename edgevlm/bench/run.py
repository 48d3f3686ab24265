"""Stages of an answer → medians over rounds, shares of the machine's limits, ratios to the peer.

Our side is `VLM.stream` and the timings in its Answer, so what is measured is what users run. The
peer takes turns with it, photo by photo, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from edgevlm import __version__, kernels, llama, probe, sessions
from edgevlm.answer import Answer
from edgevlm.bench import limits, machine, photo
from edgevlm.bench.mtmd import N_UBATCH, Peer, Setup
from edgevlm.engine import VLM
from edgevlm.prompt import ImageSlot

FORMAT = 1
# The stages, in the order they happen. "decode" is one token of the answer, "image_decode" file →
# pixels; "total" is everything but the load, for an answer of the asked-for length.
STAGES = (
    "load", "image_decode", "preprocess", "encode", "prefill", "first_token", "decode", "total",
)  # fmt: skip
COMPARED = ("encode", "prefill", "first_token", "decode", "total")

_WARM_UP_TOKENS = 2

Rounds = list[Mapping[str, Any]]
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        photo: a file; None draws one.
        mmproj: the peer's vision file; None measures without a peer.
        rounds: that count; one more goes before, to warm up.
    """

    photo: Path | None = None
    mmproj: Path | None = None
    max_tokens: int = 64
    rounds: int = 3


def run(vlm: VLM, plan: Plan, announce: Announce) -> dict[str, Any]:
    """Measure an open model; the result is what `--json` writes, see docs/benchmarks.md.

    Raises:
        ImageError: the photo cannot be read.
        BackendError: there is no libmtmd, or it cannot run this model.
    """
    before = machine.state()
    pixels = photo.pixels(plan.photo, vlm.layout)
    ours: Rounds = []
    theirs: Rounds = []
    with TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{number}.jpg" for number in range(plan.rounds + 1)]
        for file in files:
            photo.save_another(pixels, file)
        with _peer(vlm, plan, files[0]) as peer:
            for number, file in enumerate(files):
                n_tokens = plan.max_tokens if number > 0 else _WARM_UP_TOKENS
                answer = _ask(vlm, file, n_tokens)
                answers: Rounds = [_stages(answer, n_tokens)]
                if peer is not None:
                    answers.append(_with_total(peer.run(file, n_tokens), n_tokens))
                announce(_line(number, plan.rounds, answers))
                if number > 0:  # the first warms up
                    ours.append(answers[0])
                    theirs += answers[1:]
            peer_load_ms = peer.load_ms if peer is not None else 0.0
    after = machine.state()  # before the rates are measured, which heats too
    rates = machine.measure(vlm.threads)
    stages = _medians(ours)
    work = limits.work(vlm, answer)
    return {
        "format": FORMAT,
        "edgevlm": __version__,
        "model": _model(vlm),
        "stages": stages,
        "peer": {**_medians([{**r, "load": peer_load_ms} for r in theirs])} if theirs else None,
        "ratios": _ratios(stages, _medians(theirs)) if theirs else None,
        "spread": {"stages": _spread(ours), "peer": _spread(theirs)},
        "limits": limits.shares(stages, work, rates),
        "tokens_per_s": round(1000 / stages["decode"], 2) if stages["decode"] else None,
        "prefill_tokens_per_s": round(1000 * answer.prompt_tokens / stages["prefill"], 1),
        "memory": _memory(answer, theirs),
        "answers": {"edgevlm": answer.text, **({"libmtmd": theirs[-1]["text"]} if theirs else {})},
        "machine": {**machine.describe(), **rates, "before": before, "after": after},
        "settings": {
            "threads": vlm.threads,
            "rounds": plan.rounds,
            "max_tokens": plan.max_tokens,
            "photo": {
                "file": plan.photo.name if plan.photo else "drawn",
                "input_px": list(answer.input_px[0]),
                "model_px": list(answer.model_px[0]),
                "image_tokens": answer.image_tokens,
                "prompt_tokens": answer.prompt_tokens,
            },
            "peer": _peer_settings(plan, theirs) if theirs else None,
        },
        "versions": _versions(),
    }


def _ask(vlm: VLM, file: Path, max_tokens: int) -> Answer:
    """One description, as long as asked for: an answer that loops goes on."""
    return vlm.describe(file, max_tokens=max_tokens, repetition_stop=False)


def _stages(answer: Answer, max_tokens: int) -> dict[str, float]:
    """Milliseconds by the names in STAGES."""
    timings = {name.removesuffix("_ms"): ms for name, ms in asdict(answer.timings).items()}
    timings["image_decode"] = timings.pop("decode")
    generate_ms = timings.pop("generate")
    timings["decode"] = generate_ms / max(1, answer.generated_tokens - 1)
    return _with_total(timings, max_tokens)


def _with_total(stages: Mapping[str, Any], max_tokens: int) -> dict[str, Any]:
    return {**stages, "total": stages["first_token"] + (max_tokens - 1) * stages["decode"]}


def _peer(vlm: VLM, plan: Plan, file: Path) -> Any:
    return nullcontext() if plan.mmproj is None else Peer(peer_setup(vlm, plan.mmproj, file))


def peer_setup(vlm: VLM, mmproj: Path, file: Path) -> Setup:
    """The peer on the same language file, with the token ids that we read around a picture."""
    texts: list[list[int]] = [[]]
    for unit in vlm.prompt(file).units:
        if isinstance(unit, int):
            texts[-1].append(unit)
        elif isinstance(unit, ImageSlot):
            texts.append([])
    return Setup(
        language=vlm.bundle.file("language.gguf"),
        mmproj=mmproj,
        texts=tuple(tuple(text) for text in texts),
        n_ctx=vlm.bundle.manifest["n_ctx"],
        threads=vlm.threads,
        extra_buffers=probe.verdict().extra_buffers,
    )


def _medians(rounds: Rounds) -> dict[str, float]:
    return {s: round(median(r[s] for r in rounds), 3) for s in STAGES if s in rounds[0]}


def _spread(rounds: Rounds) -> dict[str, list[float]]:
    """The fastest and the slowest round."""
    stages = [stage for stage in STAGES if rounds and stage in rounds[0] and stage != "load"]
    return {
        s: [round(min(r[s] for r in rounds), 3), round(max(r[s] for r in rounds), 3)]
        for s in stages
    }


def _ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """How many times as long the peer takes; not of a stage that did not run."""
    return {s: round(theirs[s] / ours[s], 3) for s in COMPARED if ours[s] > 0}


def _memory(answer: Answer, theirs: Rounds) -> dict[str, int]:
    found = {"peak_rss_bytes": answer.peak_rss_bytes}
    if theirs:
        found["peer_peak_rss_bytes"] = int(theirs[-1]["peak_rss_bytes"])
    return found


def _peer_settings(plan: Plan, theirs: Rounds) -> dict[str, Any]:
    assert plan.mmproj is not None
    return {
        "name": "libmtmd",
        "mmproj": plan.mmproj.name,
        "flash_attention": "auto",
        "n_ubatch": N_UBATCH,
        "image_tokens": int(theirs[-1]["n_image_tokens"]),
        "prompt_tokens": int(theirs[-1]["n_prompt_tokens"]),
    }


def _model(vlm: VLM) -> dict[str, Any]:
    manifest = vlm.bundle.manifest
    return {
        "name": vlm.bundle.name,
        "source": dict(manifest["source"]),
        "licence": manifest["licence"],
        "quantization": dict(manifest["quantization"]),
        "files_bytes": {name: entry["bytes"] for name, entry in manifest["files"].items()},
        "size_bytes": vlm.bundle.n_bytes,
        "language_parameters": vlm.language_parameters,
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "pillow": metadata.version("pillow"),
        "onnxruntime": sessions.version(),
        "llama-cpp-python": llama.version(),
        "llama.cpp": llama.build_features(),
        "kernels": kernels.tier(),
    }


def _line(number: int, rounds: int, answers: Rounds) -> str:
    """What happened in a round, for somebody who waits."""
    who = ("", "peer ")
    said = [
        f"{name}first token {a['first_token'] / 1000:.2f} s, a token {a['decode']:.0f} ms"
        for name, a in zip(who, answers, strict=False)
    ]
    title = "warm-up" if number == 0 else f"round {number} of {rounds}"
    return f"{title}: {'; '.join(said)}"


def is_random(result: Mapping[str, Any]) -> bool:
    """Whether the weights were random: speed is meant, answers are noise."""
    return bool(result["model"]["licence"] == "random-weights")
