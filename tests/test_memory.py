"""The memory plan: pure arithmetic first, then peaks of real processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import tiny
from conftest import EXAMPLES
from edgevlm_export import export
from hypothesis import given
from hypothesis import strategies as st

from edgevlm import device, hub, memory, plan, probe, registry
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import DeviceError
from edgevlm.memory import Needs, Way
from edgevlm.settings import Settings

MB = 10**6
NEEDS = Needs(
    libraries_bytes=100 * MB,
    opening_bytes=400 * MB,
    vision_bytes=300 * MB,
    working_bytes=50 * MB,
    language_bytes=500 * MB,
    prefill_bytes=0,
    repacks=True,
    reads_plain=False,
    buffer_bytes=20 * MB,
    cache_bytes_a_token=80_000,
    score_bytes_a_token=20_000,
    n_ctx=2048,
    least_n_ctx=1024,
)
RESIDENT = Way(apart=False, prefill=True, repacked=True, n_ctx=2048, first_n_ctx=1024)
APART = replace(RESIDENT, apart=True, prefill=False)
SMALLEST = replace(APART, n_ctx=1024)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("memory")
    tiny.llava(directory / "checkpoint", seed=1)
    return open_bundle(export(directory / "checkpoint", directory / "tiny", language="q8_0"))


def test_ways_come_in_the_order_of_what_they_cost_the_user() -> None:
    assert memory.ways(NEEDS) == [RESIDENT, APART]
    plain = [replace(RESIDENT, repacked=False), replace(APART, repacked=False)]
    assert memory.ways(replace(NEEDS, repacks=False)) == plain
    without = replace(RESIDENT, prefill=False)
    assert memory.ways(replace(NEEDS, prefill_bytes=MB)) == [RESIDENT, without, APART]


def test_weights_stay_plain_where_llama_reads_prompts_from_them_sooner() -> None:
    reading = replace(NEEDS, reads_plain=True)
    assert [way.repacked for way in memory.ways(reading)] == [False, False]
    graph_reads = memory.ways(replace(reading, prefill_bytes=MB))
    assert [way.repacked for way in graph_reads] == [True, False, False]


def test_a_prefill_graph_that_nothing_opens_is_no_part_of_the_plan(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_graph = replace(memory.of_bundle(bundle), prefill_bytes=MB)
    monkeypatch.setattr(memory, "of_bundle", lambda *_, **__: has_graph)
    with_graph, without = (plan.make(bundle, Settings(prefill=name)) for name in ("auto", "gguf"))
    assert with_graph.peak_bytes - without.peak_bytes == MB
    assert not without.gives_up


def test_a_prefill_graph_that_does_not_fit_is_left_out() -> None:
    needs = replace(NEEDS, prefill_bytes=600 * MB)
    without = memory.peak_bytes(NEEDS, RESIDENT)
    assert memory.peak_bytes(needs, RESIDENT) == without + 600 * MB
    assert memory.fitting(needs, without + 600 * MB) == RESIDENT
    assert memory.fitting(needs, without + 599 * MB) == replace(RESIDENT, prefill=False)
    assert memory.least_bytes(needs) == memory.least_bytes(NEEDS)


def test_a_peak_is_the_sum_of_what_meets() -> None:
    grown = (80_000 * 2048 + 80_000 * 1024) / MB  # what it held is kept aside meanwhile
    assert memory.peak_bytes(NEEDS, RESIDENT) == (100 + 300 + 50 + 500 + 20 + grown) * MB
    assert memory.peak_bytes(NEEDS, APART) == (100 + 500 + 20 + grown) * MB
    never_grown = 100_000 * 1024 / MB
    assert memory.peak_bytes(NEEDS, SMALLEST) == (100 + 500 + 20 + never_grown) * MB
    scores = replace(NEEDS, score_bytes_a_token=50_000)
    assert memory.peak_bytes(scores, APART) == (100 + 500 + 20 + 130_000 * 2048 / MB) * MB
    larger_tower = replace(NEEDS, vision_bytes=900 * MB)
    assert memory.peak_bytes(larger_tower, APART) == (100 + 900 + 50) * MB
    opens_slowly = replace(NEEDS, opening_bytes=5000 * MB)
    assert memory.peak_bytes(opens_slowly, RESIDENT) == (100 + 5000) * MB


@pytest.mark.parametrize(
    ("bound_mb", "way"),
    [
        (1216, RESIDENT),
        (1215, APART),
        (866, APART),
        (865, replace(APART, n_ctx=1024 + 3 * 256)),
        (846, replace(APART, n_ctx=1024 + 3 * 256)),
        (805, replace(APART, n_ctx=1024 + 256)),
        (804, SMALLEST),
        (723, SMALLEST),
        (722, None),
        (0, None),
        (1, None),
    ],
)
def test_the_fastest_way_within_the_bound_is_taken(bound_mb: int, way: Way | None) -> None:
    assert memory.fitting(NEEDS, bound_mb * MB) == way


@given(
    st.builds(
        Needs,
        **{
            name: st.integers(0, 10**10)
            for name in ("libraries_bytes", "vision_bytes", "working_bytes", "language_bytes")
        },
        opening_bytes=st.integers(0, 10**10),
        prefill_bytes=st.integers(0, 10**10),
        repacks=st.booleans(),
        reads_plain=st.booleans(),
        buffer_bytes=st.integers(0, 10**9),
        cache_bytes_a_token=st.integers(0, 10**6),
        score_bytes_a_token=st.integers(0, 10**6),
        n_ctx=st.integers(512, 10**5),
        least_n_ctx=st.integers(1, 512),
    ),
    st.integers(0, 10**11),
)
def test_what_is_chosen_fits_and_nothing_fits_below_the_least(needs: Needs, bound: int) -> None:
    way = memory.fitting(needs, bound)
    assert (way is None) == (memory.least_bytes(needs) > bound)
    if way is not None:
        assert memory.peak_bytes(needs, way) <= bound
        assert needs.least_n_ctx <= way.n_ctx <= needs.n_ctx
        assert way.n_ctx == needs.n_ctx or way.apart


def test_parts_that_a_bundle_adds_are_counted(bundle: Bundle) -> None:
    before = memory.of_bundle(bundle)

    def with_file(name: str, n_bytes: int) -> Needs:
        files = {**bundle.manifest["files"], name: {"bytes": n_bytes, "sha256": ""}}
        return memory.of_bundle(Bundle(bundle.path, {**bundle.manifest, "files": files}))

    assert with_file("region.npz", MB).language_bytes == before.language_bytes + MB
    assert before.prefill_bytes == 0
    graph = with_file("prefill.data", 10 * MB)
    keys_and_values = graph.cache_bytes_a_token * graph.n_ctx
    assert graph.prefill_bytes == 10.5 * MB + 2 * keys_and_values
    assert replace(graph, prefill_bytes=0) == before
    assert with_file("tokenizer.json", MB).language_bytes > before.language_bytes + MB


def test_keys_and_values_follow_from_the_shape(bundle: Bundle) -> None:
    n_layers, n_kv_heads, head, n_heads, batch = 3, 2, 16, 4, 512
    values = n_layers * n_kv_heads * 2 * head
    normal = memory.of_bundle(bundle)
    assert normal.cache_bytes_a_token == values * 2
    assert normal.score_bytes_a_token == n_heads * batch * 4
    assert memory.of_bundle(bundle, precise=True).cache_bytes_a_token == values * 4


def test_weights_are_repacked_where_llama_can(bundle: Bundle) -> None:
    assert memory.of_bundle(bundle).repacks
    assert not memory.of_bundle(bundle, extra_buffers=False).repacks
    plain = {**bundle.manifest, "quantization": {"vision": "fp32", "language": "f16"}}
    assert not memory.of_bundle(Bundle(bundle.path, plain)).repacks


@pytest.mark.parametrize(
    ("machine", "kind", "plain"),
    [("x86_64", "q4_k_m", True), ("x86_64", "q4_0", False), ("aarch64", "q4_k_m", False)],
)
def test_what_is_read_plain_was_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, machine: str, kind: str, plain: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    manifest = {**bundle.manifest, "quantization": {"vision": "fp32", "language": kind}}
    assert memory.of_bundle(Bundle(bundle.path, manifest)).reads_plain is plain


def test_a_model_that_was_not_fetched_yet_has_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = memory.of_bundle(hub.packaged(registry.BUILT_IN))
    assert 200 * MB < memory.least_bytes(needs) < 600 * MB


def test_a_larger_checkpoint_needs_more() -> None:
    sizes = [
        memory.least_bytes(memory.of_checkpoint(n, "q4_k_m")) for n in (10**8, 10**9, 7 * 10**9)
    ]
    assert sizes == sorted(sizes)
    kinds = [memory.installed_bytes(2 * 10**9, kind) for kind, _ in memory.smaller_kinds("f16")]
    assert kinds == sorted(kinds, reverse=True)
    assert memory.smaller_kinds("q4_0") == []


def test_the_plan_says_what_it_gives_up(bundle: Bundle) -> None:
    assert plan.make(bundle, Settings()).gives_up == ""
    least = memory.least_bytes(memory.of_bundle(bundle))
    small = plan.make(bundle, Settings(max_ram=least))
    assert small.way.apart
    assert small.peak_bytes <= small.bound_bytes == least
    assert "take turns" in str(small)
    json.dumps(small.as_dict())


def test_what_cannot_fit_is_refused_with_numbers_and_remedies(bundle: Bundle) -> None:
    big = {**bundle.manifest["files"], "language.gguf": {"bytes": 4 * 10**9, "sha256": ""}}
    large = Bundle(bundle.path, {**bundle.manifest, "files": big})
    with pytest.raises(DeviceError, match=r"tiny needs about 4\.\d+GB .* max_ram allows 3GB") as at:
        plan.make(large, Settings(max_ram=3 * 10**9))
    assert re.search(
        r"allow 4\.\d+GB, or export it with --llm q5_k_m \(2\.\d+GB\), or take ", str(at.value)
    )
    with pytest.raises(DeviceError, match=r"allow \d+MB$"):  # nothing is that small
        plan.make(bundle, Settings(max_ram=1))


def test_without_a_limit_the_bound_is_what_the_machine_can_lend(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = memory.least_bytes(memory.of_bundle(bundle))
    monkeypatch.setattr(device, "rss_bytes", lambda: 1000)
    monkeypatch.setattr(device, "available_memory_bytes", lambda: least - 1001)
    with pytest.raises(DeviceError, match=r"close programs, insist with --max-ram"):
        plan.make(bundle, Settings())
    monkeypatch.setattr(device, "available_memory_bytes", lambda: least - 1000)
    assert plan.make(bundle, Settings()).bound_bytes == least
    monkeypatch.setattr(device, "available_memory_bytes", lambda: 0)
    plan.make(bundle, Settings(max_ram=least))  # whoever insists is believed


def test_llama_that_cannot_repack_is_not_planned_to(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "verdict", lambda: probe.Verdict(False, "it died"))
    made = plan.make(bundle, Settings())
    assert not made.way.repacked
    assert made.gives_up == ""


RUNS = """
import json, sys
from pathlib import Path
import numpy as np
from edgevlm import device
from edgevlm.cancel import Cancel
from edgevlm.sessions import Session
session, cancel = Session(Path(sys.argv[1]), 2), Cancel()
held = [device.rss_bytes()]
for _ in range(4):
    session.run({"patches": np.zeros((1, 1, 202800), np.uint8)}, cancel)
    held.append(device.rss_bytes())
print(json.dumps([*held, device.peak_rss_bytes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process holds from /proc")
@pytest.mark.parametrize("tier", ["", "avx2"])
def test_what_a_run_took_goes_back_to_the_system(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tier:
        monkeypatch.setenv("EDGEVLM_CPU", tier)  # ONNX Runtime's own layers
    graph = hub.packaged(registry.BUILT_IN).file("vision.onnx")
    child = subprocess.run(
        [sys.executable, "-c", RUNS, str(graph)], capture_output=True, check=False
    )
    assert child.returncode == 0, child.stderr
    opened, *held, peak = json.loads(child.stdout)
    assert max(held) < opened + 20 * MB < peak


CHILD = """
import json, sys
import edgevlm
from edgevlm import device
model, photo, max_ram = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None
with edgevlm.load(model, max_ram=max_ram) as vlm:
    texts, open_at_the_end, held = [], [], []
    for _ in range(2):
        texts.append(vlm.describe(photo, max_tokens=12).text)
        open_at_the_end.append(vlm._encoder._session is not None)
        held.append(device.rss_bytes())
    print(json.dumps({
        "texts": texts, "open": open_at_the_end, "held": held,
        "peak": device.peak_rss_bytes(), "plan": vlm.plan.peak_bytes, "apart": vlm.plan.way.apart,
    }))
"""


def in_a_child(model: str, max_ram: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model, str(EXAMPLES / "cat.jpg"), str(max_ram)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("model", ["tiny", "nano"])
def test_real_peaks_stay_within_the_plan_and_the_answer_is_the_same(
    bundle: Bundle, model: str
) -> None:
    opened = bundle if model == "tiny" else open_bundle(hub.built_in(model))
    path = str(opened.path)
    whole = in_a_child(path)
    assert not whole["apart"]
    assert whole["open"] == [True, True]
    assert whole["peak"] <= whole["plan"]
    needs = memory.of_bundle(opened, extra_buffers=probe.verdict().extra_buffers)
    apart = in_a_child(path, memory.peak_bytes(needs, memory.ways(needs)[1]))
    assert apart["apart"]
    assert apart["open"] == [False, False]
    assert apart["peak"] <= apart["plan"] < whole["plan"]
    assert apart["texts"] == whole["texts"]
    if model == "nano":  # whose session is large enough to be seen
        assert apart["held"][0] < whole["held"][0] - 15 * MB
        assert apart["peak"] < whole["peak"]
