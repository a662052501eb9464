"""Server-sent events and client disconnects, on bare ASGI. Knows how bytes leave; knows nothing of what they say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Set
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

T = TypeVar("T")
DONE = "data: [DONE]\n\n"


def event(payload: BaseModel, *, leave_out: Set[str] = frozenset()) -> str:
    """One event whose data is `payload` as JSON, without the fields of `leave_out`."""
    return f"data: {payload.model_dump_json(exclude=set(leave_out))}\n\n"


class EventStream(Response):
    """Sends each event as its own body message the moment it exists, and calls `release` when the client goes.

    A client that reads so slowly that the stream is not through after `timeout_s` is cut off without an end.

    Starlette's StreamingResponse leaves a generator's end to the garbage collector; and a generator that was never
    begun has no end, so what it holds is released here.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[str], *, release: Callable[[], Awaitable[None]], timeout_s: float
    ) -> None:
        # Proxies must pass events on as they come.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._release = release
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await _until_disconnect(self._send(send), receive)
        except ClientDisconnect:
            pass  # no fault, and nobody is left to be answered
        except TimeoutError:
            logger.warning("a client did not read its stream within %g s and is cut off", self._timeout_s)
        finally:
            await self._release()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for text in events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(work: Coroutine[Any, Any, T], request: Request) -> T:
    """Result of `work`, which is cancelled when the client goes first; ClientDisconnect then."""
    return await _until_disconnect(work, request.receive)


async def _until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
