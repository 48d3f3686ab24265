"""What does the int8 prefill graph change in what a real language model says next?

A GGUF's weights are taken as the truth. On prose, the next-token distributions of the float graph
are held against those of the int8 graph and of llama.cpp's quantizations of the same weights: mean
KL divergence, how often the likeliest token is the same, perplexity. The prose is Python's own
documentation. "Alone" the graph does all that a language model does; "handed over" is the runtime's
way: it reads what comes before, llama.cpp (float32 here) goes on; every 8th row is scored so.

    python benchmarks/prefill_quality.py MODEL.gguf [--chunks N] [--float NAME ...] [--json]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from edgevlm_export import language_file, precision, prefill, quantize
from edgevlm_export.gguf import Language
from edgevlm_export.graph import Model as Graph
from numpy.typing import NDArray

from edgevlm import device, llama
from edgevlm.cancel import Cancel
from edgevlm.kernels import Flag
from edgevlm.sessions import Session

CHUNK_TOKENS = 512
STEP_TOKENS = 8  # every so many positions are scored where each takes a step of its own
QUANTIZATIONS = ("q8_0", "q6_k", "q4_k_m", "q4_0")

Logits = NDArray[np.float32]  # [n, n_vocab]


@dataclass(frozen=True)
class Row:
    what: str
    kl_mean: float
    kl_p99: float
    top1_equal: float
    perplexity: float


class Score:
    """Sums over chunks."""

    def __init__(self) -> None:
        self.kl: list[NDArray[np.float64]] = []
        self.same: list[NDArray[np.bool_]] = []
        self.nll: list[NDArray[np.float64]] = []

    def add(self, expected: Logits, found: Logits, ids: list[int]) -> None:
        """`found` has every row of the chunk, or every STEP_TOKENS-th."""
        step = len(expected) // len(found)
        p, q = log_softmax(expected[step - 1 :: step]), log_softmax(found)
        self.kl.append((np.exp(p) * (p - q)).sum(-1))
        self.same.append(p.argmax(-1) == q.argmax(-1))
        following = ids[step::step]
        self.nll.append(-q[np.arange(len(following)), following])

    def row(self, what: str) -> Row:
        kl = np.concatenate(self.kl)
        same, nll = np.concatenate(self.same), np.concatenate(self.nll)
        return Row(
            what, float(kl.mean()), float(np.quantile(kl, 0.99)), float(same.mean()),
            float(np.exp(nll.mean())),
        )  # fmt: skip


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def prose() -> str:
    """Paragraphs of running text; tables, code and indices left out."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [re.sub(r"\s+", " ", part) for part in re.split(r"\n\s*\n", text)]
    return "\n".join(p for p in paragraphs if len(p) > 200 and not re.search(r"[|>]{2}|::=|==", p))


class GraphLogits:
    """A prefill graph with the float head behind it."""

    def __init__(self, graph: Graph, language: Language, directory: Path, threads: int) -> None:
        path, data = directory / "graph.onnx", directory / "graph.data"
        data.unlink(missing_ok=True)
        graph.save(path, data=data)
        self._session = Session(path, threads)
        tensors = {tensor.name: tensor for tensor in language.tensors}
        self._table = tensors["token_embd.weight"].load()
        self._head = tensors["output.weight"].load() if "output.weight" in tensors else self._table

    def __call__(self, ids: list[int]) -> Logits:
        inputs = from_the_front(self._session, self._table[ids])
        *_, hidden = self._session.run_all(inputs, Cancel())
        return np.asarray(hidden @ self._head.T, np.float32)


def from_the_front(session: Session, rows: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """The inputs of a prefill graph where nothing was read before."""
    zero = np.array(0, np.int64)
    dtypes = {"tensor(float16)": np.float16}
    nothing = {
        name: np.empty(
            [size if isinstance(size, int) else 0 for size in shape], dtypes.get(kind, np.float32)
        )
        for name, (kind, shape) in session.inputs.items()
    }
    return {**nothing, "n_past": zero, "n_prefix": zero, "rows": rows}


class LlamaLogits:
    """llama.cpp on a file, logits of every row."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = llama.Model(path, extra_buffers=False)
        self._flag = Flag()
        self.context = llama.Context(
            self.model, CHUNK_TOKENS, threads=threads, flag=self._flag, precise=True
        )

    def __call__(self, ids: list[int]) -> Logits:
        n = len(ids)
        self.context.truncate(0)
        batch = lib.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        assert lib.llama_decode(self.context.handle, batch) == 0
        lib.llama_batch_free(batch)
        pointer = lib.llama_get_logits(self.context.handle)
        return np.array(np.ctypeslib.as_array(pointer, (n, self.model.n_vocab)))

    def close(self) -> None:
        self.context.close()
        self.model.close()


class HandedOver:
    """As the runtime does it: the graph reads what stands before a token, llama.cpp the token."""

    def __init__(self, graph: Graph, file: Path, directory: Path, threads: int) -> None:
        path, data = directory / "prefill.onnx", directory / "prefill.data"
        data.unlink(missing_ok=True)
        graph.save(path, data=data)
        self._session = Session(path, threads)
        self._llama = LlamaLogits(file, threads)

    def __call__(self, ids: list[int]) -> Logits:
        context = self._llama.context
        rows = self._llama.model.embed(ids)
        outputs = self._session.run_all(from_the_front(self._session, rows), Cancel())
        found = []
        for n in range(STEP_TOKENS - 1, len(ids), STEP_TOKENS):
            state = context.new_state(range(n))
            for layer, (keys, values) in enumerate(zip(outputs[0::2], outputs[1::2], strict=True)):
                state.keys[layer][...], state.values[layer][...] = keys[:n], values[:, :n]
            context.fill_cache(state)
            context.decode([ids[n]], n)
            found.append(context.logits())
        return np.stack(found)

    def close(self) -> None:
        self._llama.close()


def measure(model: Path, n_chunks: int, floats: list[str], threads: int) -> Iterator[Row]:
    language = language_file.read(language_file.File(model))
    whole = prefill.graph(language, hidden=True)
    halves = prefill.graph(language, half=True, hidden=True)
    shipped = prefill.graph(language, half=True)
    layers = precision.linear_layers(whole)
    tokenizer = llama.Model(model, extra_buffers=False)
    ids = tokenizer.tokenize(prose()[: 8 * n_chunks * CHUNK_TOKENS])
    tokenizer.close()
    chunks = [ids[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS] for i in range(n_chunks)]
    assert len(chunks[-1]) == CHUNK_TOKENS
    with TemporaryDirectory() as scratch:
        directory = Path(scratch)
        reference = GraphLogits(whole, language, directory, threads)
        expected = [reference(chunk) for chunk in chunks]
        del reference

        def score(what: str, logits: Any) -> Row:
            total = Score()
            for wanted, chunk in zip(expected, chunks, strict=True):
                total.add(wanted, logits(chunk), chunk)
            return total.row(what)

        file = directory / "f32.gguf"
        language.save(file, "f32")
        itself, every = iter(expected), iter(expected)
        yield score("float graph", lambda _: next(itself))
        what = f"float graph, every {STEP_TOKENS}th row"
        yield score(what, lambda _: next(every)[STEP_TOKENS - 1 :: STEP_TOKENS])
        for kept in ("", *floats):
            keep = [name for name in layers if kept and kept in name]
            what = f"int8 graph{kept and f', {kept} in float'}"
            alone = precision.int8(halves, keep, parts=prefill.PARTS)
            yield score(f"{what}, alone", GraphLogits(alone, language, directory, threads))
            peer = HandedOver(
                precision.int8(shipped, keep, parts=prefill.PARTS), file, directory, threads
            )
            yield score(f"{what}, handed over", peer)
            peer.close()
        for kind in ("f32", *QUANTIZATIONS):
            quantized = directory / f"{kind}.gguf"
            if kind != "f32":
                quantize.quantize(file, quantized, kind, threads=threads)
            plain = LlamaLogits(quantized, threads)
            yield score(f"llama.cpp {kind}", plain)
            plain.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a language model as GGUF, for example nano's")
    parser.add_argument("--chunks", type=int, default=6, help=f"of {CHUNK_TOKENS} tokens")
    parser.add_argument("--float", nargs="*", default=[], help="parts of names kept in float")
    parser.add_argument("--threads", type=int, default=device.thread_budget())
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    if not given.json:
        print(f"{given.model}, {given.chunks} × {CHUNK_TOKENS} tokens")
        print(f"{'':36} {'mean KL':>8} {'p99 KL':>8} {'top-1':>6} {'perplexity':>10}")
    for row in measure(given.model, given.chunks, given.float, given.threads):
        rows.append(asdict(row))
        if not given.json:
            print(
                f"{row.what:36} {row.kl_mean:8.4f} {row.kl_p99:8.3f} {row.top1_equal:6.3f} "
                f"{row.perplexity:10.3f}",
                flush=True,
            )
    if given.json:
        json.dump({"model": str(given.model), "chunks": given.chunks, "rows": rows}, sys.stdout)


if __name__ == "__main__":
    main()
