"""Wall time of the stages of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from edgevlm.answer import Timings


class Meter:
    """Started when made."""

    def __init__(self) -> None:
        self._started = perf_counter()
        self._first_token: float | None = None
        self._ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the `with` block to `name`, a field of Timings without "_ms"."""
        started = perf_counter()
        try:
            yield
        finally:
            key = f"{name}_ms"
            self._ms[key] = self._ms.get(key, 0.0) + 1000 * (perf_counter() - started)

    def ran(self, name: str) -> bool:
        """Whether a stage ran."""
        return f"{name}_ms" in self._ms

    def first_token(self) -> None:
        """Call at every token; only the first counts."""
        self._first_token = self._first_token or perf_counter()

    def timings(self, load_ms: float) -> Timings:
        now = perf_counter()
        first = self._first_token or now
        return Timings(
            load_ms=load_ms,
            first_token_ms=1000 * (first - self._started),
            generate_ms=1000 * (now - first),
            **self._ms,
        )
