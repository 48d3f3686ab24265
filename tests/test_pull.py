"""`edgevlm models`: the real huggingface_hub against a hub on this machine."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from fake_hub import COMMIT, Hub, serving

from edgevlm import fetch, pull
from edgevlm.bundle import open_bundle
from edgevlm.errors import DeviceError, HubError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "checkpoint"
    tiny.llava(path, language={"intermediate_size": 16384})  # 38 MB: see the cut connection
    return path


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    with serving(checkpoint) as hub:
        yield hub


class Machine:
    """A user's machine: its own caches, and commands that see only the hub on 127.0.0.1."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.models, self.hf_home = home / "models", home / "hf"
        self.environment = {
            **os.environ,
            "EDGEVLM_MODELS": str(self.models),
            "HF_HOME": str(self.hf_home),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *arguments: str, before: object = None, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "edgevlm", *arguments],
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,  # type: ignore[arg-type]
        )

    def run(self, *arguments: str, before: object = None, **more: str) -> tuple[int, str, str]:
        child = self.start(*arguments, before=before, **more)
        out, err = child.communicate(timeout=120)
        return child.returncode, out, err

    def pull(self, **more: str) -> tuple[int, str]:
        code, out, err = self.run("models", "pull", "tiny/model", "--llm", "q8_0", **more)
        assert out == ""
        return code, err


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(hub, tmp_path)


def test_a_hub_id_becomes_a_model_and_no_network_is_asked_again(machine: Machine, hub: Hub) -> None:
    code, said = machine.pull()
    assert code == 0, said
    assert "GB to fetch" in said and "of memory to run" in said
    bundle = open_bundle(machine.models / "model")
    assert bundle.manifest["source"] == {"id": "tiny/model", "revision": COMMIT}
    kinds = {"vision": "int8", "language": "q8_0", "prefill": "int8"}
    assert bundle.manifest["quantization"] == kinds
    asked = hub.requests
    assert machine.pull()[0] == 0
    assert hub.requests == asked
    code, out, _ = machine.run("models", "list")
    assert code == 0 and out.startswith("model ")
    assert "smolvlm-256m" in out
    assert machine.run("models", "verify", "model")[0] == 0
    assert machine.run("models", "remove", "model")[0] == 0
    assert not (machine.models / "model").exists()
    assert machine.run("models", "remove", "model")[0] == 5


def test_a_cut_connection_resumes_where_it_broke(
    machine: Machine, hub: Hub, checkpoint: Path
) -> None:
    # the library writes pieces of 10 MB
    hub.cut_after = (checkpoint / "model.safetensors").stat().st_size * 3 // 4
    code, said = machine.pull()
    hub.cut_after = None
    if code != 0:  # the library retried by itself, or left it to the next pull
        assert code == 5 and "pull again, what came is kept" in said
        code, said = machine.pull()
    assert code == 0, said
    resumed = [asked for asked in hub.ranges if asked]
    assert resumed and int(resumed[-1].removeprefix("bytes=").split("-")[0]) > 0


def test_a_wrong_checksum_is_refused_and_the_file_removed(machine: Machine, hub: Hub) -> None:
    hub.wrong_sha256 = True
    code, said = machine.pull()
    assert code == 5
    assert "has SHA-256" in said and "it was removed" in said
    assert list(machine.hf_home.rglob("*.safetensors")) == []
    assert not (machine.models / "model").exists()
    hub.wrong_sha256 = False
    assert machine.pull()[0] == 0


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "the hub answered 401 for tiny/model@main: check HF_TOKEN"),
        (404, "the hub"),
        (503, "the hub answered 503 for tiny/model@main: try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    status: int, words: str, machine: Machine, hub: Hub
) -> None:
    hub.status = status
    code, said = machine.pull()
    assert code == 5
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_the_token_is_sent(machine: Machine, hub: Hub) -> None:
    hub.token = "secret"
    assert machine.pull()[0] == 5
    assert machine.pull(HF_TOKEN="secret")[0] == 0


def test_a_commit_is_as_good_as_a_branch(machine: Machine, hub: Hub) -> None:
    pull = ("models", "pull", f"tiny/model@{COMMIT}", "--llm", "q8_0", "--vision", "fp32")
    assert machine.run(*pull)[0] == 0
    bundle = open_bundle(machine.models / "model")
    assert bundle.manifest["source"] == {"id": "tiny/model", "revision": COMMIT}
    assert machine.run("models", "remove", "model")[0] == 0
    asked = hub.requests
    code, _, said = machine.run(*pull, HF_HUB_OFFLINE="1")
    assert code == 0, said
    bundle = open_bundle(machine.models / "model")
    assert bundle.manifest["source"] == {"id": "tiny/model", "revision": COMMIT}
    assert hub.requests == asked


def test_offline_takes_what_is_there_and_says_what_is_not(machine: Machine, hub: Hub) -> None:
    code, said = machine.pull(HF_HUB_OFFLINE="1")
    assert code == 5 and "HF_HUB_OFFLINE forbids" in said
    assert hub.requests == 0
    assert machine.pull()[0] == 0
    assert machine.run("models", "remove", "model")[0] == 0
    asked = hub.requests
    code, said = machine.pull(HF_HUB_OFFLINE="1")
    assert code == 0, said
    assert hub.requests == asked


def test_no_hub_at_all_is_one_line(machine: Machine) -> None:
    code, said = machine.pull(HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 5
    assert len(said.strip().splitlines()) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing_that_opens(machine: Machine) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    code, _, said = machine.run("models", "pull", "tiny/model", before=little_room)
    assert code == 5
    assert "File too large" in said
    assert not (machine.models / "model").exists()
    assert machine.pull()[0] == 0


def test_two_pulls_at_once_fetch_once(machine: Machine, hub: Hub) -> None:
    hub.delay = threading.Event()
    children = [machine.start("models", "pull", "tiny/model") for _ in range(2)]
    for _ in range(600):
        if hub.ranges:
            break
        time.sleep(0.05)
    time.sleep(1)  # for the other one to arrive at the lock
    hub.delay.set()
    for child in children:
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said
    assert len(hub.ranges) == 1
    open_bundle(machine.models / "model")


def test_export_takes_a_hub_id_too(machine: Machine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, said = machine.run("export", "tiny/model", "-o", str(out), "--vision", "fp32")
    assert code == 0, said
    manifest = json.loads((out / "bundle.json").read_text())
    assert manifest["source"] == {"id": "tiny/model", "revision": COMMIT}
    assert machine.run("export", "nowhere", "-o", str(tmp_path / "b"))[0] == 2


def test_a_known_model_brings_the_tokenizer_that_the_catalogue_names(
    machine: Machine, checkpoint: Path, tmp_path: Path
) -> None:
    entry = {
        "source": "tiny/model",
        "revision": COMMIT,
        "licence": "mit",
        "summary": "",
        "parameters": 10**6,
        "tokenizer": f"tiny/model@{COMMIT}",
    }
    catalogue = tmp_path / "models.json"
    catalogue.write_text(json.dumps({"models": {"tiny": entry}}))
    script = (
        "import pathlib, sys; from edgevlm import cli, fetch, pull\n"
        f"pull._CATALOGUE = pathlib.Path({str(catalogue)!r})\n"
        "pull._tokenizer = lambda source, asked=pull._tokenizer: print(asked(source)) or None\n"
        "sys.exit(cli.run(['models', 'pull', 'tiny', '--llm', 'f16', '--vision', 'fp32']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=machine.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fetched = Path(done.stdout.strip())
    assert fetched.read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    open_bundle(machine.models / "tiny")


def listing(n_bytes: int) -> fetch.Listing:
    file = fetch.File("model.safetensors", n_bytes, None, here=False)
    return fetch.Listing(fetch.Source("a/b"), COMMIT, (file,))


def test_what_cannot_fit_is_refused_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGEVLM_MODELS", str(tmp_path))
    needed = pull.plan(listing(8 * 10**9), "q4_k_m")
    assert needed.download_bytes == 8 * 10**9
    assert needed.disk_bytes == pytest.approx(8e9 + 0.45e9 + 3.55e9 * (4.9 / 8 + 1), rel=0.01)
    monkeypatch.setattr(pull.device, "total_memory_bytes", lambda: 2 * 10**9)
    with pytest.raises(
        DeviceError, match=r"about 2\.9 GB of memory at the least, the machine has 2\.0"
    ):
        pull.check(needed)
    monkeypatch.setattr(pull.device, "total_memory_bytes", lambda: 64 * 10**9)
    with pytest.raises(DeviceError, match=r"needs .* GB on the disk of"):
        pull.check(_huge(needed))


def _huge(needed: pull.Plan) -> pull.Plan:
    return pull.Plan(10**17, needed.disk_bytes, 0, 0, 0, 0.0)


def test_the_catalogue_is_sound() -> None:
    for known in pull.catalogue():
        assert fetch.parse(str(known.source)) == known.source
        for source in filter(None, (known.source, known.tokenizer)):
            assert re.fullmatch("[0-9a-f]{40}", source.revision)  # a branch or a tag can move
        assert known.parameters > 10**8
        assert pull.find(known.name) == (known.name, known.source)
    assert pull.find("Org/Model@v1") == ("model", fetch.Source("Org/Model", "v1"))
    with pytest.raises(HubError, match="give org/model"):
        pull.find("strange")
