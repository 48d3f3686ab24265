"""The llama.cpp library as llama-cpp-python brings it: loaded, silenced, and asked who it is.

The only module that imports llama_cpp, and of it only the low-level, ctypes half. What llama.cpp
logs goes to the logger "edgevlm.llama".
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

# libgomp's threads spin for milliseconds at every barrier by default. When another program takes
# a core, the thread that spins keeps the one it waits for from running: a prefill of 0.4 s was
# seen to take 16 s. Read by libgomp when it is loaded, which importing llama_cpp does.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from edgevlm.errors import BackendError


@contextmanager
def _bare(package: str) -> Iterator[None]:
    """Import submodules of `package` without running its __init__, for ourselves only.

    llama_cpp's imports the high-level half with its template engine and its cache on disk: a
    tenth of the time until `edgevlm` begins to load a model.
    """
    before = dict(sys.modules)
    spec = find_spec(package)
    if spec is not None and package not in before:
        sys.modules[package] = module_from_spec(spec)
    try:
        yield
    finally:
        for name in {name for name in sys.modules if name.split(".")[0] == package} - {*before}:
            del sys.modules[name]  # whoever imports it after us gets all of it


with _bare("llama_cpp"):
    import llama_cpp.llama_cpp as _binding

lib: Any = _binding
_log = logging.getLogger("edgevlm.llama")
complaints: deque[str] = deque(maxlen=8)  # llama.cpp's last warnings, for error messages
_WARNING, _CONTINUED = 3, 5  # ggml_log_level


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def on_log(level: int, text: bytes, _: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if _WARNING <= level < _CONTINUED:
        complaints.append(line)
    _log.debug(line)


@cache
def start() -> None:
    lib.llama_log_set(on_log, ctypes.c_void_p(0))
    lib.llama_backend_init()


def failure(what: str) -> BackendError:
    said = "; ".join(complaints) or "nothing"
    return BackendError(f"llama.cpp {what}. It said: {said}")


def ggml(name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml; the binding declares llama.cpp's only."""
    return ctypes.CFUNCTYPE(result, *arguments)((name, lib._lib))


def version() -> str:
    """Of llama-cpp-python, which pins its llama.cpp."""
    from importlib import metadata  # here, because it imports an e-mail parser

    return metadata.version("llama-cpp-python")


def library_path() -> Path:
    """The llama.cpp library that is loaded."""
    return Path(lib._lib._name)


def build_features() -> str:
    """What the library was built with, for example "AVX2 = 1 | AVX512 = 1"."""
    return str(lib.llama_print_system_info().decode())
