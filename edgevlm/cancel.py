"""Stopping native work promptly, from another thread or with Ctrl-C.

Kernels and llama.cpp poll a flag in native memory; ONNX Runtime has a switch of its own. Python
handles Ctrl-C only between bytecodes, so native calls run on a worker thread while the caller's
thread waits where Ctrl-C can reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import ParamSpec, TypeVar

from edgevlm.errors import Cancelled
from edgevlm.kernels import Flag

P = ParamSpec("P")
R = TypeVar("R")


class Cancel:
    def __init__(self) -> None:
        self.flag = Flag()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="edgevlm")
        self._stop: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Make the running call raise `Cancelled`; harmless when nothing runs."""
        self.flag.set()
        if self._stop is not None:
            self._stop()

    def begin(self) -> None:
        """Forget an earlier cancel: a new call begins."""
        self.flag.clear()

    def stops_with(self, stop: Callable[[], None] | None) -> None:
        """`cancel` also calls `stop` while a stage runs that does not poll the flag."""
        self._stop = stop

    def check(self) -> None:
        if self.flag.is_set():
            raise Cancelled("cancelled")

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run native work so that Ctrl-C stops it.

        Raises:
            Cancelled: before it began, or because it saw the flag.
            KeyboardInterrupt: Ctrl-C; the work has ended and its memory is free again.
        """
        self.check()
        future = self._worker.submit(function, *args, **kwargs)
        try:
            return future.result()
        except KeyboardInterrupt:
            self.cancel()
            wait([future])
            raise

    def close(self) -> None:
        self._worker.shutdown()
