"""Requests as they should not be: fuzzed bodies and headers, cut and slow connections. Knows bytes and sockets.

Each kind is a few lines; what a kind sends is a function of a seed. `answers_well` is the law: nothing is answered 500,
and what the application answers is an OpenAI error object. Only for hosts of one's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving_client import is_error_object

LIMIT_S = 20.0
SLOW_S = 1.5  # how long a slow reader or writer lingers
HUGE_BYTES = 6 * 2**20
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 1e308, "", "x", "\ud800", [], [[]], {}, {"a": {}}, [None], "a" * 10_000, -0.0, [1] * 50,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What is sent over one connection. `split` bytes go first, the rest later; `half_close` ends our side behind them;
    `read` false never reads an answer."""

    kind: str
    payload: bytes
    split: int | None = None
    half_close: bool = False
    read: bool = True


@dataclass(frozen=True, kw_only=True)
class Reply:
    """`status` None: the connection was closed without an answer, which for these is an answer too."""

    kind: str
    status: int | None
    body: str = ""
    timed_out: bool = False


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts over all replies, and the first of those that break the law."""

    sent: int
    statuses: dict[str, int]
    bad: int
    timed_out: int
    first_bad: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, replies: list[Reply]) -> Tally:
        bad = [one for one in replies if not answers_well(one)]
        return cls(
            sent=len(replies),
            statuses=dict(Counter(f"{one.kind}: {one.status or 'closed'}" for one in replies)),
            bad=len(bad),
            timed_out=sum(one.timed_out for one in replies),
            first_bad=[f"{one.kind}: {one.status} {one.body[:200]}" for one in bad[:5]],
        )


def answers_well(reply: Reply) -> bool:
    """No fault of the server's; and where JSON came, it is an error object. A bare 400 is the HTTP parser's own."""
    if reply.status is None or reply.status < 400:
        return True
    if reply.status >= 500 and reply.status != 503:
        return False
    return is_error_object(reply.body) if reply.body.startswith("{") else reply.status in (400, 408, 413, 431)


def http_request(
    body: bytes, *, headers: Mapping[str, str] | None = None, method: str = "POST", path: str = "/v1/chat/completions"
) -> bytes:
    """The bytes of a request; `headers` go over those that a client would send."""
    said = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in {**said, **(headers or {})}.items())]
    return "\r\n".join(lines).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body


def good_body(name: str, /, **fields: Any) -> dict[str, Any]:
    """What model `name` would answer, but for `fields`."""
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": name, "messages": messages, "max_tokens": 4, "temperature": 0, **fields}


def encode(body: Any) -> bytes:
    return json.dumps(body).encode()


def _bad_field(draw: random.Random, model: str) -> Attack:
    names = ["model", "messages", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "n", "logit_bias",
             "response_format", "stream_options", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty",
             "top_k", "tree_nodes", "acceptance", "epsilon", "delta", "unknown"]  # fmt: skip
    body = good_body(model, **{draw.choice(names): draw.choice(VALUES) for _ in range(draw.randint(1, 3))})
    return Attack(kind="field", payload=http_request(encode(body)))


def _bad_message(draw: random.Random, model: str) -> Attack:
    message = {
        "role": draw.choice(["user", "tool", 7, None]),
        "content": draw.choice(VALUES),
        "extra": draw.choice(VALUES),
    }
    return Attack(
        kind="message", payload=http_request(encode(good_body(model, messages=[message] * draw.randint(0, 5))))
    )


def _flipped_bytes(draw: random.Random, model: str) -> Attack:
    body = bytearray(encode(good_body(model)))
    for _ in range(draw.randint(1, 8)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    return Attack(kind="bytes", payload=http_request(bytes(body)))


def _bad_json(draw: random.Random, model: str) -> Attack:
    body = draw.choice([b"", b"{", b"nul", b"NaN", b"[" * 20_000, b'{"a":' * 5_000, b"\xff\xfe{}", b'"text"', b"[]", b"1e999",
                        b'{"model": "m", "model": 1}', encode(good_body(model))[:-5]])  # fmt: skip
    return Attack(kind="json", payload=http_request(body))


def _bad_header(draw: random.Random, model: str) -> Attack:
    headers = draw.choice([
        {"Content-Length": "-5"}, {"Content-Length": "abc"}, {"Transfer-Encoding": "chunked"}, {"Content-Type": "text/plain"},
        {"Content-Type": ""}, {"X-Long": "a" * 200_000}, {"Authorization": "Bearer " + "k" * 5_000}, {"Expect": "nonsense"},
        {"Authorization": "\udcff"}, {"Content-Encoding": "gzip"}, {"Host": ""}, {"x-request-id": "é" * 300},
        {"Upgrade": "websocket", "Connection": "Upgrade"},
    ])  # fmt: skip
    return Attack(kind="header", payload=http_request(encode(good_body(model)), headers=headers))


def _bad_line(draw: random.Random, model: str) -> Attack:
    methods, paths = (
        ["GET", "PUT", "BREW", "post", ""],
        ["/", "/v1/chat/completions/", "/%00", "/../etc", "/" + "a" * 70_000, "*"],
    )
    payload = http_request(b"", method=draw.choice(methods), path=draw.choice([*paths, "/v1/chat/completions"]))
    if draw.random() < 0.3:
        payload = payload.replace(b"HTTP/1.1", draw.choice([b"HTTP/9.9", b"", b"SMTP"]), 1)
    return Attack(kind="line", payload=payload)


def _noise(draw: random.Random, model: str) -> Attack:
    return Attack(kind="noise", payload=draw.randbytes(draw.randint(1, 2_000)), half_close=True)


def _truncated(draw: random.Random, model: str) -> Attack:
    payload = http_request(encode(good_body(model)))
    return Attack(kind="truncated", payload=payload[: draw.randrange(1, len(payload))], half_close=True)


def _half_closed(draw: random.Random, model: str) -> Attack:
    """Whole, but our side of the connection ends at once; the server may answer or take it for gone."""
    return Attack(kind="half-closed", payload=http_request(encode(good_body(model, stream=True))), half_close=True)


def _gone(draw: random.Random, model: str) -> Attack:
    body = good_body(model, stream=True, max_tokens=64, ignore_eos=True)
    return Attack(kind="gone", payload=http_request(encode(body)), read=False)


def _slow_writer(draw: random.Random, model: str) -> Attack:
    payload = http_request(encode(good_body(model)))
    return Attack(kind="slow writer", payload=payload, split=draw.randrange(1, len(payload)))


def _huge(draw: random.Random, model: str) -> Attack:
    body = encode(good_body(model, messages=[{"role": "user", "content": "a" * HUGE_BYTES}]))
    if draw.random() < 0.5:
        return Attack(kind="huge", payload=http_request(body))
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    headers = {"Transfer-Encoding": "chunked"}
    return Attack(
        kind="huge", payload=http_request(b"", headers=headers).replace(b"Content-Length: 0\r\n", b"") + chunk
    )


def _stalled_reader(draw: random.Random, model: str) -> Attack:
    """A long answer whose reader takes nothing for a while, then leaves."""
    body = good_body(model, stream=True, max_tokens=64, ignore_eos=True)
    return Attack(kind="slow reader", payload=http_request(encode(body)), read=False, split=0)


KINDS: dict[Callable[[random.Random, str], Attack], float] = {
    _bad_field: 30, _bad_message: 14, _flipped_bytes: 14, _bad_json: 10, _bad_header: 10, _bad_line: 8, _noise: 4,
    _truncated: 4, _half_closed: 2, _gone: 2, _slow_writer: 1, _stalled_reader: 0.5, _huge: 0.5,
}  # fmt: skip


def attacks(count: int, *, model: str, seed: int) -> list[Attack]:
    """`count` attacks, mixed; each kind once at least where there is room."""
    draw = random.Random(seed)
    kinds = [*KINDS, *draw.choices(list(KINDS), weights=list(KINDS.values()), k=count)][:count]
    return [kind(draw, model) for kind in kinds]


async def send(url: str, attack: Attack) -> Reply:
    """Carry out one attack. Never raises for what the server does."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                return await _exchange(reader, writer, attack)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except TimeoutError:
        return Reply(kind=attack.kind, status=None, timed_out=True)
    except OSError:  # the server closed on us
        return Reply(kind=attack.kind, status=None)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, attack: Attack) -> Reply:
    if attack.split:
        writer.write(attack.payload[: attack.split])
        await asyncio.sleep(SLOW_S)
    with contextlib.suppress(OSError):  # an answer may lie there although the rest was not taken
        writer.write(attack.payload[attack.split or 0 :])
        await writer.drain()
        if attack.half_close:
            writer.write_eof()
    if not attack.read:
        await asyncio.sleep(SLOW_S if attack.split == 0 else 0.05)
        return Reply(kind=attack.kind, status=None)
    first = await reader.read(2**16)
    reply = parse(attack.kind, first)
    if reply.status is None or reply.status < 400:
        return reply  # an answer after all: it is left unread, which cancels it
    return parse(attack.kind, first + await reader.read())


def parse(kind: str, answer: bytes) -> Reply:
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split()
    status = int(words[1]) if len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit() else None
    return Reply(kind=kind, status=status, body=body.decode(errors="replace"))


async def send_all(url: str, what: list[Attack], *, at_once: int = 32) -> list[Reply]:
    """All of `what`, so many at once."""
    room = asyncio.Semaphore(at_once)

    async def one(attack: Attack) -> Reply:
        async with room:
            return await send(url, attack)

    return list(await asyncio.gather(*map(one, what)))
