"""The rules that keep the house in order, read from the source."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import edgevlm
from edgevlm import families, kernels

ROOT = Path(__file__).parents[1]
RUNTIME = sorted((ROOT / "edgevlm").rglob("*.py"))
EXPORT = sorted((ROOT / "export").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def importers(package: str) -> list[str]:
    return [str(path.relative_to(ROOT / "edgevlm")) for path in RUNTIME if package in imports(path)]


def test_the_runtime_never_imports_what_only_training_needs() -> None:
    for path in RUNTIME:
        assert not imports(path) & {"torch", "transformers", "onnx", "gguf"}, path


def test_only_its_verbs_reach_the_exporter() -> None:
    assert importers("edgevlm_export") == ["cli/bench.py", "cli/export.py", "cli/verify.py"]


def test_the_exporter_has_one_importer_of_llama_cpp() -> None:
    found = [path.name for path in EXPORT if "llama_cpp" in imports(path)]
    assert found == ["quantize.py"]


def test_the_exporter_needs_no_torch_but_to_verify_to_trace_and_to_train_nano() -> None:
    needed = ("reference.py", "optimum.py")
    for path in EXPORT:
        if not {"nano", "oracles"} & {*path.parts} and path.name not in needed:
            assert not imports(path) & {"torch", "transformers"}, path


def test_each_library_has_one_importer() -> None:
    assert importers("onnxruntime") == ["sessions.py"]
    assert importers("llama_cpp") == ["bench/mtmd.py", "llama/library.py"]
    peer = (ROOT / "edgevlm/bench/mtmd.py").read_text()  # libmtmd's binding and nothing else of it
    assert re.findall(r"^ *(?:from|import) llama_cpp.*$", peer, re.MULTILINE) == [
        "        from llama_cpp import mtmd_cpp"
    ]
    native = {path for path in importers("ctypes") if not path.startswith("llama/")}
    assert native == {"bench/mtmd.py", "kernels.py"}


def test_family_names_stay_in_families() -> None:
    for name in families.names():
        for path in RUNTIME:
            if path.parent.name != "families":
                assert not re.search(rf"\b{name}\b", path.read_text(), re.IGNORECASE), (name, path)


def test_runtime_and_exporter_have_the_same_families() -> None:
    exported = {path.stem for path in (ROOT / "export/edgevlm_export/families").glob("[!_]*.py")}
    assert exported == set(families.names())


def test_the_guide_tells_how_long_the_smallest_families_are() -> None:
    guide = (ROOT / "docs/adding-a-family.md").read_text()
    told = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|", guide, re.MULTILINE)
    assert len(told) > 3
    for name, *counts in told:
        for room, count in zip(("edgevlm", "export/edgevlm_export"), counts, strict=True):
            n_lines = len((ROOT / room / "families" / f"{name}.py").read_text().splitlines())
            assert abs(n_lines - int(count)) <= 10, f"{room}/families/{name}.py: {n_lines} lines"


def test_every_c_function_is_bound() -> None:
    header = (ROOT / "kernels/edgevlm_kernels.h").read_text()
    declared = set(re.findall(r"^[a-z_0-9 ]+[ *]+(edgevlm_[a-z_]+)\(", header, re.MULTILINE))
    assert len(declared) > 4
    source = Path(str(kernels.__file__)).read_text()
    assert {name for name in declared if f".{name}" in source} == declared


def test_all_equals_the_namespace() -> None:
    assert all(getattr(edgevlm, name).__name__ == name for name in edgevlm.__all__)
    imported = {n for n, v in vars(edgevlm).items() if not isinstance(v, ModuleType)}
    public = {name for name in imported if not name.startswith("_")}
    assert public - {"annotations", "import_module", "TYPE_CHECKING"} == set()
    assert set(dir(edgevlm)) == {*edgevlm.__all__, "__version__"}


def test_public_functions_and_classes_have_docstrings() -> None:
    for name in edgevlm.__all__:
        thing = getattr(edgevlm, name)
        assert thing.__doc__, name
        for member in vars(thing) if isinstance(thing, type) else []:
            value = getattr(thing, member)
            if callable(value) and not member.startswith("_"):
                assert value.__doc__, f"{name}.{member}"


def test_modules_say_what_they_do_in_five_lines_or_fewer() -> None:
    for path in [*RUNTIME, *EXPORT]:
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        if path.name != "errors.py":  # the drawing of the hierarchy
            assert len(docstring.splitlines()) <= 8, path


def test_every_error_is_public_and_has_an_exit_code() -> None:
    errors = import_module("edgevlm.errors")
    for name, thing in vars(errors).items():
        if isinstance(thing, type):
            assert issubclass(thing, edgevlm.EdgeVLMError)
            assert name in edgevlm.__all__
            assert thing.exit_code in (1, 2, 4, 5, 6, 7, 130)
