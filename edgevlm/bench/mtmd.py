"""The peer: llama.cpp's own multimodal path, libmtmd of the installed llama-cpp-python.

The only importer of its binding. The peer lives in a process of its own, so that its memory is its
own and none of our settings reach it; it runs as llama-mtmd-cli does, on the same language file.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

from edgevlm import device, llama
from edgevlm.errors import BackendError

INSTALL = "./install.sh bench"
N_UBATCH = 1024  # a little faster here than llama.cpp's own 512
_GOMP_SPINCOUNT = "300000"  # libgomp's own, which llama/library.py lowers for us
_FAILED = "failed"


@dataclass(frozen=True)
class Setup:
    """What the peer is given.

    Attributes:
        texts: the prompt's token ids, cut where a picture stands: one run more than pictures.
    """

    language: Path
    mmproj: Path
    texts: tuple[tuple[int, ...], ...]
    n_ctx: int
    threads: int
    extra_buffers: bool


def check_installed() -> None:
    """Raises BackendError: this llama-cpp-python was built without libmtmd."""
    directory = llama.library_path().parent
    if not any(directory.glob("*mtmd*")):
        raise BackendError(
            f"there is no libmtmd in {directory}: build llama-cpp-python with it, {INSTALL}"
        )


class Peer:
    """The process; a context manager."""

    def __init__(self, setup: Setup) -> None:
        """Raises BackendError: libmtmd cannot load the model."""
        check_installed()
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe()
        ours = os.environ.get("GOMP_SPINCOUNT")
        os.environ["GOMP_SPINCOUNT"] = _GOMP_SPINCOUNT
        try:
            self._process = spawning.Process(target=_serve, args=(theirs, setup), daemon=True)
            self._process.start()
        finally:
            if ours is not None:
                os.environ["GOMP_SPINCOUNT"] = ours
        theirs.close()
        self.load_ms: float = self._receive()["load"]

    def run(self, photo: Path, max_tokens: int) -> dict[str, Any]:
        """One answer about a photo: milliseconds of each stage, what it took, its text.

        Raises:
            BackendError: libmtmd failed.
        """
        self._pipe.send((photo, max_tokens))
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise BackendError(
                f"the peer's process ended with {self._process.exitcode}, in libmtmd"
            ) from None
        if _FAILED in answer:
            raise BackendError(f"libmtmd {answer[_FAILED]}")
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _serve(pipe: Connection, setup: Setup) -> None:
    """The child's life: load, then an answer for each photo until the pipe closes."""
    try:
        begin_s = perf_counter()
        engine = _Engine(setup)
        pipe.send({"load": 1000 * (perf_counter() - begin_s)})
        while True:
            photo, max_tokens = pipe.recv()
            pipe.send(engine.answer(photo, max_tokens))
    except EOFError:
        return
    except BackendError as error:
        pipe.send({_FAILED: str(error)})


class _Engine:
    """mtmd_tokenize → mtmd_encode_chunk → llama_decode → the likeliest token."""

    def __init__(self, setup: Setup) -> None:
        from llama_cpp import mtmd_cpp

        self._mtmd: Any = mtmd_cpp
        self._lib: Any = self._mtmd.llama_cpp  # what the binding itself loaded
        for set_log in (self._mtmd.mtmd_log_set, self._mtmd.mtmd_helper_log_set):
            set_log(llama.on_log, ctypes.c_void_p(0))
        self._texts = setup.texts
        self._model = llama.Model(setup.language, extra_buffers=setup.extra_buffers)
        params = self._lib.llama_context_default_params()
        params.n_ctx = setup.n_ctx
        params.n_batch = max(params.n_batch, N_UBATCH)
        params.n_ubatch = N_UBATCH
        params.n_threads = params.n_threads_batch = setup.threads
        self._context = self._lib.llama_init_from_model(self._model.handle, params)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu = False
        vision.print_timings = False
        vision.n_threads = setup.threads
        self._vision = mtmd_cpp.mtmd_init_from_file(
            str(setup.mmproj).encode(), self._model.handle, vision
        )
        if not self._context or not self._vision:
            raise BackendError(f"cannot load {setup.language} with {setup.mmproj}")

    def answer(self, photo: Path, max_tokens: int) -> dict[str, Any]:
        mtmd, lib = self._mtmd, self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        clock = _Clock()
        bitmap = mtmd.mtmd_helper_bitmap_init_from_file(self._vision, str(photo).encode(), False)
        if not bitmap:
            raise BackendError(f"cannot read {photo}")
        clock.stage("image_decode")
        chunks = self._tokenize(bitmap)
        clock.stage("preprocess")
        images = [
            chunk
            for n in range(mtmd.mtmd_input_chunks_size(chunks))
            if mtmd.mtmd_input_chunk_get_type(chunk := mtmd.mtmd_input_chunks_get(chunks, n))
            == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        ]
        position = n_image_tokens = 0
        for text, chunk in zip_longest(self._texts, images):
            if text:
                self._decode_ids(text, position)
                position += len(text)
                clock.stage("prefill")
            if chunk is None:
                continue
            if mtmd.mtmd_encode_chunk(self._vision, chunk) != 0:
                raise BackendError("cannot encode the picture")
            clock.stage("encode")
            n_tokens = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
            self._decode_embeddings(chunk, n_tokens, position)
            position += n_tokens
            n_image_tokens += n_tokens
            clock.stage("prefill")
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        tokens = [self._likeliest()]
        first_token_ms = clock.total_ms()
        for n in range(max_tokens - 1):
            self._decode_ids(tokens[-1:], position + n)
            tokens.append(self._likeliest())
        return {
            **clock.ms,
            "first_token": first_token_ms,
            "decode": (clock.total_ms() - first_token_ms) / max(1, max_tokens - 1),
            "n_image_tokens": n_image_tokens,
            "n_prompt_tokens": position,
            "peak_rss_bytes": device.peak_rss_bytes(),
            "text": b"".join(map(self._model.piece, tokens)).decode("utf-8", "replace"),
        }

    def _tokenize(self, bitmap: Any) -> Any:
        """The picture's chunks, preprocessed; the words around it come from our own prompt."""
        mtmd = self._mtmd
        chunks = mtmd.mtmd_input_chunks_init()
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(self._vision, chunks, ctypes.byref(text), bitmaps, 1) != 0:
            raise BackendError("cannot prepare the picture")
        return chunks

    def _decode_ids(self, ids: Sequence[int], position: int) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i] = token
        self._decode(batch, len(ids), position)

    def _decode_embeddings(self, chunk: Any, n_tokens: int, position: int) -> None:
        """As mtmd_helper_decode_image_chunk does."""
        rows = self._mtmd.mtmd_get_output_embd(self._vision)
        batch = self._lib.llama_batch_init(n_tokens, self._model.n_embd, 1)
        ctypes.memmove(batch.embd, rows, n_tokens * self._model.n_embd * 4)
        non_causal = self._mtmd.mtmd_decode_use_non_causal(self._vision, chunk)
        self._lib.llama_set_causal_attn(self._context, not non_causal)
        self._decode(batch, n_tokens, position)
        self._lib.llama_set_causal_attn(self._context, True)

    def _decode(self, batch: Any, n_tokens: int, position: int) -> None:
        batch.n_tokens = n_tokens
        for i in range(n_tokens):
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == n_tokens - 1
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if code != 0:
            raise BackendError(f"cannot decode {n_tokens} tokens (code {code})")

    def _likeliest(self) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._model.n_vocab,)).argmax())


class _Clock:
    """Milliseconds by stage, each from the end of the one before."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._begin_s = self._last_s = perf_counter()

    def stage(self, name: str) -> None:
        now_s = perf_counter()
        self.ms[name] = self.ms.get(name, 0.0) + 1000 * (now_s - self._last_s)
        self._last_s = now_s

    def total_ms(self) -> float:
        return 1000 * (perf_counter() - self._begin_s)
