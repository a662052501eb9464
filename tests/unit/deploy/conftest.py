"""A tiny random Llama with heads behind the real engine, loop and routes; a real HTTP server on loopback. No Ray."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import uvicorn
from fastapi import FastAPI

import medusa
from deploy.app import create_app
from deploy.engine_loop import EngineLoop
from deploy.service import Service
from medusa import Model
from medusa.engine import Delta, Engine
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
        def make_engine() -> Engine:
            return engine_class(
                model.backbone, model.heads, tree=model.tree, max_batch_size=BATCH, context_length=CONTEXT
            )

        loop = EngineLoop(make_engine, model.backbone.tokenizer, **options).start()
        try:
            yield loop
        finally:
            loop.stop()

    return make


@contextlib.contextmanager
def http_server(app: FastAPI) -> Iterator[str]:
    """`app` behind uvicorn on a free port of loopback; its base URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
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
def serve_app(model: Model) -> Callable[[EngineLoop], contextlib.AbstractContextManager[str]]:
    """`with serve_app(loop) as url`."""

    def start(loop: EngineLoop) -> contextlib.AbstractContextManager[str]:
        return http_server(create_app(Service(name="tiny", model=model, loop=loop, fingerprint="fp_test")))

    return start


@pytest.fixture(scope="session")
def url(make_loop: Callable, serve_app: Callable) -> Iterator[str]:
    """A server for every test that leaves none of its requests behind."""
    with make_loop() as loop, serve_app(loop) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30) as client:
        yield client
