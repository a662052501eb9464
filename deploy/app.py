"""HTTP routes over an engine loop. Knows OpenAI's protocol and FastAPI; knows no Ray and no tensors."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.api import errors
from deploy.api.errors import ApiError
from deploy.api.protocol import ChatCompletion, ChatRequest, ModelCard, ModelList
from deploy.api.streaming import DONE, EventStream, event, unless_disconnected
from deploy.api.translate import Answer, sampling_params
from deploy.engine_loop import Answer as Pieces
from deploy.engine_loop import EngineLoop, EngineOverloaded, EngineUnavailable, SlowReader
from medusa.engine import Request as EngineRequest
from medusa.errors import MedusaError, PromptError
from medusa.generate import Model

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Service:
    """One served model: the name clients ask for, the model that writes the prompt, the loop that answers it.

    `fingerprint` tells clients which weights answered (OpenAI's `system_fingerprint`).
    """

    name: str
    model: Model
    loop: EngineLoop
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.loop.context_length)

    def check_name(self, name: str) -> None:
        """ApiError for another model's name."""
        if name != self.name:
            said = f"no model {name!r} here; this server has {self.name!r}"
            raise ApiError(404, said, param="model", code="model_not_found")

    async def answer(self, request: ChatRequest, request_id: str) -> Pieces:
        """Submit `request`; ApiError or MedusaError when it is refused, before anything is sent."""
        self.check_name(request.model)
        messages = [message.as_turn() for message in request.messages]
        prompt_ids = await asyncio.to_thread(self.model.encode, messages)  # megabytes of text must not hold up streams
        params = sampling_params(request, room=self.loop.context_length - len(prompt_ids))
        engine_request = EngineRequest(prompt_ids=prompt_ids, params=params, request_id=request_id)
        return await self.loop.submit(engine_request, stop=request.stops)


def create_app(service: Service) -> FastAPI:
    """The application; starting and stopping `service.loop` is the caller's business."""
    app = FastAPI(title="Medusa on Ray", version=_version())
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    _answer_errors(app)

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        reply = Answer(
            request_id=request_id, created=int(time.time()), model=service.name, fingerprint=service.fingerprint
        )
        pieces = await service.answer(body, request_id)
        if body.stream:
            return EventStream(_events(pieces, reply, with_usage=body.wants_usage), release=pieces.aclose)
        whole = await unless_disconnected(_collect(pieces, reply), request)
        return Response(whole.model_dump_json(), media_type="application/json")

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[service.card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        service.check_name(name)
        return service.card

    @app.get("/health")
    async def health() -> dict[str, str]:
        service.loop.check_health()
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": _version()}

    return app


async def _collect(pieces: Pieces, reply: Answer) -> ChatCompletion:
    texts = []
    async with aclosing(pieces) as answer:
        async for piece in answer:
            texts.append(piece.text)
            if piece.completion is not None:
                return reply.whole("".join(texts), piece.completion)
    raise EngineUnavailable("the answer ended without a completion")


async def _events(pieces: Pieces, reply: Answer, *, with_usage: bool) -> AsyncGenerator[str]:
    """The answer as server-sent events: one per step that completed text, so the first token leaves at once.

    Headers have left when a step fails: the error travels as an event, and the stream ends without [DONE].
    """
    async with aclosing(pieces) as answer:
        yield event(reply.opening())
        try:
            async for piece in answer:
                if piece.text:
                    yield event(reply.text(piece.text))
                if piece.completion is not None:
                    yield event(reply.closing(piece.completion))
                    if with_usage:
                        yield event(reply.accounting(piece.completion))
                    yield DONE
        except MedusaError as error:
            yield _as_api_error(error).event()


def _as_api_error(error: MedusaError) -> ApiError:
    match error:
        case PromptError():
            return errors.bad_request(str(error), param="messages")
        case EngineOverloaded() | SlowReader():
            return errors.overloaded(str(error))
        case EngineUnavailable():
            return errors.unavailable(str(error))
    logger.error("unexpected %s: %s", type(error).__name__, error)
    return errors.internal()


def _answer_errors(app: FastAPI) -> None:
    """Every failure leaves as an OpenAI error object."""

    def reply(error: ApiError) -> Response:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return reply(error)

    @app.exception_handler(MedusaError)
    async def domain(_: Request, error: MedusaError) -> Response:
        return reply(_as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return reply(errors.from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = {404: f"no route {request.url.path}", 405: f"{request.method} is not allowed on {request.url.path}"}
        text = message.get(error.status_code, str(error.detail))
        return reply(ApiError(error.status_code, text, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        logger.error("request failed", exc_info=error)
        return reply(errors.internal())


class BodyLimit:
    """ASGI middleware: a request body over `max_bytes` is answered 413, whether its length was announced or not."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message: Any = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_bytes:
                raise HTTPException(413, f"the request body is larger than {self._max_bytes} bytes")
            return message

        await self._app(scope, counted, send)


def _version() -> str:
    try:
        return importlib.metadata.version("medusa-ray")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
