"""One bar a step on stderr, where a person watches; nothing where stderr is a file or a pipe."""

from __future__ import annotations

import sys
from types import TracebackType

_CELLS = 30
_LABEL_CELLS = 16


class Bars:
    """Call it with (what, done, total); leave its `with` to end the last line."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown = sys.stderr.isatty() and not quiet
        self._last = ("", -1)

    def __call__(self, what: str, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if not self._shown or (what, percent) == self._last:
            return
        if self._last[0] not in ("", what):
            sys.stderr.write("\n")
        self._last = (what, percent)
        full = _CELLS * percent // 100
        bar = "█" * full + "·" * (_CELLS - full)
        sys.stderr.write(f"\r{what:<{_LABEL_CELLS}} {bar} {percent:>3}%")
        sys.stderr.flush()

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._last[0]:
            sys.stderr.write("\n")
