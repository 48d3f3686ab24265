"""Every error that edgevlm raises on purpose.

    EdgeVLMError
    ├ BundleError        missing, corrupt, mixed or too new
    │ └ UnknownFamily    a family this version does not have
    ├ ImageError         undecodable, too large, empty
    ├ PromptError        a question, schema or option the model cannot take
    │ └ ContextOverflow  .needed, .available (tokens)
    ├ OutputError        the answer could not be finished as the schema demands
    ├ DeviceError        asked-for device or CPU tier is not there; memory plan does not fit
    ├ TimeBudget         an answer is not possible in the time that was given
    ├ HubError           offline, not found, checksum, interrupted
    ├ Cancelled          cancel() was called while this ran
    └ BackendError       ONNX Runtime or llama.cpp failed; cause chained

Each message says what was found, what was expected, where, and what to do.
"""

from __future__ import annotations


class EdgeVLMError(Exception):
    """Base of all errors below; `exit_code` is what the command line returns for it."""

    exit_code = 1


class BundleError(EdgeVLMError):
    """A model directory is missing, corrupt, mixed from two models, or too new."""

    exit_code = 5


class UnknownFamily(BundleError):
    """The bundle names a family that this version does not have."""


class ImageError(EdgeVLMError):
    """A picture cannot be read, is too large, or is empty."""

    exit_code = 4


class PromptError(EdgeVLMError):
    """A question, schema or option that the model cannot take."""

    exit_code = 2


class ContextOverflow(PromptError):
    """The prompt and its pictures need more tokens than the context holds."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(
            f"the prompt needs {needed} tokens and the context holds {available}: "
            "ask a shorter question, use fewer pictures or start a new chat"
        )
        self.needed = needed
        self.available = available


class OutputError(EdgeVLMError):
    """The answer could not be finished in the form that the schema demands."""


class DeviceError(EdgeVLMError):
    """A device or CPU tier that was asked for is not there, or memory does not suffice."""

    exit_code = 6


class TimeBudget(EdgeVLMError):
    """No answer in the time that was given: by what was measured, or because it has passed."""

    exit_code = 7


class HubError(EdgeVLMError):
    """A model file could not be fetched: offline, not found, wrong checksum, interrupted."""

    exit_code = 5


class Cancelled(EdgeVLMError):
    """`cancel()` stopped this call; the engine stays usable."""

    exit_code = 130


class BackendError(EdgeVLMError):
    """ONNX Runtime or llama.cpp failed; the cause is chained."""
