"""The releases of Moondream: ids, templates, and the prompt section of bundle.json for each.

vikhyat/moondream, moondream/torch/config.py at afeb941, f74a121 and 2487c7b (TokenizerConfig), and
for 2024 moondream/moondream.py. config.json may put other ids in their place, as the reference
allows.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from edgevlm.errors import BundleError

from .checkpoint import Checkpoint

RELEASES = ("2024-03-04", "2024-05-20", "2025-01-09", "2025-03-27", "2025-06-21")  # the first of
ONE_CROP, GRID, LINEAR_SIZES, LOG_SIZES, STARMIE = RELEASES  # those that are alike

_CONTENT = "{content}"
_GPT2_CAPTIONS = {
    "short": [198, 198, 16438, 8305, 25],
    "normal": [198, 198, 24334, 1159, 25],
    "long": [198, 198, 14617, 8305, 25],
}
_GPT2: dict[str, Any] = {
    "bos_id": 50256,
    "eos_id": 50256,
    "templates": {
        "caption": _GPT2_CAPTIONS,
        "query": {"prefix": [198, 198, 24361, 25], "suffix": [198, 198, 33706, 25]},
        "detect": {"prefix": [198, 198, 47504, 25], "suffix": [628]},
        "point": {"prefix": [198, 198, 12727, 25], "suffix": [628]},
    },
}
TOKENS: dict[str, dict[str, Any]] = {  # TokenizerConfig of each release
    LINEAR_SIZES: {
        **_GPT2,
        "templates": {
            **_GPT2["templates"],
            "caption": {key: _GPT2_CAPTIONS[key] for key in ("short", "normal")},
        },
    },
    LOG_SIZES: _GPT2,
    STARMIE: {
        "bos_id": 0,
        "eos_id": 0,
        "answer_id": 3,
        "thinking_id": 4,
        "coord_id": 5,
        "size_id": 6,
        "start_ground_points_id": 7,
        "end_ground_id": 9,
        "templates": {
            "caption": {
                "short": [1, 32708, 2, 12492, 3],
                "normal": [1, 32708, 2, 6382, 3],
                "long": [1, 32708, 2, 4059, 3],
            },
            "query": {"prefix": [1, 15381, 2], "suffix": [3]},
            "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
            "point": {"prefix": [1, 2581, 2], "suffix": [3]},
        },
    },
}


def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(checkpoint.tokenizer))
    except Exception as error:  # the library raises nothing narrower
        raise BundleError(f"{checkpoint.tokenizer} is not a tokenizer: {error}") from error


def tokens(
    checkpoint: Checkpoint, release: str, declared: dict[str, Any], ids: dict[str, int]
) -> dict[str, Any]:
    """Ids and templates: the release's, and what config.json puts in their place."""
    if release in (ONE_CROP, GRID):
        end = ids.get("<|endoftext|>")
        if end is None:
            raise BundleError(f"{checkpoint.tokenizer} has no <|endoftext|>: it is another model's")
        return {"bos_id": end, "eos_id": end}
    own = declared.get("tokenizer") or {}
    templates = {**TOKENS[release]["templates"], **(own.get("templates") or {})}
    merged = {**TOKENS[release], **own, "templates": templates}
    if not _well_formed(merged):
        where = checkpoint.directory / "config.json"
        raise BundleError(f"{where}: the tokenizer section holds something else than token ids")
    return merged


def _well_formed(tokens: dict[str, Any]) -> bool:
    """Ids are numbers, and each prompt is made of lists of them; a task other than query may be
    missing (null)."""
    templates = tokens["templates"]
    tasks = [templates["query"], *(templates[t] for t in ("detect", "point") if templates[t])]
    try:
        runs = [task[part] for task in tasks for part in ("prefix", "suffix")]
        runs += (templates["caption"] or {}).values()
        ids = [value for key, value in tokens.items() if key.endswith("_id")]
        return all(type(value) is int and value >= 0 for run in (*runs, ids) for value in run)
    except (TypeError, KeyError, AttributeError):
        return False


def check_ids(checkpoint: Checkpoint, release: str, tokens: dict[str, Any], n_vocab: int) -> None:
    """The trap: snapshots of 2025-06-21 hold GPT-2's tokenizer.json, and the code that came with
    them fetched another one. With the wrong file every word becomes a different one."""
    if release in (ONE_CROP, GRID):
        return
    templates = tokens["templates"]
    used = [*_flat(templates), tokens["bos_id"], tokens["eos_id"]]
    if max(used) >= n_vocab:
        raise BundleError(f"the prompts use token {max(used)}; the model has {n_vocab} rows")
    prefix: list[int] = templates["query"]["prefix"]
    word, expected = ("query", prefix[1:-1]) if release == STARMIE else ("\n\nQuestion:", prefix)
    found = tokenizer(checkpoint).encode(word, add_special_tokens=False).ids
    if found == expected:
        return
    remedy = "it belongs to another model; give the right one with --tokenizer"
    if release == STARMIE:
        remedy = (
            "this release reads and writes moondream/starmie-v1, while its snapshot still holds "
            "the old GPT-2 file: give starmie's tokenizer.json with --tokenizer"
        )
    raise BundleError(
        f"{checkpoint.tokenizer} makes {found} of {word!r}; the model was trained with "
        f"{expected}: {remedy}"
    )


def _flat(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    inner = value.values() if isinstance(value, dict) else value or ()
    return [item for part in inner for item in _flat(part)]


def prompt_section(release: str, tokens: dict[str, Any]) -> dict[str, Any]:
    """Prompts as lists of id runs and texts; texts on two sides of ids are tokenized apart."""
    common: dict[str, Any] = {
        "bos": False,  # it stands in the prompts, or in the picture's slot
        "image_token": "",
        "bos_id": tokens["bos_id"],
        "eos_id": tokens["eos_id"],
        "text_only": release == STARMIE,
        "places": release == STARMIE,
        "answer": [_CONTENT if release == STARMIE else f" {_CONTENT}"],
    }
    if "templates" not in tokens:
        captions = {"short": "Short caption", "normal": "Caption", "long": "Caption"}
        return {
            **common,
            "query": [f"\n\nQuestion: {_CONTENT}\n\nAnswer:"],
            "caption": {length: [f"\n\n{text}:"] for length, text in captions.items()},
        }
    templates = tokens["templates"]
    asked = f" {_CONTENT}" if release == LOG_SIZES else _CONTENT
    named = _CONTENT if release == LINEAR_SIZES else f" {_CONTENT}"
    query = templates["query"]
    # The reference appends the suffix twice since it can reason; one copy would be
    # what it was trained with. To try that, take the last run out of bundle.json.
    copies = 2 if release == STARMIE else 1
    prompt = {
        **common,
        "query": [query["prefix"], asked, *[query["suffix"]] * copies],
        "caption": {length: [ids] for length, ids in (templates["caption"] or {}).items()},
        **{
            task: [templates[task]["prefix"], named, templates[task]["suffix"]]
            for task in ("detect", "point")
            if templates.get(task)
        },
        "gaze": [f"\n\nPoint:{_CONTENT} gaze\n\n"],
    }
    if release == STARMIE:
        prompt["think"] = [query["prefix"], asked, [*query["suffix"], tokens["thinking_id"]]]
        prompt["thinking_ids"] = {
            "end": tokens["answer_id"],
            "then": query["suffix"],
            "coordinate": tokens["coord_id"],
            "chunks": [tokens["start_ground_points_id"], tokens["end_ground_id"]],
            "banned": [tokens["eos_id"], tokens["size_id"]],
        }
    return prompt


def generation_section(release: str, tokens: dict[str, Any]) -> dict[str, Any]:
    return {
        "stop_token_ids": [tokens["eos_id"]],
        "banned_token_ids": [tokens["answer_id"]] if release == STARMIE else [],
        "max_tokens": 256 if release in (ONE_CROP, GRID) else 768,
        "repeat_penalty": 1.0,
    }
