"""The memory plan: how a model is run on this machine, decided before any of it is opened.

The bound is `Settings.max_ram`, else what the machine or the container can lend. A model that does
not fit is run in a smaller way (memory.py has them in order), and refused where none fits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from edgevlm import device, memory, probe
from edgevlm.bundle import Bundle
from edgevlm.errors import DeviceError
from edgevlm.memory import Needs, Way
from edgevlm.settings import Settings


@dataclass(frozen=True)
class Plan:
    """How a model is run, what that takes, and the bound that it had to keep."""

    needs: Needs
    way: Way
    bound_bytes: int

    @property
    def peak_bytes(self) -> int:
        return memory.peak_bytes(self.needs, self.way)

    @property
    def gives_up(self) -> str:
        """What the model would have with more memory; "" where it has everything."""
        lost = []
        if self.needs.prefill_bytes and not self.way.prefill:
            lost.append("llama.cpp reads pictures, not the prefill graph")
        if self.way.apart:
            lost.append("image encoder and language model take turns")
        if self.way.n_ctx < self.needs.n_ctx:
            lost.append(f"the context is {self.way.n_ctx} tokens, not {self.needs.n_ctx}")
        return ", ".join(lost)

    def __str__(self) -> str:
        peak = f"at most about {_size(self.peak_bytes)}"
        return f"{peak}: {self.gives_up}" if self.gives_up else peak

    def as_dict(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak_bytes,
            "bound_bytes": self.bound_bytes,
            "way": asdict(self.way),
            "needs": asdict(self.needs),
        }


def make(bundle: Bundle, settings: Settings) -> Plan:
    """The fastest plan that fits.

    Raises:
        DeviceError: none does; the message says what would.
        BackendError: llama.cpp does not run here at all.
    """
    repacks = probe.verdict().extra_buffers
    needs = memory.of_bundle(bundle, extra_buffers=repacks, precise=settings.precise)
    if settings.prefill == "gguf":
        needs = replace(needs, prefill_bytes=0)  # nothing opens the graph
    # what this process holds already is part of the plan
    bound = settings.max_ram or device.available_memory_bytes() + device.rss_bytes()
    way = memory.fitting(needs, bound)
    if way is None:
        raise DeviceError(_refusal(bundle, needs, bound, asked=settings.max_ram is not None))
    return Plan(needs, way, bound)


def _refusal(bundle: Bundle, needs: Needs, bound: int, *, asked: bool) -> str:
    least = _size(memory.least_bytes(needs))
    remedies = [f"allow {least}" if asked else f"close programs, insist with --max-ram {least}"]
    kind: str = bundle.manifest["quantization"]["language"]
    for smaller, weights in memory.smaller_kinds(kind):
        n_bytes = memory.least_bytes(needs.with_weights(weights))
        if n_bytes <= bound:
            remedies.append(f"export it with --llm {smaller} ({_size(n_bytes)})")
            break
    others = [model for model in _models() if model[0] <= bound and model[1] != bundle.name]
    if others:
        remedies.append(f"take {max(others)[1]} ({_size(max(others)[0])})")
    return (
        f"{bundle.name} needs about {least} of memory at the least, and "
        f"{'max_ram allows' if asked else 'there are'} {_size(bound)}: {', or '.join(remedies)}"
    )


def _models() -> list[tuple[int, str]]:
    """Least bytes and name of the models that are here or can be pulled."""
    from edgevlm import pull, registry  # reached only where a model does not fit

    here = [(memory.least_bytes(memory.of_bundle(b)), b.name) for b in registry.known()]
    return here + [
        (memory.least_bytes(memory.of_checkpoint(known.parameters, "q4_k_m")), known.name)
        for known in pull.catalogue()
    ]


def _size(n_bytes: int) -> str:
    """For a person, and as --max-ram takes it; rounded up."""
    return f"{-(-n_bytes // 10**6)}MB" if n_bytes < 10**9 else f"{-(-n_bytes // 10**7) / 100:g}GB"
