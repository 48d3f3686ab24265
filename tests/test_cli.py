"""The command line: what goes to stdout, and every exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from edgevlm_export import export
from PIL import Image

from edgevlm.cli import cli, options, run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("cli")
    tiny.llava(directory / "checkpoint", seed=1)
    return str(export(directory / "checkpoint", directory / "tiny", language="f32"))


@pytest.fixture
def photo(tmp_path: Path, picture: Image.Image) -> str:
    picture.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch, bundle: str) -> None:
    monkeypatch.setenv("EDGEVLM_MODEL", bundle)
    monkeypatch.setenv("EDGEVLM_MAX_TOKENS", "5")


LOOPING = '{"type": "string", "pattern": "^a{40}$"}'
Captured = pytest.CaptureFixture[str]


def test_stdout_carries_the_answer_and_nothing_else(capsys: Captured, photo: str) -> None:
    assert run(["describe", photo, "--no-stream"]) == 0
    whole = capsys.readouterr()
    assert run(["describe", photo]) == 0
    streamed = capsys.readouterr()
    assert whole.out.strip() and whole.out == streamed.out
    assert whole.err == ""


def test_ask_takes_several_photos_and_a_question(capsys: Captured, photo: str) -> None:
    assert run(["ask", photo, photo, "What is it?", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["image"] == [photo, photo]
    assert record["image_tokens"] == 32


def test_json_has_the_fields_of_the_answer(capsys: Captured, photo: str) -> None:
    assert run(["describe", photo, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["image"] == photo
    assert record["model"] == "tiny"
    assert record["input_px"] == [[90, 130]]
    assert record["model_px"] == [[56, 56]]
    assert record["generated_tokens"] == 5
    assert record["timings"]["encode_ms"] > 0


def test_many_photos_are_labelled_and_a_bad_one_does_not_stop_the_others(
    capsys: Captured, photo: str, tmp_path: Path
) -> None:
    bad = tmp_path / "notes.jpg"
    bad.write_text("not a photo")
    assert run(["describe", photo, str(bad), photo]) == 3
    captured = capsys.readouterr()
    assert captured.out.count(f"{photo}: ") == 2
    assert len(captured.err.strip().splitlines()) == 1
    assert "notes.jpg" in captured.err


def test_timings_go_to_stderr(capsys: Captured, photo: str) -> None:
    assert run(["describe", photo, "--timings"]) == 0
    captured = capsys.readouterr()
    for stage in ("load", "decode", "preprocess", "encode", "prefill", "first token", "generate"):
        assert stage in captured.err
        assert f"{stage} " not in captured.out


def test_chat_answers_line_by_line(
    capsys: Captured, photo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lines").write_text("One?\n\nTwo?\n")
    with (tmp_path / "lines").open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert run(["chat", photo, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    assert records[1]["prompt_tokens"] > records[0]["prompt_tokens"]


def test_a_schema_is_read_from_a_file_or_the_command_line(
    capsys: Captured, photo: str, tmp_path: Path
) -> None:
    schema = '{"type": "boolean"}'
    (tmp_path / "schema.json").write_text(schema)
    for given in (schema, str(tmp_path / "schema.json")):
        assert run(["ask", photo, "Is it?", "--schema", given]) == 0
        assert json.loads(capsys.readouterr().out) in (True, False)


def test_info_shows_the_card(capsys: Captured, bundle: str) -> None:
    assert run(["info"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("tiny: ")
    assert "licence:" in captured.out
    assert run(["info", bundle, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


def test_doctor_names_the_parts_of_this_machine(capsys: Captured) -> None:
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"]["tier"] in report["kernels"]["available"]
    assert "CPUExecutionProvider" in report["onnxruntime"]["providers"]
    assert report["llama.cpp"]["repacking"]
    assert "nano" in report["models"]
    assert run(["doctor"]) == 0


def test_every_option_has_an_environment_variable() -> None:
    context = cli.make_context("edgevlm", ["doctor"])
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert str(parameter.envvar).startswith("EDGEVLM_"), (name, parameter.name)


def test_a_flag_can_be_set_by_its_variable(
    capsys: Captured, photo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ["ask", photo, "?", "--max-tokens", "60", "--json", "--schema", LOOPING]
    assert run(loop) == 1  # stopped in the middle of a loop, the JSON is not complete
    monkeypatch.setenv("EDGEVLM_NO_REPETITION_STOP", "1")
    assert run(loop) == 0


# Exit codes, one by one; 3 is above.


@pytest.mark.parametrize(
    "arguments",
    [
        ["describe"],
        ["describe", "--length", "tiny", "x.jpg"],
        ["describe", "x.jpg", "--top-p", "7"],
        ["describe", "x.jpg", "--schema", "{"],
        ["frobnicate"],
    ],
)
def test_2_usage(arguments: list[str]) -> None:
    assert run(arguments) == 2


def test_2_an_unenforceable_schema(photo: str) -> None:
    assert run(["ask", photo, "?", "--schema", '{"type": "integer", "minimum": 3}']) == 2


def test_4_an_unreadable_photo_gives_one_line_and_no_answer(
    capsys: Captured, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    for bad in (tmp_path / "text.jpg", tmp_path / "missing.jpg", tmp_path):
        assert run(["describe", str(bad)]) == 4
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.strip().splitlines()) == 1


def test_4_too_many_pixels(photo: str) -> None:
    assert run(["describe", photo, "--max-pixels", "1000"]) == 4


def test_5_no_such_model(capsys: Captured, photo: str) -> None:
    assert run(["describe", photo, "-m", "no-such-model"]) == 5
    assert "no-such-model" in capsys.readouterr().err


def test_6_a_cpu_tier_that_is_not_there(photo: str) -> None:
    done = _edgevlm("describe", photo, EDGEVLM_CPU="z80")
    assert done.returncode == 6
    assert "z80" in done.stderr
    assert done.stdout == ""


def test_130_interrupted(photo: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "edgevlm", "chat", photo],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("What?\n")
    child.stdin.flush()
    assert child.stdout.readline()
    time.sleep(0.5)  # the answer is out; now it waits for the next question
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130


def test_standard_input_is_a_photo_too(photo: str) -> None:
    expected = _edgevlm("describe", photo).stdout
    with Path(photo).open("rb") as stream:
        done = _edgevlm("describe", "-", stdin=stream)
    assert done.returncode == 0
    assert done.stdout == expected


def test_a_reader_that_leaves_is_no_error(photo: str) -> None:
    command = f"{sys.executable} -m edgevlm describe {photo} {photo} {photo} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == b""


def test_help_imports_none_of_the_heavy_libraries() -> None:
    program = (
        "import sys; from edgevlm.cli import run; run(['--help']); run(['describe', '--help']);"
        "heavy = {'numpy', 'onnxruntime', 'llama_cpp', 'PIL', 'tokenizers'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _edgevlm(*arguments: str, stdin: object = None, **environment: str):  # type: ignore[no-untyped-def]
    return subprocess.run(
        [sys.executable, "-m", "edgevlm", *arguments],
        stdin=stdin,  # type: ignore[call-overload]
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1.5GB", 1_500_000_000),
        ("800M", 800_000_000),
        ("2GiB", 2 << 30),
        (" 512 mib ", 512 << 20),
        ("1k", 1000),
        (".5g", 500_000_000),
        ("3.", 3),
        ("1234567", 1234567),
        ("64b", 64),
        ("1T", 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, n_bytes: int) -> None:
    assert options.size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "-1GB", "0", "0.0001", "1e9", "nan", "inf", "1,5GB", "1.5.5", "1PB", "1 G B",
     "iB", "5iB", "٣GB", "1GBps", "9" * 400, "1GB\n2GB", "0x10"],
)  # fmt: skip
def test_what_is_no_size_is_a_usage_error(capsys: Captured, photo: str, text: str) -> None:
    assert run(["describe", photo, "--max-ram", text]) == 2
    assert capsys.readouterr().out == ""


def test_a_plan_that_does_not_fit_ends_before_any_work(capsys: Captured, photo: str) -> None:
    assert run(["describe", photo, "--max-ram", "1MB"]) == 6
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "max_ram allows 1MB" in captured.err


def test_a_plan_that_gives_something_up_is_one_line(capsys: Captured, photo: str) -> None:
    assert run(["info", "--json"]) == 0
    peak = json.loads(capsys.readouterr().out)["plan"]["peak_bytes"]
    assert run(["describe", photo, "--max-ram", str(peak - 1)]) == 0
    assert capsys.readouterr().err.startswith("edgevlm: to fit into memory, image encoder and")
    assert run(["describe", photo, "--max-ram", str(peak)]) == 0
    assert capsys.readouterr().err == ""
    assert run(["info", "--max-ram", "1MB"]) == 0
    assert "max_ram allows 1MB" in capsys.readouterr().out
