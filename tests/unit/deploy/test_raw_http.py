"""The server over bare sockets: what no well-behaved client sends, and clients that leave in the middle. Never a 500."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from medusa import Model
from tests.unit.deploy.conftest import PacedEngine, ScriptedLoop, wait_until

BODY = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 8, "temperature": 0}).encode()


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def post(body: bytes, *headers: str, path: str = "/v1/completions", length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body) if length is None else length}", "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def exchange(url: str, sent: bytes) -> tuple[int, bytes]:
    """Status and body of the one answer to `sent`."""
    with connect(url) as connection:
        connection.sendall(sent)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def test_a_plain_request_is_answered(url: str) -> None:
    status, body = exchange(url, post(BODY))
    assert status == 200
    assert json.loads(body)["object"] == "text_completion"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\udfff", "prompt": "x"}',
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "x", "stop": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "x", "seed": 1e400}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "x", "logit_bias": {"5": NaN}}',
        b'{"model": "tiny", "prompt": [1, 2, ' + b"9" * 400 + b"]}",
        b'{"model": "tiny", "prompt": {"a": 1}}',
        b"\xef\xbb\xbf{}",
        b"\x00" * 100,
        b"\xff" * 100,
        BODY[:-10],
    ],
    ids=range(17),
)
def test_a_body_from_hell_is_a_refusal_in_our_words(url: str, body: bytes) -> None:
    status, answer = exchange(url, post(body))
    assert status in (400, 404)
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_a_prompt_with_a_nul_is_a_prompt(url: str) -> None:
    assert exchange(url, post(BODY.replace(b"Hi", b"\\u0000\\u2028")))[0] == 200


@pytest.mark.parametrize(
    "path", ["/%00", "/v1/models/%FF%FE", "/v1//models", "/v1/models/../models", "/" + "x" * 8000, "/%"]
)
def test_odd_paths_are_404s(url: str, path: str) -> None:
    status, answer = exchange(url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert status == 404
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "header", ["Authorization: \xff\xfe", "X-Request-Id: \xff", "Accept: " + "x" * 5000, "Cookie: ;=;"]
)
def test_odd_headers_do_no_harm(url: str, header: str) -> None:
    with connect(url) as connection:
        connection.sendall(post(BODY, "X: y").replace(b"X: y", header.encode("latin-1")))
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_body_that_trickles_is_cut_off(model: Model, serve_app: Callable) -> None:
    with (
        serve_app(ScriptedLoop(model.backbone.tokenizer, [70]), request_timeout_s=0.3) as url,
        connect(url) as connection,
    ):
        connection.sendall(post(b"{", length=1000))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not come within 0.3 s" in answer


def test_the_configured_body_limit_holds(model: Model, serve_app: Callable) -> None:
    with serve_app(ScriptedLoop(model.backbone.tokenizer, [70]), max_body_bytes=200) as url:
        assert exchange(url, post(BODY))[0] == 200
        assert exchange(url, post(BODY + b" " * 200))[0] == 413


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [socket.socket.close, half_close])
def test_who_leaves_in_the_middle_frees_the_slot(
    make_loop: Callable, serve_app: Callable, leave: Callable[[socket.socket], None]
) -> None:
    ask: dict[str, Any] = {
        "model": "tiny",
        "prompt": "Hi",
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
        "n": 3,
    }
    with make_loop(PacedEngine) as loop, serve_app(loop) as url:
        with connect(url) as connection:
            connection.sendall(post(json.dumps(ask).encode()))
            assert b"data: " in connection.recv(65536) + connection.recv(65536)
            leave(connection)
            wait_until(lambda: loop.num_in_flight == 0, timeout_s=2)
        assert httpx.get(f"{url}/health").status_code == 200


def test_who_leaves_within_the_body_costs_nothing(make_loop: Callable, serve_app: Callable) -> None:
    with make_loop() as loop, serve_app(loop) as url:
        for _ in range(10):
            with connect(url) as connection:
                connection.sendall(post(BODY, length=10_000))
        assert exchange(url, post(BODY))[0] == 200
        assert loop.num_in_flight == 0
