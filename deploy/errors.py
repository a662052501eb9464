"""What can go wrong with a request that waits or decodes, by name. Loads no engine."""

from __future__ import annotations

from medusa.errors import MedusaError


class EngineOverloaded(MedusaError):
    """As many requests are running and waiting as may; come back in about `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineUnavailable(MedusaError):
    """The loop has stopped, or a step failed under this request."""


class GrammarFailed(MedusaError):
    """An answer's grammar proved too much for the parser on the way; what was written is no document of it."""


class SlowReader(MedusaError):
    """A client let its pieces pile up and was cancelled."""
