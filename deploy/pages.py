"""What is served beside the API: the playground at `/` and the metrics at `/metrics`. Knows routes; knows no engine.

The page is static files of this package: no build step, nothing from elsewhere. Its policy lets it run its own script
and talk to its own server, and nothing else.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.metrics import Metrics

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered 304 while it is the same
}
MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "playground.css": "text/css; charset=utf-8",
    "playground.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "client.js": "text/javascript; charset=utf-8",
}


class Asset:
    """One file of the page, as it is sent."""

    def __init__(self, name: str) -> None:
        self._body = resources.files("deploy").joinpath("playground", name).read_bytes()
        self._headers = {**HEADERS, "ETag": f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'}
        self._media_type = MEDIA_TYPES[name]

    def reply(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, media_type=self._media_type, headers=self._headers)


class CountErrors:
    """ASGI middleware: each response that is an error is counted by its status. To be the outermost."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._metrics.error(message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def add_pages(app: FastAPI, metrics: Metrics) -> None:
    """Adds the routes, which need no API key: the page asks for one where its own requests do. To be called last."""
    app.add_middleware(CountErrors, metrics=metrics)
    app.state.metrics = metrics
    app.state.assets = {name: Asset(name) for name in MEDIA_TYPES}
    app.get("/", include_in_schema=False)(index)
    app.get("/playground/{name}", include_in_schema=False)(asset)
    app.get("/metrics", include_in_schema=False)(exposition)


async def index(request: Request) -> Response:
    return await asset("index.html", request)


async def asset(name: str, request: Request) -> Response:
    assets: dict[str, Asset] = request.app.state.assets
    if name not in assets:
        raise HTTPException(404)
    return assets[name].reply(request)


def exposition(request: Request) -> Response:  # in a thread of the pool: it takes a few milliseconds
    outlet = request.app.state.metrics.prometheus
    return Response(outlet.exposition(), media_type=outlet.content_type)
