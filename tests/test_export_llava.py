"""The LLaVA exporter against transformers: same weights, pixels and tokens → same numbers."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from edgevlm_export import export
from gguf import GGUFReader
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
)

from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleError

# Embeddings and logits have a scale of about 1; the two sides add the same float32 products in
# another order, and ours folds the normalisation into the first matrix. Seen: below 2e-5.
TOLERANCE = 1e-4
TEXT = "USER: What is in the picture? Größe 写真 😀 ASSISTANT:"
_PROCESSORS = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}


def embeddings(bundle: Path, patches: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        bundle / "vision.onnx", providers=["CPUExecutionProvider"]
    )
    return session.run(["embeddings"], {"patches": patches})[0]


def cut(pixels: np.ndarray, patch_px: int) -> np.ndarray:
    """uint8 [3, S, S] → uint8 [1, n_patches, 3·P·P], channel-major inside a patch."""
    n = pixels.shape[1] // patch_px
    blocks = pixels.reshape(3, n, patch_px, n, patch_px).transpose(1, 3, 0, 2, 4)
    return blocks.reshape(1, n * n, -1)


def vision_pair(
    checkpoint: Path, bundle: Path, model: LlavaForConditionalGeneration, tower: str
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of one random picture: ours, transformers'."""
    picture = np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8)
    processor = _PROCESSORS[tower].from_pretrained(checkpoint)
    pixels = processor(picture, return_tensors="pt").pixel_values
    raw = processor(picture, do_rescale=False, do_normalize=False).pixel_values[0]
    with torch.no_grad():
        expected = model.get_image_features(
            pixels,
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            output_hidden_states=True,  # transformers 5.23 takes layer 0 for "none wanted"
        ).pooler_output[0]
    patch_px = json.loads((bundle / "bundle.json").read_text())["image"]["patch_px"]
    return embeddings(bundle, cut(np.asarray(raw, np.uint8), patch_px))[0], expected.numpy()


class Gguf:
    """A language file in llama.cpp: float32 cache, no flash attention, one thread."""

    def __init__(self, path: Path) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.use_extra_bufts = False
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, path
        self.vocab = llama.llama_model_get_vocab(self.model)

    def close(self) -> None:
        llama.llama_model_free(self.model)

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [len(ids), n_vocab]"""
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama.llama_init_from_model(self.model, params)
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        assert llama.llama_decode(context, batch) == 0
        n_vocab = llama.llama_vocab_n_tokens(self.vocab)
        found = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), n_vocab)).copy()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        return found

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = llama.llama_token_to_piece(self.vocab, token, buffer, 64, 0, True)
        return buffer.raw[:length]


@pytest.fixture
def gguf() -> Iterator[dict[str, Gguf]]:
    opened: dict[str, Gguf] = {}
    yield opened
    for file in opened.values():
        file.close()


def text_pair(
    bundle: Path, model: LlavaForConditionalGeneration, gguf: dict[str, Gguf]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits after every token of TEXT: ours, transformers'."""
    file = gguf.setdefault(str(bundle), Gguf(bundle / "language.gguf"))
    ids = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(TEXT).ids
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return file.logits(ids), expected


CASES = {
    "clip llama": {"tower": "clip", "text": "llama"},
    "clip phi3": {"tower": "clip", "text": "phi3"},
    "siglip llama": {"tower": "siglip", "text": "llama"},
    "siglip llama-3 full": {
        "tower": "siglip",
        "text": "llama",
        "prompt": "llama-3",
        "config": {"vision_feature_select_strategy": "full"},
    },
    "clip full, last layer": {
        "config": {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    },
    "clip before any layer": {"config": {"vision_feature_layer": 0}},
    "clip layer counted from the front": {"config": {"vision_feature_layer": 2}},
    "clip several layers, no projector bias": {
        "config": {"vision_feature_layer": [-3, -1], "multimodal_projector_bias": False}
    },
    "clip with erf gelu and other shapes": {
        "vision": {"hidden_act": "gelu", "num_attention_heads": 3, "layer_norm_eps": 1e-3},
        "image_px": 42,
        "patch_px": 7,
    },
    "llama without grouped heads, with biases": {
        "language": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    },
    "llama with wide heads": {"language": {"head_dim": 32, "rms_norm_eps": 1e-3}},
    "llama, linear rope": {
        "language": {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
        }
    },
    "llama, llama3 rope": {
        "language": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        }
    },
    "llama with tied head": {"language": {"tie_word_embeddings": True}},
    "phi3 with tied head": {"text": "phi3", "language": {"tie_word_embeddings": True}},
    "phi3, other shapes": {
        "text": "phi3",
        "language": {"num_key_value_heads": 1, "hidden_size": 96, "num_hidden_layers": 1},
    },
    "phi3, partial rope": {
        "text": "phi3",
        "language": {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_equal_transformers(case: str, tmp_path: Path, gguf: dict[str, Gguf]) -> None:
    options = {"tower": "clip", **CASES[case]}
    model = tiny.llava(tmp_path / "in", **options)
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    for ours, expected in (
        vision_pair(tmp_path / "in", bundle, model, options["tower"]),
        text_pair(bundle, model, gguf),
    ):
        assert ours.shape == expected.shape
        assert expected.std() > 0.3  # a flat reference would hide mistakes
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)
    assert ours.argmax(-1).tolist() == expected.argmax(-1).tolist()
    open_bundle(bundle)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk(dtype: torch.dtype, tmp_path: Path, gguf: dict[str, Gguf]) -> None:
    model = tiny.llava(tmp_path / "in", dtype=dtype)
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    for ours, expected in (
        vision_pair(tmp_path / "in", bundle, model, "clip"),
        text_pair(bundle, model, gguf),
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_f16_language_keeps_f16_weights_exactly(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", dtype=torch.float16)
    bundle = export(tmp_path / "in", tmp_path / "out")
    found = {tensor.name: tensor.data for tensor in GGUFReader(bundle / "language.gguf").tensors}
    stored = load_file(tmp_path / "in" / "model.safetensors")
    down = stored["language_model.model.layers.1.mlp.down_proj.weight"].numpy()
    assert found["blk.1.ffn_down.weight"].dtype == np.float16
    np.testing.assert_array_equal(found["blk.1.ffn_down.weight"], down)
    assert found["blk.1.attn_norm.weight"].dtype == np.float32


@pytest.mark.parametrize("names", tiny.SCHEMES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_every_naming_scheme_gives_the_same_files(names: str, tower: str, tmp_path: Path) -> None:
    tiny.llava(tmp_path / "plain", tower)
    tiny.llava(tmp_path / "named", tower, names=names)
    plain = export(tmp_path / "plain", tmp_path / "a")
    named = export(tmp_path / "named", tmp_path / "b")
    for file in ("vision.onnx", "language.gguf"):
        assert (plain / file).read_bytes() == (named / file).read_bytes()


def test_shards_give_the_same_files(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "one")
    tiny.llava(tmp_path / "many", shard="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one = export(tmp_path / "one", tmp_path / "a")
    many = export(tmp_path / "many", tmp_path / "b")
    for file in ("vision.onnx", "language.gguf"):
        assert (one / file).read_bytes() == (many / file).read_bytes()


def test_tiles_are_independent_and_their_number_is_free(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    bundle = export(tmp_path / "in", tmp_path / "out")
    patches = np.random.default_rng(2).integers(0, 256, (3, 16, 588), np.uint8)
    together = embeddings(bundle, patches)
    alone = np.concatenate([embeddings(bundle, tile[np.newaxis]) for tile in patches])
    # another batch size may take another GEMM blocking
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_layers_behind_the_feature_layer_are_not_written(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", config={"vision_feature_layer": -3})
    bundle = export(tmp_path / "in", tmp_path / "out")
    written = (bundle / "vision.onnx").read_bytes()
    assert b"encoder.layers.1." in written
    assert b"encoder.layers.2." not in written
    assert b"post_layernorm" not in written


def test_config_without_the_reference_defaults(tmp_path: Path, gguf: dict[str, Gguf]) -> None:
    """transformers 4 left defaults out of config.json (llava-1.5's names hardly any size)."""
    model = tiny.llava(
        tmp_path / "in", vision={"num_attention_heads": 12}, language={"rms_norm_eps": 1e-6}
    )
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    for key in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        del config["vision_config"][key]
    for key in ("rms_norm_eps", "rope_parameters", "head_dim", "hidden_act"):
        del config["text_config"][key]
    for key in ("vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"):
        del config[key]
    file.write_text(json.dumps(config))
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    for ours, expected in (
        vision_pair(tmp_path / "in", bundle, model, "clip"),
        text_pair(bundle, model, gguf),
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prompt", ["vicuna", "phi-3", "llama-3"])
def test_pieces_give_back_the_bytes(prompt: str, tmp_path: Path, gguf: dict[str, Gguf]) -> None:
    tiny.llava(tmp_path / "in", prompt=prompt)
    bundle = export(tmp_path / "in", tmp_path / "out")
    file = gguf.setdefault("it", Gguf(bundle / "language.gguf"))
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    # a SentencePiece model puts a space in front, which its decoder takes off again
    assert b"".join(map(file.piece, ids)).decode().removeprefix(" ") == TEXT
    for token in tokenizer.get_added_tokens_decoder():
        assert file.piece(token).decode() == tokenizer.id_to_token(token)


@pytest.mark.parametrize(
    ("prompt", "stops", "bos"),
    [
        ("vicuna", ["</s>"], "<s>"),
        ("phi-3", ["<|end|>", "<|endoftext|>", "<|assistant|>", "</s>"], "<s>"),
        ("llama-3", ["<|eot_id|>", "<|end_of_text|>"], "<|begin_of_text|>"),
    ],
)
def test_prompt_is_recognised(
    prompt: str, stops: list[str], bos: str, tmp_path: Path, gguf: dict[str, Gguf]
) -> None:
    tiny.llava(tmp_path / "in", prompt=prompt)
    bundle = export(tmp_path / "in", tmp_path / "out")
    manifest = json.loads((bundle / "bundle.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in stops]
    assert set(manifest["generation"]["stop_token_ids"]) == set(ids)
    assert manifest["prompt"]["bos"] is True
    file = gguf.setdefault("it", Gguf(bundle / "language.gguf"))
    assert llama.llama_vocab_bos(file.vocab) == tokenizer.token_to_id(bos)
    assert llama.llama_vocab_eos(file.vocab) == ids[0]


def test_prompt_without_evidence_must_be_named(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").unlink()
    with pytest.raises(BundleError, match=r"prompt=: .*phi-3, llama-3, .*vicuna"):
        export(tmp_path / "in", tmp_path / "out")
    bundle = export(tmp_path / "in", tmp_path / "out", prompt="vicuna")
    assert json.loads((bundle / "bundle.json").read_text())["prompt"]["generate"] == "ASSISTANT:"


def image_section(checkpoint: Path, out: Path, **options: str) -> dict[str, object]:
    return json.loads((export(checkpoint, out, **options) / "bundle.json").read_text())["image"]


def test_image_section_follows_the_processor(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    crop = image_section(tmp_path / "in", tmp_path / "a")
    assert crop == {
        "fit": "crop",
        "size_px": 56,
        "patch_px": 14,
        "channels_first": True,
        "resample": "bicubic",
        "fill": [122, 116, 104],  # LLaVA's int(mean · 255)
        "n_tokens": 16,
        "shortens": True,
    }
    assert image_section(tmp_path / "in", tmp_path / "b", fit="pad") == {**crop, "fit": "pad"}
    size = {"height": 56, "width": 56}
    (tmp_path / "in" / "preprocessor_config.json").unlink()
    LlavaImageProcessorPil(
        size={"shortest_edge": 56}, crop_size=size, do_pad=True, resample=Image.Resampling.LANCZOS
    ).save_pretrained(tmp_path / "in")
    padded = image_section(tmp_path / "in", tmp_path / "c")
    assert padded == {**crop, "fit": "pad", "resample": "lanczos"}


def test_processor_config_of_transformers_5(tmp_path: Path) -> None:
    """A processor saved as a whole keeps the image part inside processor_config.json."""
    tiny.llava(tmp_path / "in", "siglip")
    alone = tmp_path / "in" / "preprocessor_config.json"
    whole = {"image_processor": json.loads(alone.read_text()), "processor_class": "LlavaProcessor"}
    expected = image_section(tmp_path / "in", tmp_path / "a")
    alone.unlink()
    (tmp_path / "in" / "processor_config.json").write_text(json.dumps(whole))
    assert image_section(tmp_path / "in", tmp_path / "b") == expected
    assert expected["fit"] == "stretch"
    assert expected["n_tokens"] == 15  # "default" is literal: SigLIP has no CLS and loses a patch


def test_the_licence_comes_from_the_model_card(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    bundle = export(tmp_path / "in", tmp_path / "out")
    assert json.loads((bundle / "bundle.json").read_text())["licence"] == "apache-2.0"


def test_a_very_long_context_is_cut_to_what_pictures_need(tmp_path: Path) -> None:
    tiny.llava(tmp_path / "in", language={"max_position_embeddings": 131072})
    bundle = export(tmp_path / "in", tmp_path / "out", language="f32")
    assert json.loads((bundle / "bundle.json").read_text())["n_ctx"] == 8192
