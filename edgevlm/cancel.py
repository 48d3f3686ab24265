"""Stopping native work promptly, from another thread or with Ctrl-C.

Kernels and llama.cpp poll a flag in native memory; ONNX Runtime has a switch of its own. Python
handles Ctrl-C only between bytecodes, so native calls run on a worker thread while the caller's
thread waits where Ctrl-C can reach it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Timer
from typing import ParamSpec, TypeVar

from edgevlm.errors import Cancelled, TimeBudget
from edgevlm.kernels import Flag

P = ParamSpec("P")
R = TypeVar("R")

_idle: list[ThreadPoolExecutor] = []  # the last is the one that worked last
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads


@contextmanager
def _worker() -> Iterator[ThreadPoolExecutor]:
    """A thread for one call; always the same one while no two calls run at a time.

    All models share them. OpenMP keeps a team for every thread that called llama.cpp, and as soon
    as all teams together are more than the CPUs it spins a hundred times at a barrier instead of
    GOMP_SPINCOUNT (GNU libgomp manual) and sleeps: with a thread for each of two open models a
    token of either took half as long again.
    """
    try:
        worker = _idle.pop()
    except IndexError:
        worker = ThreadPoolExecutor(1, thread_name_prefix="edgevlm")
    try:
        yield worker
    finally:
        _idle.append(worker)


class Cancel:
    def __init__(self) -> None:
        self.flag = Flag()
        self._stop: Callable[[], None] | None = None
        self._expired = False
        self._closed = False

    def cancel(self) -> None:
        """Make the running call raise `Cancelled`; harmless when nothing runs."""
        self.flag.set()
        if self._stop is not None:
            self._stop()

    def begin(self) -> None:
        """Forget an earlier cancel: a new call begins."""
        self.flag.clear()

    @contextmanager
    def within(self, seconds: float | None) -> Iterator[None]:
        """Native work in the `with` block ends after that time, with `TimeBudget`."""
        if seconds is None:
            yield
            return
        timer = Timer(seconds, self._expire)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # one that fires late would stop what comes next
            if self._expired:
                self.flag.clear()
            self._expired = False

    def _expire(self) -> None:
        self._expired = True
        self.cancel()

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
            TimeBudget: the same, because the time of `within` has passed.
            KeyboardInterrupt: Ctrl-C; the work has ended and its memory is free again.
            RuntimeError: after `close`.
        """
        if self._closed:
            raise RuntimeError("this model was closed")
        try:
            self.check()
            with _worker() as worker:
                future = worker.submit(function, *args, **kwargs)
                try:
                    return future.result()
                except KeyboardInterrupt:
                    self.cancel()
                    wait([future])
                    raise
        except Cancelled as error:
            if self._expired:
                raise TimeBudget("the time is over before the first word") from error
            raise

    def close(self) -> None:
        """No native work begins any more."""
        self._closed = True
