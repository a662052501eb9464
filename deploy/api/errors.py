"""OpenAI error objects: what a client is told when a request is refused or fails. Knows statuses; knows no routes.

A failure has one shape on the wire, `{"error": {"message", "type", "param", "code"}}`, in a response body and in a stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is answered with an error object. `param` names the field at fault, `code` the kind of fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients parse."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def event(self) -> str:
        """The same object as a server-sent event: how a stream that has begun says that it failed."""
        return f"data: {json.dumps(self.body(), ensure_ascii=False)}\n\n"


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can never work as it is."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, *, retry_after_s: int = 1) -> ApiError:
    """429: the same request may work later."""
    return ApiError(429, message, code="engine_overloaded", headers={"Retry-After": str(retry_after_s)})


def unavailable(message: str) -> ApiError:
    """503: this replica cannot answer; another may."""
    return ApiError(503, message, code="engine_unavailable")


def internal() -> ApiError:
    """500: a fault of ours. What went wrong stands in the log, not on the wire."""
    return ApiError(500, "the server failed to answer this request; its log says why", code="internal_error")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for the first of pydantic's `errors()`: a client repairs one field at a time."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "invalid JSON")
        return bad_request(f"the request body is not valid JSON: {reason}", code="invalid_json")
    # A validator of ours raised ValueError: its message already names the field, the value and the fix.
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UnsupportedField):
        return bad_request(str(cause), param=cause.field, code="unsupported_parameter")
    param = ".".join(path) or None
    if isinstance(cause, ValueError):
        return bad_request(str(cause), param=param)
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown request field {param!r}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"the field {param or 'body'!r} is required", param=param, code="missing_parameter")
    if not path and isinstance(first.get("input"), bytes):
        return bad_request("the request body must be sent with the header Content-Type: application/json")
    reason = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    return bad_request(f"{param or 'body'}: {reason}, got {_shown(first.get('input'))}", param=param)


class UnsupportedField(ValueError):
    """A field of the protocol that this server knows and does not do; raised inside validators."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def _shown(value: Any, limit: int = 80) -> str:
    """A value as an error message shows it: whole when short, never a megabyte."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
