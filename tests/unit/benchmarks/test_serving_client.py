"""How a request ended, against a server that says exactly what a case wants said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.prompts import Prompt
from benchmarks.serving_client import Ending, Endpoint, Outcome, ask, require_own_host, session

PROMPT = Prompt(id="p", category="all", messages=({"role": "user", "content": "Hello"},))
ERROR = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": None}}


def events(*items: object, status: str = "200 OK") -> bytes:
    data = "".join(f"data: {item if isinstance(item, str) else json.dumps(item)}\n\n" for item in items).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)


def refusal(status: str, body: object, *headers: str) -> bytes:
    data = json.dumps(body).encode() if not isinstance(body, str) else body.encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def said(text: str) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": None}]}


LAST = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 5}}
WHOLE = events(said("a"), said("bc"), LAST, USAGE, "[DONE]")


@asynccontextmanager
async def canned(answer: bytes, *, hang: bool = False) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if hang:
            await asyncio.sleep(5)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def outcome(answer: bytes, *, hang: bool = False) -> Outcome:
    async def once() -> Outcome:
        async with canned(answer, hang=hang) as url, session() as http:
            return await ask(http, Endpoint(url=url, model="m", max_tokens=9, timeout_s=0.5), PROMPT)

    return asyncio.run(once())


def test_a_whole_answer() -> None:
    one = outcome(WHOLE)
    assert (one.ending, one.text, one.num_tokens, len(one.gaps_s)) == (Ending.FINISHED, "abc", 5, 1)
    assert one.first_text is not None
    assert one.began < one.first_text <= one.ended


@pytest.mark.parametrize(
    ("answer", "ending"),
    [
        (refusal("429 Too Many Requests", ERROR, "Retry-After: 2"), Ending.REFUSED),
        (refusal("429 Too Many Requests", ERROR), Ending.IMPROPER),
        (refusal("429 Too Many Requests", ERROR, "Retry-After: soon"), Ending.IMPROPER),
        (refusal("429 Too Many Requests", "slow down", "Retry-After: 2"), Ending.IMPROPER),
        (refusal("503 Service Unavailable", ERROR), Ending.ERROR),
        (refusal("500 Internal Server Error", "Internal Server Error"), Ending.IMPROPER),
        (events(said("a"), ERROR), Ending.ERROR),
        (events(said("a"), {"error": "text"}), Ending.IMPROPER),
        (events(said("a")), Ending.SILENT),
        (events(said("a"), "[DONE]"), Ending.SILENT),
        (events("{"), Ending.IMPROPER),
        (events([1]), Ending.IMPROPER),
        (events({"id": "x"}), Ending.IMPROPER),
        (events({"choices": [{}]}), Ending.IMPROPER),
        (events({"choices": None}), Ending.IMPROPER),
        (WHOLE.replace(b'"bc"', b'"\xff\xfe"'), Ending.IMPROPER),
        (WHOLE[:-20], Ending.CUT),
        (b"", Ending.CUT),
    ],
)
def test_every_other_ending(answer: bytes, ending: Ending) -> None:
    assert outcome(answer).ending is ending


def test_a_refused_client_learns_when_to_come_back() -> None:
    assert outcome(refusal("429 Too Many Requests", ERROR, "Retry-After: 2")).retry_after_s == 2


def test_a_server_that_falls_silent_is_late() -> None:
    assert outcome(WHOLE[:-60], hang=True).ending is Ending.LATE


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.9.9.9", "http://[::1]:80", "http://localhost:8000"])
def test_this_machine_may_be_loaded(url: str) -> None:
    require_own_host(url, owned=False)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1", "https://example.com/v1", "localhost", "http://127.0.0.1.example.com"]
)
def test_another_host_must_be_owned(url: str) -> None:
    with pytest.raises(ValueError, match="--i-own-this-host"):
        require_own_host(url, owned=False)
    require_own_host(url, owned=True)
