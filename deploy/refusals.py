"""Every failure leaves as an OpenAI error object: which error becomes which status. Knows FastAPI's handlers."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from deploy.api import errors
from deploy.api.errors import ApiError
from deploy.errors import EngineOverloaded, EngineUnavailable, GrammarFailed, SlowReader
from medusa.errors import MedusaError

logger = logging.getLogger(__name__)


def as_api_error(error: MedusaError) -> ApiError:
    """What a client is told of an error of the domain. A PromptError was told already, by the name of its field."""
    match error:
        case EngineOverloaded():
            return errors.overloaded(str(error), retry_after_s=math.ceil(error.retry_after_s))
        case SlowReader():
            return errors.overloaded(str(error))
        case GrammarFailed():
            return errors.bad_request(f"{error}; give a simpler one", param="response_format")
        case EngineUnavailable():
            return errors.unavailable(str(error))
    logger.error("unexpected %s: %s", type(error).__name__, error)
    return errors.internal()


def as_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def answer_errors(app: FastAPI) -> None:
    """Register what `app` does about the errors that its routes raise; faults are the outermost middleware's."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return as_response(error)

    @app.exception_handler(MedusaError)
    async def domain(_: Request, error: MedusaError) -> Response:
        return as_response(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return as_response(errors.from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = {404: f"no route {request.url.path}", 405: f"{request.method} is not allowed on {request.url.path}"}
        text = message.get(error.status_code, str(error.detail))
        return as_response(ApiError(error.status_code, text, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it
