"""One answer between the engine's thread, which writes it, and a client's event loop, which reads it. Knows no engine.

Nothing here waits: a client that does not read fast enough is told so and loses its answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deploy.metrics import FailureReason, RequestMetrics
from medusa.detokenize import TextStream
from medusa.engine import Completion, Request
from medusa.logprobs import TokenLogprob

logger = logging.getLogger(__name__)

MAX_UNREAD_PIECES = 512


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step added to an answer. `completion` comes with the last piece, and only then.

    `logprobs` stands beside `token_ids` where the request asked for it; both run ahead of text that is still held back.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None


@dataclass(kw_only=True)
class Reader:
    """One request in flight: its text so far (the engine's thread) and its unread pieces (the client's event loop).

    `lane` is whatever the loop knows its engine by.
    """

    request: Request
    lane: Any
    metrics: RequestMetrics
    text: TextStream
    events: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception]
    unread: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MAX_UNREAD_PIECES))
    failure: Exception | None = None

    def see(self, token_id: int) -> bool:
        """The engine's `on_token`. A fault in one request's text ends that request, never the step of the others."""
        try:
            return self.text.push(token_id)
        except Exception as error:
            logger.exception("text of request %s failed", self.request.request_id)
            self.failure = error
            return True

    def send(self, item: Piece | Exception) -> bool:
        """Hand an item to the client's event loop; False where nobody reads (fast enough) any more."""
        if isinstance(item, Piece) and not self.unread.acquire(blocking=False):
            return False
        try:
            self.events.call_soon_threadsafe(self.pieces.put_nowait, item)
        except RuntimeError:  # the event loop is closed: the client is gone
            return False
        return True


class Answer:
    """The pieces of one answer, as they come. `aclose` cancels what is left of it, also before the first was read."""

    def __init__(self, reader: Reader, cancel: Callable[[FailureReason], None]) -> None:
        self._reader = reader
        self._cancel = cancel
        self._ended = False

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._reader.pieces.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, Exception):
            await self.aclose()
            raise item
        self._reader.unread.release()
        self._ended = item.completion is not None
        return item

    def cancel(self, reason: FailureReason) -> None:
        """End what is left of it; of several reasons the first is counted."""
        self._ended = True
        self._cancel(reason)

    async def aclose(self) -> None:
        self.cancel("cancelled")
