"""Each response and its line in the access log share an id; the line is JSON and says nothing of what was asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deploy.app import create_app
from deploy.service import Service
from medusa import Model
from tests.unit.deploy.conftest import ScriptedLoop, http_server, wait_until

ASK: dict[str, Any] = {"model": "tiny", "prompt": "a secret question"}


@pytest.fixture
def loop(model: Model) -> ScriptedLoop:
    return ScriptedLoop(model.backbone.tokenizer, [70, 71, 72])


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[dict[str, Any]]]:
    """The access log once it has so many lines: a line is written after its client has read the answer."""
    caplog.set_level(logging.INFO, logger="deploy.access")

    def read(count: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(caplog.records) >= count)
        return [json.loads(record.getMessage()) for record in caplog.records if record.name == "deploy.access"]

    return read


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/v1/completions"])
def test_a_clients_id_comes_back(url: str, path: str) -> None:
    response = httpx.get(f"{url}{path}", headers={"x-request-id": "trace-1.2:3_4"})
    assert response.headers.get_list("x-request-id") == ["trace-1.2:3_4"]


@pytest.mark.parametrize("sent", [None, "", "with space", "x" * 129, 'quote"', "{}"])
def test_no_id_or_a_bad_one_is_replaced(url: str, sent: str | None) -> None:
    first, second = (
        httpx.get(f"{url}/health", headers={} if sent is None else {"x-request-id": sent}) for _ in range(2)
    )
    made = [response.headers["x-request-id"] for response in (first, second)]
    assert sent not in made
    assert made[0] != made[1]
    assert all(len(each) == 32 for each in made)


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_tells_how_it_went_and_not_what_was_asked(
    loop: ScriptedLoop, serve_app: Callable, lines: Callable, stream: bool
) -> None:
    with serve_app(loop) as url:
        response = httpx.post(f"{url}/v1/completions", json={**ASK, "n": 2, "stream": stream})
        (line,) = lines(1)
    expected = {
        "request_id": response.headers["x-request-id"], "method": "POST", "path": "/v1/completions", "status": 200,
        "client": "127.0.0.1", "stream": stream, "choices": 2, "completion_tokens": 6, "finish_reasons": ["length"] * 2,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line["id"].startswith("cmpl-")
    assert 0 < line["first_byte_s"] <= line["duration_s"]
    assert "secret" not in json.dumps(line)


def test_prompts_are_logged_where_that_is_configured(loop: ScriptedLoop, serve_app: Callable, lines: Callable) -> None:
    with serve_app(loop, log_prompts=True) as url:
        httpx.post(f"{url}/v1/completions", json=ASK)
        (line,) = lines(1)
    assert line["prompts"] == [ASK["prompt"]]


def test_refusals_have_lines_too_and_they_can_be_switched_off(
    loop: ScriptedLoop, serve_app: Callable, lines: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    with serve_app(loop) as url:
        httpx.post(f"{url}/v1/completions", json={**ASK, "surprise": "secret"})
        (line,) = lines(1)
    assert line["status"] == 400
    assert "secret" not in json.dumps(line)
    caplog.clear()
    with serve_app(loop, access_log=False) as url:
        httpx.post(f"{url}/v1/completions", json=ASK)
    assert lines(0) == []


def test_a_fault_of_ours_has_an_id_that_the_log_knows(
    model: Model, loop: ScriptedLoop, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Model):
        def encode(self, prompt: Any) -> list[int]:
            raise RuntimeError("the cause")

    app = create_app(Service(name="tiny", model=Broken(model.backbone, None), loop=loop, fingerprint="fp"))  # type: ignore[arg-type]
    with http_server(app) as url:
        response = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        )
    assert response.status_code == 500
    (fault,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert response.headers["x-request-id"] in fault.getMessage()
    assert fault.exc_info is not None


def test_behind_a_proxy_the_id_is_the_proxys_to_send(model: Model, loop: ScriptedLoop) -> None:
    service = Service(name="tiny", model=model, loop=loop, fingerprint="fp")  # type: ignore[arg-type]
    with http_server(create_app(service, behind_proxy=True)) as url:
        assert "x-request-id" not in httpx.get(f"{url}/health").headers
