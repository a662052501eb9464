"""An engine in a thread of its own, awaited from asyncio. Knows token ids and text pieces; knows no HTTP and no Ray.

The thread alone touches the engine. Everyone else hands it orders (closures) through a queue, which it takes between
steps; what a step gave goes back to each reader's event loop. So tokens never wait for clients, nor clients for a lock.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from medusa.detokenize import TextStream
from medusa.engine import Completion, Delta, Engine, Request
from medusa.errors import MedusaError

logger = logging.getLogger(__name__)

MAX_UNREAD_PIECES = 512
MAX_FAILED_STEPS = 3


class EngineOverloaded(MedusaError):
    """As many requests are running and waiting as may; come back later."""


class EngineUnavailable(MedusaError):
    """The loop has stopped, or a step failed under this request."""


class SlowReader(MedusaError):
    """A client let its pieces pile up and was cancelled."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step added to an answer. `completion` comes with the last piece, and only then."""

    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None


@dataclass(kw_only=True)
class _Reader:
    """One request in flight: its text so far (the engine's thread) and its unread pieces (the client's event loop)."""

    request: Request
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

    def __init__(self, reader: _Reader, cancel: Callable[[], None]) -> None:
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

    async def aclose(self) -> None:
        self._ended = True
        self._cancel()


class EngineLoop:
    """Owns the engine's thread. `make_engine` is called on start, and again after a step failed: its state is then unknown.

    At most `max_batch_size + max_waiting` requests are in flight; one more raises EngineOverloaded at once.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], tokenizer: Any, *, max_waiting: int = 64, stall_after_s: float = 60.0
    ) -> None:
        self._make_engine = make_engine
        self._tokenizer = tokenizer
        self._engine = make_engine()
        self.context_length = self._engine.context_length
        self._max_in_flight = self._engine.max_batch_size + max_waiting
        self._stall_after_s = stall_after_s
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: dict[str, _Reader] = {}
        self._stopping = False
        self._failed_steps = 0
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)

    # For any thread

    def start(self) -> EngineLoop:
        self._thread.start()
        return self

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread after its current step; requests in flight get EngineUnavailable. May be called twice."""
        self._orders.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def num_in_flight(self) -> int:
        return len(self._readers)

    def check_health(self) -> None:
        """Raises EngineUnavailable unless the thread lives and its current step began recently."""
        if self._stopping or not self._thread.is_alive():
            raise EngineUnavailable("the engine loop is not running")
        began = self._step_began
        if began is not None and time.monotonic() - began > self._stall_after_s:
            raise EngineUnavailable(f"the engine has been in one step for more than {self._stall_after_s:g} s")

    # For an event loop

    async def submit(self, request: Request, *, stop: Sequence[str] = ()) -> Answer:
        """Queue a request and return its pieces. Closing the answer, read or unread, cancels the request.

        Raises at once PromptError for what can never be served, EngineOverloaded and EngineUnavailable; the iterator
        raises EngineUnavailable for a failed step and SlowReader. `request.on_token` is the loop's own.
        """
        self._engine.check(request)
        if len(self._readers) >= self._max_in_flight:
            raise EngineOverloaded(
                f"{len(self._readers)} requests are in flight, the most that are taken; try again later"
            )
        reader = _Reader(
            request=request,
            text=TextStream(self._tokenizer, stop),
            events=asyncio.get_running_loop(),
            pieces=asyncio.Queue(),
        )
        if self._readers.setdefault(request.request_id, reader) is not reader:
            raise ValueError(f"request id {request.request_id!r} is in use")
        try:
            self.check_health()  # after the line above: a loop that ends now either sees the reader or is seen here
        except EngineUnavailable:
            self._readers.pop(request.request_id, None)
            raise
        self._orders.put(lambda: self._admit(reader))
        return Answer(reader, lambda: self._orders.put(lambda: self._cancel(reader)))

    # The engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_orders()
                if self._engine.has_work:
                    self._step()
        finally:
            self._stopping = True
            self._end_all(EngineUnavailable("the server is shutting down"))

    def _take_orders(self) -> None:
        """Carry out what was ordered; with nothing to decode, sleep until something is."""
        if not self._engine.has_work:
            self._orders.get()()
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order()

    def _step(self) -> None:
        self._step_began = time.monotonic()
        try:
            deltas = self._engine.step()
        except Exception:
            logger.exception("an engine step failed with %d requests in flight", len(self._readers))
            self._recover()
        else:
            for delta in deltas:
                self._deliver(delta)
            self._failed_steps = 0
        finally:
            self._step_began = None

    def _recover(self) -> None:
        """The requests of a failed step fail; a fresh engine serves the next. Step after step failing ends the loop."""
        self._failed_steps += 1
        self._stopping = self._stopping or self._failed_steps >= MAX_FAILED_STEPS  # before clients hear and ask again
        self._end_all(EngineUnavailable("the engine failed on this request"))
        if self._stopping:
            logger.error("%d engine steps failed in a row; the loop ends", self._failed_steps)
        else:
            del self._engine.decoder  # its cache must be gone before the next one's is allocated
            self._engine = self._make_engine()

    def _admit(self, reader: _Reader) -> None:
        if self._readers.get(reader.request.request_id) is not reader:
            return  # it was ended while it waited here
        try:
            self._engine.submit(replace(reader.request, on_token=reader.see))
        except (MedusaError, ValueError) as error:
            self._cancel(reader)
            reader.send(error)

    def _deliver(self, delta: Delta) -> None:
        reader = self._readers.get(delta.request_id)
        if reader is None:
            return
        if reader.failure is not None:
            self._cancel(reader)
            reader.send(EngineUnavailable("the text of this answer could not be decoded"))
            return
        text = reader.text.take()
        if delta.completion is not None:
            text += reader.text.finish()
            del self._readers[delta.request_id]
        if not reader.send(Piece(text=text, token_ids=tuple(delta.token_ids), completion=delta.completion)):
            self._cancel(reader)
            reader.send(SlowReader(f"more than {MAX_UNREAD_PIECES} pieces were left unread; the request is cancelled"))

    def _cancel(self, reader: _Reader) -> None:
        """Forget a request, unless it has ended: its id may belong to another by now."""
        request_id = reader.request.request_id
        if self._readers.get(request_id) is reader:
            del self._readers[request_id]
            self._engine.cancel(request_id)

    def _end_all(self, error: Exception) -> None:
        """Tell every reader; the engine, which may be broken, is not touched."""
        readers, self._readers = list(self._readers.values()), {}
        for reader in readers:
            reader.send(error)

    def _stop(self) -> None:
        self._stopping = True
