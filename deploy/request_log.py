"""The outermost middleware: each request gets an id, an end, and a line of JSON in the log. Knows no routes.

What was asked and what was answered stand in no line unless a route notes them.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.api import errors
from deploy.refusals import as_response

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("deploy.access")

HEADER = "x-request-id"
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NOTES = "medusa.notes"


def note(request: Request, tell: Callable[[], dict[str, Any]]) -> None:
    """Add what `tell` says at the request's end to its line in the access log."""
    request.scope[_NOTES].append(tell)


def request_id_of(scope: Scope) -> str:
    """The client's id where it is one that may stand in a header and a log line, else a new one."""
    sent = Headers(scope=scope).get(HEADER, "")
    return sent if _VALID_ID.fullmatch(sent) else uuid.uuid4().hex


class RequestLog:
    """Gives the response its `x-request-id`, answers faults of ours with a 500 that tells nothing, logs how it went.

    `send_id` false leaves the header to a proxy in front that sends it anyway; `write` false writes no access log.
    """

    def __init__(self, app: ASGIApp, *, send_id: bool = True, write: bool = True) -> None:
        self._app = app
        self._send_id = send_id
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, request_id = time.perf_counter(), request_id_of(scope)
        line: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        scope[_NOTES] = []

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                line["status"] = message["status"]
                if self._send_id:
                    MutableHeaders(scope=message)[HEADER] = request_id
            elif message.get("body") and "first_byte_s" not in line:
                line["first_byte_s"] = _rounded(time.perf_counter() - began)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            logger.exception("request %s failed", request_id)
            if "status" in line:
                raise  # half an answer has left: the server cuts the connection, so that nobody takes it for whole
            await as_response(errors.internal())(scope, receive, watched)
        finally:
            if self._write:
                client = scope.get("client")
                line |= {"duration_s": _rounded(time.perf_counter() - began), "client": client and client[0]}
                for tell in scope[_NOTES]:
                    line |= tell()
                access_logger.info("%s", json.dumps(line))


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
