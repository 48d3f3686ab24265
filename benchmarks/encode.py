"""Is a picture encoded faster than by what a user would pick instead, and by how much?

Towers of random weights at real shapes (speed does not depend on the values) go through our
fp32 and int8 graphs and through libmtmd in f16 and q8_0; OpenVINO and torch in bf16 join where they
are installed. All take turns on the same picture; medians and ratios are printed.

    python benchmarks/encode.py [--tower NAME ...] [--rounds N] [--json FILE] [--cache DIR]

libmtmd needs a llama-cpp-python that was built with it (`-DLLAVA_BUILD=ON`, the package's default).
The files, 3 GB for both towers, stay in the cache directory, named as random.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import common
import llama_cpp.llama_cpp as lib
import numpy as np
from edgevlm_export import precision
from edgevlm_export.graph import Model
from numpy.typing import NDArray
from towers import TOWERS, Shape, graph, language_model, mmproj

from edgevlm import paths
from edgevlm.cancel import Cancel
from edgevlm.sessions import Session

Encode = Callable[[], Any]
PEER = "mtmd f16"


def ours(path: Path, shape: Shape, threads: int) -> Encode:
    session, cancel = Session(path, threads), Cancel()
    inputs = {"patches": picture(shape)}
    return lambda: session.run(inputs, cancel, keeps_memory=True)  # as the runtime does for a tile


def picture(shape: Shape) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (1, shape.n_patches, 3 * shape.patch_px**2), dtype=np.uint8)


def mtmd(path: Path, language: Path, shape: Shape, threads: int) -> Encode:
    """mtmd_encode_chunk alone: the picture is decoded, resized and cut beforehand."""
    import llama_cpp.mtmd_cpp as peer

    lib.llama_log_set(_on_log, ctypes.c_void_p(0))
    peer.mtmd_log_set(_on_log, ctypes.c_void_p(0))
    peer.mtmd_helper_log_set(_on_log, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(str(language).encode(), lib.llama_model_default_params())
    params = peer.mtmd_context_params_default()
    params.n_threads, params.use_gpu, params.print_timings = threads, False, False
    context = peer.mtmd_init_from_file(str(path).encode(), model, params)
    if not context:
        raise SystemExit(f"libmtmd does not take {path}")
    side = shape.image_px
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    bitmap = peer.mtmd_bitmap_init(
        side, side, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    )
    chunks = peer.mtmd_input_chunks_init()
    marker = peer.mtmd_default_marker()
    text = peer.mtmd_input_text(marker, len(marker), False, True)
    bitmaps = (peer.mtmd_bitmap_p_ctypes * 1)(bitmap)
    if peer.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) != 0:
        raise SystemExit("libmtmd does not take the picture")
    count = peer.mtmd_input_chunks_size(chunks)
    every = [peer.mtmd_input_chunks_get(chunks, n) for n in range(count)]
    (chunk,) = (c for c in every if peer.mtmd_input_chunk_get_type(c) == 1)  # 1: image
    assert peer.mtmd_input_chunk_get_n_tokens(chunk) == shape.n_patches

    def encode() -> None:
        if peer.mtmd_encode_chunk(context, chunk) != 0:
            raise SystemExit("libmtmd cannot encode the picture")

    return encode


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _: object) -> None:
    return


def openvino(path: Path, shape: Shape, threads: int) -> Encode:
    import openvino as ov

    config = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(str(path), "CPU", config)
    request = compiled.create_infer_request()
    inputs = {"patches": picture(shape)}
    return lambda: request.infer(inputs)


def torch_bf16(shape: Shape, threads: int) -> Encode:
    """transformers' tower with scaled_dot_product_attention, and torch's projector."""
    import torch
    import transformers

    hf: Any = transformers  # half of it is typed
    torch.set_num_threads(threads)
    kinds = (
        (hf.CLIPVisionConfig, hf.CLIPVisionModel)
        if shape.clip
        else (hf.SiglipVisionConfig, hf.SiglipVisionModel)
    )
    config = kinds[0](
        hidden_size=shape.width, intermediate_size=shape.ff_width, image_size=shape.image_px,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        patch_size=shape.patch_px, attn_implementation="sdpa",
        **({} if shape.clip else {"vision_use_head": False}),
    )  # fmt: skip
    model = kinds[1](config).to(torch.bfloat16).eval()
    inner, n_embd = shape.projector
    projector = torch.nn.Sequential(
        torch.nn.Linear(shape.width, inner), torch.nn.GELU(), torch.nn.Linear(inner, n_embd)
    ).to(torch.bfloat16)
    pixels = torch.zeros(1, 3, shape.image_px, shape.image_px, dtype=torch.bfloat16)

    @torch.inference_mode()
    def encode() -> Any:
        states = model(pixels).last_hidden_state
        return projector(states[:, int(shape.clip) :])

    return encode


def contenders(name: str, shape: Shape, directory: Path, threads: int) -> dict[str, Encode]:
    stem = f"random-{name.replace('/', '-').lower()}"
    whole = graph(shape).model()
    graphs = {"fp32": whole, "int8": precision.int8(whole)}
    files = {kind: _kept(_marked(directory, stem, kind, model), model.save)
             for kind, model in graphs.items()}  # fmt: skip
    found = {f"edgevlm {kind}": ours(file, shape, threads) for kind, file in files.items()}
    n_embd = shape.projector[1]
    language = _kept(directory / f"random-{n_embd}.gguf", lambda p: language_model(p, n_embd))
    for kind in ("F16", "Q8_0"):
        file = directory / f"{stem}-{kind.lower()}.gguf"
        write = partial(mmproj, shape=shape, kind=kind)
        found[f"mtmd {kind.lower()}"] = mtmd(_kept(file, write), language, shape, threads)
    peers: tuple[tuple[str, str, Callable[[], Encode]], ...] = (
        ("openvino", "OpenVINO bf16",
         lambda: openvino(files["fp32"], shape, threads)),
        ("torch", "torch bf16", lambda: torch_bf16(shape, threads)),
    )  # fmt: skip
    for module, peer, make in peers:
        if find_spec(module) is None:
            print(f"{peer} is left out: no {module} here")
        else:
            found[peer] = make()
    return found


def _marked(directory: Path, stem: str, kind: str, model: Model) -> Path:
    """The name changes with the graph, so that no older exporter is measured."""
    mark = crc32(b"".join(node.SerializeToString() for node in model.nodes))
    return directory / f"{stem}-{kind}-{mark:08x}.onnx"


def _kept(path: Path, write: Callable[[Path], None]) -> Path:
    """The file, written whole where it is not there yet."""
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        write(unfinished)
        unfinished.rename(path)
    return path


def main() -> None:
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument("--tower", nargs="*", choices=TOWERS, default=list(TOWERS))
    parser.add_argument("--cache", type=Path, default=paths.cache("random"))
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    times = {}
    for name in options.tower:
        work = contenders(name, TOWERS[name], options.cache, options.threads)
        times[f"{name}, random weights"] = common.medians_ms(work, options.rounds)
    question = "Is a picture encoded faster than by what a user would pick instead?"
    common.publish(common.result(question, PEER, times, options), options)


if __name__ == "__main__":
    main()
