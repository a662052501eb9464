"""HTTP routes over an engine loop. Knows OpenAI's protocol and FastAPI; knows no Ray and no tensors."""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from deploy.answering import Answering
from deploy.api.chat import ChatCompletion, ChatRequest
from deploy.api.completions import CompletionRequest, TextCompletion
from deploy.api.protocol import Health, ModelCard, ModelList, Version
from deploy.api.replies import ChatReply, CompletionReply
from deploy.api_keys import KeyRing, RequireKey
from deploy.body_limit import BodyLimit
from deploy.openapi import COMMON, GENERATION, STREAM, describe, refusals
from deploy.pages import add_pages
from deploy.refusals import answer_errors
from deploy.request_log import HEADER, RequestLog
from deploy.service import Service
from pipelines.config import ServeSection

_ANSWERING = "medusa.answering"


def create_app(
    service: Service,
    settings: ServeSection | None = None,
    *,
    keys: KeyRing | None = None,
    behind_proxy: bool = False,
) -> Front:
    """The application; starting and stopping `service.loop` is the caller's business.

    `keys` open it, by default those of the settings: KeyFileError where their file is bad. `behind_proxy`: the proxy in
    front sends `x-request-id` itself, as Ray Serve's does.
    """
    settings = settings or ServeSection()
    keys = KeyRing.of(settings) if keys is None else keys
    # No pages of interactive documentation: they would load scripts from elsewhere.
    app = FastAPI(title="Medusa on Ray", version=_version(), docs_url=None, redoc_url=None)
    answer_errors(app)
    _add_middleware(app, settings, keys, send_id=not behind_proxy)
    _add_routes(app)
    describe(app, with_keys=bool(keys))
    add_pages(app, service.loop.metrics)
    return Front(app, Answering(service, settings))


class Front:
    """ASGI: an application before what answers its requests, which its routes find in the scope of each.

    The application must not hold that itself: FastAPI keeps the functions of routes for good, and all else of it in a ring.
    As it is, a service that was replaced, its engine and its model are freed when their last request has ended.
    """

    def __init__(self, app: FastAPI, answering: Answering) -> None:
        self._app = app
        self._answering = answering

    @property
    def routes(self) -> list[BaseRoute]:
        return self._app.routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, _ANSWERING: self._answering}, receive, send)


def _add_middleware(app: FastAPI, settings: ServeSection, keys: KeyRing, *, send_id: bool) -> None:
    """From the innermost to the outermost: a preflight request has no key, and every answer has an id and a log line."""
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.request_timeout_s)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER, "retry-after"],
        )
    app.add_middleware(RequestLog, send_id=send_id, write=settings.access_log)


def _add_routes(app: FastAPI) -> None:
    generation = {200: {"content": STREAM}, **refusals(*GENERATION)}
    app.post("/v1/chat/completions", response_model=ChatCompletion, responses=generation)(chat_completions)
    app.post("/v1/completions", response_model=TextCompletion, responses=generation)(completions)
    app.get("/v1/models", responses=refusals(*COMMON))(models)
    app.get("/v1/models/{name:path}", responses=refusals(404, *COMMON))(model)
    app.get("/health", responses=refusals(500, 503))(health)
    app.get("/version", responses=refusals(*COMMON))(version)


def _answering(request: Request) -> Answering:
    answering: Answering = request.scope[_ANSWERING]
    return answering


async def chat_completions(body: ChatRequest, request: Request) -> Response:
    messages = [message.as_turn() for message in body.messages]
    return await _answering(request).answer(request, body, [messages], ChatReply)


async def completions(body: CompletionRequest, request: Request) -> Response:
    return await _answering(request).answer(request, body, body.prompts, CompletionReply)


async def models(request: Request) -> ModelList:
    return ModelList(data=[_answering(request).service.card])


async def model(name: str, request: Request) -> ModelCard:
    service = _answering(request).service
    service.check_name(name)
    return service.card


async def health(request: Request) -> Health:
    service = _answering(request).service
    service.loop.check_health()
    return Health.model_validate(service.status())


async def version() -> Version:
    return Version(version=_version())


def _version() -> str:
    try:
        return importlib.metadata.version("medusa-ray")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
