"""A tiny random Llama with heads behind the real engine, loop and routes; a real HTTP server on loopback. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from starlette.types import ASGIApp

import medusa
from deploy.app import create_app
from deploy.engine_loop import EngineLoop, Piece
from deploy.metrics import Metrics
from deploy.service import Service
from medusa import Model
from medusa.detokenize import TextStream
from medusa.engine import Completion, Delta, Engine, Request, Stats
from medusa.logprobs import TokenLogprob
from pipelines.config import ServeSection
from tests.tiny_models import save_tiny_folder
from tests.unit.medusa.tiny import random_heads

CONTEXT = 256
BATCH = 4


class PacedEngine(Engine):
    """The engine, no faster than `pace_s` a step: what happens during an answer can be seen happening."""

    pace_s = 0.02

    def step(self) -> list[Delta]:
        time.sleep(self.pace_s)
        return super().step()


@pytest.fixture(scope="session")
def model(tiny_folder: Path) -> Model:
    """float32, three random heads, a chain as tree: greedy answers are exact, and some guesses come true."""
    plain = medusa.load(tiny_folder, heads=None, dtype="float32")
    return Model(plain.backbone, random_heads(plain.backbone))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another backbone of the same shape with heads of its own: what a MEDUSA-2 champion brings."""
    folder = save_tiny_folder(tmp_path_factory.mktemp("other") / "llama", "llama", seed=1)
    plain = medusa.load(folder, heads=None, dtype="float32")
    return Model(plain.backbone, random_heads(plain.backbone))


@pytest.fixture(scope="session")
def make_loop(model: Model) -> Callable[..., contextlib.AbstractContextManager[EngineLoop]]:
    """`with make_loop(engine_class, max_waiting=…) as loop`: a running loop, stopped after the block."""

    @contextlib.contextmanager
    def make(engine_class: type[Engine] = Engine, **options: float) -> Iterator[EngineLoop]:
        metrics = Metrics("tiny")

        def make_engine() -> Engine:
            return engine_class(
                model.backbone,
                model.heads,
                tree=model.tree,
                max_batch_size=BATCH,
                context_length=CONTEXT,
                on_step=metrics.step,
            )

        loop = EngineLoop(make_engine, model.backbone.tokenizer, metrics=metrics, **options).start()
        try:
            yield loop
        finally:
            loop.stop()

    return make


@contextlib.contextmanager
def http_server(app: ASGIApp) -> Iterator[str]:
    """`app` behind uvicorn on a free port of loopback; its base URL.

    Without WebSockets, which the service has none of: uvicorn 0.54 never answers a POST that asks for one.
    """
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return when `condition` holds; fail when it does not come to hold."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def serve_app(model: Model) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`with serve_app(loop, **settings) as url`; `settings` are keys of the configuration's section `serve`."""

    def start(loop: Any, **settings: Any) -> contextlib.AbstractContextManager[str]:
        service = Service(name="tiny", model=model, loop=loop, fingerprint="fp_test")
        return http_server(create_app(service, ServeSection(**settings)))

    return start


class ScriptedLoop:
    """In place of an engine loop: every answer is `token_ids`, one a step, whatever was asked; as many as choices.

    The text is a real text stream's. `pause_s` lies before each step; log-probability −k/4 is the k-th token's.
    """

    context_length = CONTEXT

    def __init__(self, tokenizer: Any, token_ids: Sequence[int], *, pause_s: float = 0.0) -> None:
        self.metrics = Metrics()
        self.requests: list[Request] = []
        self.closed = 0
        self._tokenizer = tokenizer
        self._token_ids = list(token_ids)
        self._pause_s = pause_s

    def check_health(self) -> None:
        """Always well."""

    def check_room(self, count: int) -> None:
        """Always room."""

    async def submit(
        self, request: Request, *, stop: Sequence[str] = (), lane: Any = None, beside: int = 0
    ) -> ScriptedAnswer:
        self.requests.append(request)
        return ScriptedAnswer(self, self._pieces(request, TextStream(self._tokenizer, stop)))

    async def _pieces(self, request: Request, text: TextStream) -> AsyncGenerator[Piece]:
        stats = Stats(prompt_tokens=len(request.prompt_ids), cached_tokens=1)
        for count, token in enumerate(self._token_ids, start=1):
            await asyncio.sleep(self._pause_s)
            text.push(token)
            stats.tokens_per_step.append(1)
            stats.nodes_per_step.append(3 if count > 1 else 0)
            piece = Piece(text=text.take(), token_ids=(token,))
            if request.params.logprobs is not None:
                top = tuple((other, -other / 8) for other in range(request.params.logprobs))
                piece = replace(piece, logprobs=(TokenLogprob(token_id=token, logprob=-count / 4, top=top),))
            if count == len(self._token_ids):
                ids = self._token_ids
                done = Completion(request_id=request.request_id, token_ids=ids, finish_reason="length", stats=stats)
                piece = replace(piece, text=piece.text + text.finish(), completion=done)
            yield piece


class ScriptedAnswer:
    """As `deploy.engine_loop.Answer`."""

    def __init__(self, loop: ScriptedLoop, pieces: AsyncGenerator[Piece]) -> None:
        self._loop = loop
        self._pieces = pieces
        self._open = True

    def __aiter__(self) -> ScriptedAnswer:
        return self

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    def cancel(self, reason: str) -> None:
        """The script goes on until it is closed."""

    async def aclose(self) -> None:
        self._loop.closed += self._open
        self._open = False
        await self._pieces.aclose()


@pytest.fixture(scope="session")
def url(make_loop: Callable, serve_app: Callable) -> Iterator[str]:
    """A server for every test that leaves none of its requests behind."""
    with make_loop() as loop, serve_app(loop) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client
