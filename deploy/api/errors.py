"""OpenAI error objects: what a client is told when a request is refused or fails. Knows statuses; knows no routes.

A failure has one shape on the wire, `{"error": {"message", "type", "param", "code"}}`, in a response body and in a stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.config import reason_of

_TYPES = {
    408: "timeout_error",
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
        return {
            "error": {
                "message": _sendable(self.message),
                "type": kind,
                "param": _sendable(self.param),
                "code": self.code,
            }
        }

    def event(self) -> str:
        """The same object as a server-sent event: how a stream that has begun says that it failed."""
        return f"data: {json.dumps(self.body(), ensure_ascii=False)}\n\n"


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can never work as it is."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, *, retry_after_s: int = 1) -> ApiError:
    """429: the same request may work later."""
    return ApiError(429, message, code="engine_overloaded", headers={"Retry-After": str(retry_after_s)})


def unauthorized(message: str) -> ApiError:
    """401: no key, or none of ours."""
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def timed_out(message: str) -> ApiError:
    """408: it took longer than a request may. Asked again it would most likely take as long, so clients should not."""
    return ApiError(408, message, code="request_timeout", headers={"x-should-retry": "false"})


def unavailable(message: str) -> ApiError:
    """503: this replica cannot answer; another may."""
    return ApiError(503, message, code="engine_unavailable")


def internal() -> ApiError:
    """500: a fault of ours. What went wrong stands in the log, not on the wire."""
    return ApiError(500, "the server failed to answer this request; its log says why", code="internal_error")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for the first field that pydantic's `errors()` name: a client repairs one at a time. Places begin with "body".

    A union gives errors of each of its members; the one that came deepest, or whose type it is, the client meant.
    """
    of_one_field = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    first = max(of_one_field, key=lambda error: (len(_path(error)), not error["type"].endswith("_type")))
    path = _path(first)
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
        said = f"the field {param!r} is required" if path else "the request has no body; send a JSON object"
        return bad_request(said, param=param, code="missing_parameter")
    if not path and isinstance(first.get("input"), bytes):
        return bad_request("the request body must be sent with the header Content-Type: application/json")
    return bad_request(f"{param or 'body'}: {reason_of(first)}, got {_shown(first.get('input'))}", param=param)


def _path(error: Mapping[str, Any]) -> list[str]:
    """Where a client finds the fault: without the union's members that pydantic names, `stop.list[constrained-str].0`."""
    return [str(part) for part in error["loc"][1:] if not _names_a_type(part)]


def _names_a_type(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("str", "constrained-str"))


class UnsupportedField(ValueError):
    """A field of the protocol that this server knows and does not do; raised inside validators."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def _sendable(text: str | None) -> str | None:
    """JSON may name half of a surrogate pair, which UTF-8 cannot; an error that quotes it must still leave."""
    return text and text.encode(errors="backslashreplace").decode()


def _shown(value: Any, limit: int = 80) -> str:
    """A value as an error message shows it: whole when short, never a megabyte."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
