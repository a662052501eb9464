"""Engines in one thread of their own, awaited from asyncio. Knows token ids and text pieces; knows no HTTP and no Ray.

The thread alone touches the engines. Everyone else hands it orders (closures) through a queue, which it takes between
steps; what a step gave goes back to each reader's event loop. So tokens never wait for clients, nor clients for a lock.

Mostly there is one engine. After a `switch` the new one takes new requests, while the old one, stepped in turn with it,
finishes its own: no request ever changes engines, so nothing that an engine caches meets another version's.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deploy.admission import Admission, Load
from deploy.errors import EngineUnavailable, GrammarFailed, SlowReader
from deploy.metrics import FailureReason, Metrics
from deploy.reader import MAX_UNREAD_PIECES, Answer, Piece, Reader
from medusa.detokenize import TextStream
from medusa.engine import Delta, Engine, Request
from medusa.errors import MedusaError

__all__ = ["Answer", "EngineLoop", "Lane", "Load", "Piece"]

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
DRAIN_POLL_S = 0.02


@dataclass(eq=False, kw_only=True)
class Lane:
    """One engine of a loop and the tokenizer that its answers are read with.

    `make_engine` is called at once, in the caller's thread, and again after a step failed: its state is then unknown.
    """

    make_engine: Callable[[], Engine]
    tokenizer: Any
    engine: Engine = field(init=False)
    failed_steps: int = 0

    def __post_init__(self) -> None:
        self.engine = self.make_engine()


class EngineLoop:
    """Owns the engines' thread; begins with a lane of `make_engine` and `tokenizer`.

    At most `max_batch_size + max_waiting` requests are in flight, and none is taken that would wait longer than
    `max_wait_s` for a slot, as far as the answers before tell: one more raises EngineOverloaded at once. `metrics` is
    told of every request and of the load.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        tokenizer: Any,
        *,
        max_waiting: int = 64,
        max_wait_s: float = math.inf,
        stall_after_s: float = 60.0,
        metrics: Metrics | None = None,
    ) -> None:
        self.admission = Admission(max_waiting=max_waiting, max_wait_s=max_wait_s)
        self.metrics = metrics or Metrics()
        self._current = Lane(make_engine=make_engine, tokenizer=tokenizer)
        self._lanes = [self._current]  # the engine's thread: those that are stepped
        self.stall_after_s = stall_after_s
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: dict[str, Reader] = {}
        self._draining = False
        self._stopping = False
        self._ended = "the engine loop is not running"
        self._awake_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)

    # For any thread

    def start(self) -> EngineLoop:
        self.metrics.load(running=0, waiting=0, slots=self._current.engine.max_batch_size)
        self._thread.start()
        return self

    def switch(self, lane: Lane) -> None:
        """New requests go to `lane`; what runs ends where it began. The old engine is dropped after its last request."""
        self._current = lane
        self._orders.put(self._retire)

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests, for good; True once none is in flight, False when some still are after `timeout_s`."""
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while self.num_in_flight and not self._stopping and time.monotonic() < deadline:
            time.sleep(DRAIN_POLL_S)
        return not self.num_in_flight

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread after its current step; requests in flight get EngineUnavailable. May be called twice.

        A loop that was given up is not waited for: its thread may never come back.
        """
        given_up = self._stopping
        self._orders.put(self._stop)
        if self._thread.is_alive() and not given_up:
            self._thread.join(timeout_s)

    @property
    def lane(self) -> Lane:
        """Where new requests go."""
        return self._current

    @property
    def context_length(self) -> int:
        return self._current.engine.context_length

    @property
    def num_in_flight(self) -> int:
        """Requests that run or wait."""
        return len(self._readers)

    @property
    def load(self) -> Load:
        in_flight = self.num_in_flight
        running = min(sum(lane.engine.num_active for lane in list(self._lanes)), in_flight)
        return Load(running=running, waiting=in_flight - running, slots=self._current.engine.max_batch_size)

    def check_health(self) -> None:
        """Raises EngineUnavailable unless the thread lives and is idle or began its current round recently.

        A loop that is found stuck is given up: its readers hear so now, and it takes no more requests.
        """
        began = self._awake_since
        if not self._stopping and began is not None and time.monotonic() - began > self.stall_after_s:
            self._stopping = True
            self._ended = f"the engine has been in one step for more than {self.stall_after_s:g} s"
            logger.error("%s; the loop is given up with %d requests in flight", self._ended, self.num_in_flight)
            self._end_all(self._readers, EngineUnavailable(self._ended))
        if self._stopping or not self._thread.is_alive():
            raise EngineUnavailable(self._ended)

    # For an event loop

    def check_room(self, count: int, *, beside: int = 0) -> None:
        """EngineOverloaded where `count` more requests, asked together, would be refused now; `beside` of those in flight were
        asked with them."""
        ahead = max(self.num_in_flight - beside, 0)
        self.admission.check(ahead=ahead, count=beside + count, slots=self._current.engine.max_batch_size)

    async def submit(
        self, request: Request, *, stop: Sequence[str] = (), lane: Lane | None = None, beside: int = 0
    ) -> Answer:
        """Queue a request and return its pieces. Closing the answer, read or unread, cancels the request.

        `beside` earlier ones were asked together with it: it may wait for them as long as it takes.

        `lane` is the engine that the request was prepared for, by default the newest; one that was left meanwhile still
        serves it. Raises at once PromptError for what can never be served, EngineOverloaded and EngineUnavailable; the
        iterator raises EngineUnavailable for a failed step, GrammarFailed and SlowReader. `request.on_token` is the loop's own.
        """
        lane = lane or self._current
        lane.engine.check(request)
        self.check_room(1, beside=beside)
        reader = Reader(
            request=request,
            lane=lane,
            metrics=self.metrics.arrival(),
            text=TextStream(lane.tokenizer, stop),
            events=asyncio.get_running_loop(),
            pieces=asyncio.Queue(),
        )
        if self._readers.setdefault(request.request_id, reader) is not reader:
            raise ValueError(f"request id {request.request_id!r} is in use")
        try:
            self.check_health()  # after the line above: a loop that ends now either sees the reader or is seen here
            if self._draining:
                raise EngineUnavailable("the server is shutting down")  # noqa: TRY301
        except EngineUnavailable:
            self._readers.pop(request.request_id, None)
            raise
        self._orders.put(lambda: self._admit(reader))
        return Answer(reader, lambda reason: self._orders.put(lambda: self._cancel(reader, reason)))

    # The engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_orders()
                self._awake_since = time.monotonic()
                for lane in list(self._lanes):  # in turn: an old engine's requests are as good as a new one's
                    if lane.engine.has_work and not self._stopping:
                        self._step(lane)
                self._retire()
                load = self.load
                self.metrics.load(running=load.running, waiting=load.waiting, slots=load.slots)
        finally:
            self._stopping = True
            self._end_all(self._readers, EngineUnavailable("the server is shutting down"))

    def _take_orders(self) -> None:
        """Carry out what was ordered; with nothing to decode, sleep until something is."""
        if not any(lane.engine.has_work for lane in self._lanes):
            self._awake_since = None
            order = self._orders.get()
            self._awake_since = time.monotonic()
            order()
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return
            order()

    def _retire(self) -> None:
        """Step the newest engine and those that still work; the rest is dropped, caches and all."""
        current = self._current
        if len(self._lanes) > 1 or self._lanes[0] is not current:
            self._lanes = [lane for lane in self._lanes if lane is not current and lane.engine.has_work] + [current]

    def _step(self, lane: Lane) -> None:
        try:
            deltas = lane.engine.step()
        except Exception:
            logger.exception("an engine step failed with %d requests in flight", self.num_in_flight)
            self._recover(lane)
        else:
            for delta in deltas:
                self._deliver(delta)
            lane.failed_steps = 0

    def _recover(self, lane: Lane) -> None:
        """The requests of a failed step fail; a fresh engine serves the next. Step after step failing ends the loop."""
        lane.failed_steps += 1
        self._stopping = self._stopping or lane.failed_steps >= MAX_FAILED_STEPS  # before clients hear and ask again
        theirs = {name: reader for name, reader in list(self._readers.items()) if reader.lane is lane}
        self._end_all(theirs, EngineUnavailable("the engine failed on this request"))
        if self._stopping:
            logger.error("%d engine steps failed in a row; the loop ends", lane.failed_steps)
        else:
            # What it keeps must be gone before the next one's cache is allocated.
            lane.engine.prefixes.clear()
            del lane.engine.decoder
            lane.engine = lane.make_engine()

    def _admit(self, reader: Reader) -> None:
        if self._readers.get(reader.request.request_id) is not reader:
            return  # it was ended while it waited here
        try:
            reader.lane.engine.submit(replace(reader.request, on_token=reader.see))
        except (MedusaError, ValueError) as error:
            self._cancel(reader, "invalid")
            reader.send(error)
            return
        if reader.lane not in self._lanes:
            self._lanes.append(reader.lane)

    def _deliver(self, delta: Delta) -> None:
        reader = self._readers.get(delta.request_id)
        if reader is None:
            return
        if reader.failure is not None:
            self._cancel(reader, "engine")
            reader.send(EngineUnavailable("the text of this answer could not be decoded"))
            return
        reader.metrics.output(delta)
        if delta.completion is not None and delta.completion.error is not None:
            self._forget(reader)
            reader.send(GrammarFailed(delta.completion.error))
            return
        text = reader.text.take()
        if delta.completion is not None:
            text += reader.text.finish()
            self._forget(reader)
            stats = delta.completion.stats
            self.admission.learn(stats.prefill_s + stats.decode_s)
        piece = Piece(text=text, token_ids=tuple(delta.token_ids), logprobs=delta.logprobs, completion=delta.completion)
        if not reader.send(piece):
            self._cancel(reader, "slow_reader")
            reader.send(SlowReader(f"more than {MAX_UNREAD_PIECES} pieces were left unread; the request is cancelled"))

    def _cancel(self, reader: Reader, reason: FailureReason) -> None:
        """Forget a request, unless it has ended: its id may belong to another by now."""
        if self._forget(reader):
            reader.metrics.failure(reason)
            reader.lane.engine.cancel(reader.request.request_id)

    def _forget(self, reader: Reader) -> bool:
        """False where the reader was no longer known: also another thread may have ended it."""
        request_id = reader.request.request_id
        return self._readers.get(request_id) is reader and self._readers.pop(request_id, None) is reader

    def _end_all(self, readers: dict[str, Reader], error: Exception) -> None:
        """Tell these readers; the engine, which may be broken, is not touched."""
        for reader in list(readers.values()):
            if self._forget(reader):
                reader.metrics.failure("engine")
                reader.send(error)

    def _stop(self) -> None:
        self._stopping = True
