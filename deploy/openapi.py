"""Our own OpenAPI document: every status that a route answers, with its body. Knows FastAPI's generator; knows no engine."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from deploy.api.protocol import ErrorBody

Responses = dict[int | str, dict[str, Any]]

_MEANING = {
    400: "A field is missing, wrong, unknown or not supported; `param` names it. OpenAI sends this where others send 422.",
    401: "No API key, or none of this server's.",
    404: "No such model.",
    408: "The request took longer than one may.",
    413: "The request body is too large.",
    429: "As many requests are in flight as may; Retry-After says when to come back.",
    500: "A fault of the server's.",
    503: "The engine cannot answer.",
}
COMMON = (401, 500)
GENERATION = (400, 401, 404, 408, 413, 429, 500, 503)
# The schema is that of one event, as OpenAPI's readers take it.
STREAM = {
    "text/event-stream": {
        "schema": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    }
}


def refusals(*statuses: int) -> Responses:
    """What a route declares besides its answer: an OpenAI error object for each status."""
    return {status: {"description": _MEANING[status], "model": ErrorBody} for status in statuses}


def describe(app: FastAPI, *, with_keys: bool) -> None:
    """Make `app` serve the document without FastAPI's own 422, which is never sent, and with the keys it asks for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _written(app, with_keys=with_keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _written(app: FastAPI, *, with_keys: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for unused in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(unused, None)
    if with_keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return schema
