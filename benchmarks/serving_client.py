"""One request of a load test, timed and judged. Knows OpenAI's streaming protocol, whoever speaks it; measures no load."""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from benchmarks.prompts import Prompt

READ_BYTES = 2**20  # the longest line of a stream that is read


class Ending(enum.StrEnum):
    """How a request ended, as its client sees it."""

    FINISHED = "finished"  # an answer with its finish_reason and [DONE]
    REFUSED = "refused"  # 429 with Retry-After and an error object: come back later
    ERROR = "error"  # an error object, as the response or as the last event of a stream
    CUT = "cut"  # no connection, or one that broke: every client notices
    SILENT = "silent"  # a response that ended in good order and lacks its end: no client notices
    IMPROPER = "improper"  # an answer, a refusal or an error that OpenAI's clients cannot read
    LATE = "late"  # nothing more came within the time limit


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask, and what every request holds beside its messages."""

    url: str
    model: str
    max_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    timeout_s: float = 300.0

    def body(self, prompt: Prompt) -> dict[str, Any]:
        return {
            "model": self.model, "messages": list(prompt.messages), "max_tokens": self.max_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}, **self.extra,
        }  # fmt: skip

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request. Times are of `time.perf_counter`; `gaps_s` lie between pieces of text, of which each may hold several
    tokens; `num_tokens` is the server's own count."""

    ending: Ending
    prompt: str
    began: float
    ended: float
    first_text: float | None = None
    gaps_s: tuple[float, ...] = ()
    text: str = ""
    num_tokens: int = 0
    status: int | None = None
    retry_after_s: float = 0.0
    detail: str = ""


def require_own_host(url: str, *, owned: bool) -> None:
    """ValueError for a host other than this machine, unless its owner says so: load is sent to nobody else's server."""
    host = urlsplit(url).hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or owned):
        raise ValueError(
            f"{host or url!r} is not this machine; pass --i-own-this-host to send load to a server of yours"
        )


def session() -> aiohttp.ClientSession:
    """Connections without a limit of their own: how many requests are open is the load's business."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=READ_BYTES)


async def first_model(http: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> str:
    """The first model that the server lists."""
    async with http.get(f"{url}/v1/models", headers=headers) as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


async def ask(http: aiohttp.ClientSession, endpoint: Endpoint, prompt: Prompt) -> Outcome:
    """Ask once and read to the end. Never raises for what a server does."""
    began, body = time.perf_counter(), endpoint.body(prompt)
    stream = _Stream()

    def outcome(ending: Ending, detail: str = "", **known: Any) -> Outcome:
        return Outcome(
            ending=ending, detail=detail, prompt=prompt.id, began=began, ended=time.perf_counter(),
            first_text=stream.times[0] if stream.times else None, text="".join(stream.texts),
            gaps_s=tuple(b - a for a, b in zip(stream.times, stream.times[1:], strict=False)),
            num_tokens=stream.num_tokens, **known,
        )  # fmt: skip

    try:
        async with (
            asyncio.timeout(endpoint.timeout_s),
            http.post(f"{endpoint.url}/v1/chat/completions", json=body, headers=endpoint.headers) as response,
        ):
            if response.status != 200:
                ending, wait_s = _judge_refusal(response.status, response.headers, text := await response.text())
                return outcome(ending, text[:200], status=response.status, retry_after_s=wait_s)
            async for line in response.content:
                stream.take(line)
            return outcome(stream.ending(), stream.error, status=200)
    except TimeoutError:
        return outcome(Ending.LATE, f"nothing more within {endpoint.timeout_s:g} s")
    except (aiohttp.ClientError, OSError) as error:
        return outcome(Ending.CUT, f"{type(error).__name__}: {error}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # no JSON, or not of the protocol's shape
        return outcome(Ending.IMPROPER, f"{type(error).__name__}: {error}")


def is_error_object(text: str) -> bool:
    """Whether `text` is the JSON that OpenAI's clients raise from."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return (
        isinstance(error, dict) and isinstance(error.get("message"), str) and {"type", "param", "code"} <= error.keys()
    )


def _judge_refusal(status: int, headers: Mapping[str, str], text: str) -> tuple[Ending, float]:
    """What a response other than 200 is, and how many seconds it asks to wait."""
    if not is_error_object(text):
        return Ending.IMPROPER, 0.0
    if status != 429:
        return Ending.ERROR, 0.0
    wait = headers.get("Retry-After", "")
    return (Ending.REFUSED, float(wait)) if wait.isdigit() else (Ending.IMPROPER, 0.0)


class _Stream:
    """What server-sent events have said so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.times: list[float] = []
        self.num_tokens = 0
        self.error = ""
        self._finished = False
        self._done = False

    def take(self, line: bytes) -> None:
        data = line.removeprefix(b"data:").strip()
        if not data or data == line.strip():  # blank, or a comment
            return
        if data == b"[DONE]":
            self._done = True
            return
        said = json.loads(data)
        if "error" in said:
            self.error = json.dumps(said)
            return
        self.num_tokens = (said.get("usage") or {}).get("completion_tokens", self.num_tokens)
        for choice in said["choices"]:
            self._finished = self._finished or choice.get("finish_reason") is not None
            if text := choice["delta"].get("content"):
                self.texts.append(text)
                self.times.append(time.perf_counter())

    def ending(self) -> Ending:
        if self.error:
            return Ending.ERROR if is_error_object(self.error) else Ending.IMPROPER
        return Ending.FINISHED if self._done and self._finished else Ending.SILENT
