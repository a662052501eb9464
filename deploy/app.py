"""HTTP routes over an engine loop. Knows OpenAI's protocol and FastAPI; knows no Ray and no tensors."""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

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


def create_app(service: Service, settings: ServeSection | None = None, *, behind_proxy: bool = False) -> FastAPI:
    """The application; starting and stopping `service.loop` is the caller's business.

    `behind_proxy`: the proxy in front sends `x-request-id` itself, as Ray Serve's does. Raises KeyFileError.
    """
    settings = settings or ServeSection()
    keys = KeyRing.of(settings)
    # No pages of interactive documentation: they would load scripts from elsewhere.
    app = FastAPI(title="Medusa on Ray", version=_version(), docs_url=None, redoc_url=None)
    answer_errors(app)
    _add_middleware(app, settings, keys, send_id=not behind_proxy)
    _add_generation(app, service, settings)
    _add_information(app, service)
    describe(app, with_keys=bool(keys))
    add_pages(app, service.loop.metrics)
    return app


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


def _add_generation(app: FastAPI, service: Service, settings: ServeSection) -> None:
    answering = Answering(service, settings)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": STREAM}, **refusals(*GENERATION)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        messages = [message.as_turn() for message in body.messages]
        return await answering.answer(request, body, [messages], ChatReply)

    @app.post(
        "/v1/completions",
        response_model=TextCompletion,
        responses={200: {"content": STREAM}, **refusals(*GENERATION)},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answering.answer(request, body, body.prompts, CompletionReply)


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=refusals(*COMMON))
    async def models() -> ModelList:
        return ModelList(data=[service.card])

    @app.get("/v1/models/{name:path}", responses=refusals(404, *COMMON))
    async def model(name: str) -> ModelCard:
        service.check_name(name)
        return service.card

    @app.get("/health", responses=refusals(500, 503))
    async def health() -> Health:
        service.loop.check_health()
        return Health.model_validate(service.status())

    @app.get("/version", responses=refusals(*COMMON))
    async def version() -> Version:
        return Version(version=_version())


def _version() -> str:
    try:
        return importlib.metadata.version("medusa-ray")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
