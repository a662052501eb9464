"""What a request may send: so many bytes, within so many seconds. ASGI middleware; knows nothing of what bodies say."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """A body over `max_bytes` is answered 413, whether its length was announced or not; one that has not come whole
    after `timeout_s` is answered 408, so that no sender holds a connection by trickling."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def limited() -> Message:
            nonlocal seen, whole
            message: Any = await self._in_time(receive, None if whole else deadline)
            seen += len(message.get("body", b""))
            whole = whole or not message.get("more_body", False)
            if seen > self._max_bytes:
                raise HTTPException(413, f"the request body is larger than {self._max_bytes} bytes")
            return message

        await self._app(scope, limited, send)

    async def _in_time(self, receive: Receive, deadline: float | None) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            raise HTTPException(408, f"the request body did not come within {self._timeout_s:g} s") from None
