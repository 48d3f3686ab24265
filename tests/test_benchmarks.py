"""The benchmarks' own logic, on made-up results: what got worse, and the rendered page."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def measured(encode: float, decode_percent: float, *, peer: bool = True) -> dict[str, Any]:
    """What `edgevlm bench --json` writes, as far as the check reads it."""
    return {
        "model": {"name": "random-moondream2"},
        "stages": {"encode": 1.0},
        "ratios": {"encode": encode, "decode": 1.5} if peer else None,
        "limits": {
            "decode": {"percent": decode_percent},
            "load": {"percent": 5.0},
        },
    }


def scripted(ours: float) -> dict[str, Any]:
    """What a script writes."""
    return {
        "question": "How?",
        "peer": "mtmd f16",
        "ratios": {"CLIP": {"edgevlm int8": ours, "mtmd f16": 1.0, "torch bf16": 9.0}},
    }


def test_what_got_worse_is_named(module: Any, tmp_path: Path, capsys: Any) -> None:
    check = module("check")
    baseline, now = tmp_path / "baseline.json", tmp_path / "encode.json"
    for name, found in (("end.json", measured(5.0, 50)), ("encode.json", scripted(6.0))):
        (tmp_path / name).write_text(json.dumps(found))
    files = [str(tmp_path / "end.json"), str(now), "--baseline", str(baseline)]
    assert check.main([*files, "--update"]) == 0
    assert check.main(files) == 0
    now.write_text(json.dumps(scripted(3.0)))
    (tmp_path / "end.json").write_text(json.dumps(measured(4.5, 30)))
    assert check.main(files) == 1
    lines = capsys.readouterr().out.strip().splitlines()[-2:]
    assert lines[0].startswith("encode/CLIP/edgevlm int8: 6 → 3, 50 % worse")
    assert lines[1].startswith("bench random-moondream2/of the limit/decode: 0.5 → 0.3")
    assert check.main([*files, "--tolerance", "0.6"]) == 0


def test_without_a_peer_the_machines_limit_is_the_reference(module: Any) -> None:
    check = module("check")
    assert check.ratios(measured(5.0, 40, peer=False), "x") == {
        "bench random-moondream2/of the limit/decode": 0.4
    }


def test_another_peers_speed_is_not_ours_to_check(module: Any) -> None:
    assert module("check").ratios(scripted(6.0), "encode") == {"encode/CLIP/edgevlm int8": 6.0}


def test_results_that_the_baseline_does_not_know_are_no_success(
    module: Any, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "baseline.json").write_text('{"other/case": 1.0}')
    (tmp_path / "encode.json").write_text(json.dumps(scripted(6.0)))
    files = [str(tmp_path / "encode.json"), "--baseline", str(tmp_path / "baseline.json")]
    assert module("check").main(files) == 1
    assert "nothing to compare" in capsys.readouterr().out


def test_the_committed_baseline_is_of_the_kept_results(module: Any) -> None:
    check = module("check")
    baseline = json.loads(check.BASELINE.read_text("utf-8"))
    kept: dict[str, float] = {}
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        kept |= check.ratios(json.loads(path.read_text("utf-8")), path.stem)
    assert baseline == kept


def test_the_page_is_the_rendering_of_the_kept_results(module: Any) -> None:
    render = module("render")
    kept = render.read(render.RESULTS)
    assert render.PAGE.read_text("utf-8") == render.page(kept)
    for found in kept.values():
        assert found["machine"]["cpu"] in render.PAGE.read_text("utf-8")


def test_every_script_says_its_question_and_its_command(module: Any) -> None:
    names = module("all").scripts()
    assert {"cold_start", "end_to_end", "export", "language", "preprocess"} <= set(names)
    for name in names:
        doc = (BENCHMARKS / f"{name}.py").read_text("utf-8").split('"""')[1]
        assert doc.splitlines()[0].endswith("?"), name
        assert f"python benchmarks/{name}.py" in doc, name


def test_the_command_in_a_result_is_what_a_reader_would_type(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = module("common")._shown
    assert shown(["/home/me/benchmarks/x.py", "a", "--json", "/tmp/x.json", "-t", "2"]) == [
        "benchmarks/x.py", "a", "-t", "2",
    ]  # fmt: skip


def test_turns_are_taken_and_the_first_does_not_count(module: Any) -> None:
    calls: list[str] = []
    work = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    assert set(module("common").medians_ms(work, rounds=2)) == {"a", "b"}
    assert calls == ["a", "b"] * 3
