"""The routes, asked over real HTTP by httpx and the openai client: answers, streams, refusals, clients that leave."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest

from deploy.app import create_app
from deploy.request_log import access_logger
from deploy.service import Service
from medusa import Model
from medusa.engine import Delta, Engine
from pipelines.config import ServeSection
from tests.unit.deploy.conftest import BATCH, CONTEXT, PacedEngine, http_server, wait_until

MESSAGES: list[Any] = [{"role": "user", "content": "Why is the sky blue?"}]
ASK: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}


class Failing(Engine):
    def step(self) -> list[Delta]:
        raise RuntimeError("the device is gone")


def events(response: httpx.Response) -> Iterator[str]:
    """The data of each server-sent event, as it arrives."""
    for line in response.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield line.removeprefix("data: ")


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return body["error"]


@pytest.fixture
def expected(model: Model) -> Any:
    return model.generate(MESSAGES, max_tokens=24)


def test_an_answer_equals_the_models(client: openai.OpenAI, expected: Any, model: Model) -> None:
    answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens == len(model.encode(MESSAGES))
    assert answer.model == "tiny"
    assert answer.system_fingerprint == "fp_test"


def test_a_stream_carries_the_same_answer(client: openai.OpenAI, expected: Any) -> None:
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    *answer, last = chunks
    assert answer[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == expected.text
    assert [c.choices[0].finish_reason for c in answer] == [None] * (len(answer) - 1) + [expected.finish_reason]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_ends_with_done(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ASK, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response)
    assert done == "[DONE]"
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


def test_text_leaves_as_it_is_decoded(make_loop: Callable, serve_app: Callable) -> None:
    """The first text arrives with nearly the whole answer still to come."""
    with make_loop(PacedEngine) as loop, serve_app(loop) as url:
        asked = {**ASK, "max_tokens": 60, "stream": True, "ignore_eos": True}
        began, arrivals = time.monotonic(), []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked) as response:
            for data in events(response):
                if data != "[DONE]" and json.loads(data)["choices"][0]["delta"].get("content"):
                    arrivals.append(time.monotonic() - began)
    assert len(arrivals) > 10
    assert arrivals[0] < arrivals[-1] / 3


def test_a_stop_string_is_honoured(client: openai.OpenAI, expected: Any) -> None:
    stop = expected.text[4:7]
    answer = client.chat.completions.create(**ASK, stop=stop)
    assert answer.choices[0].message.content == expected.text[: expected.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> str | None:
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, **fields}
        return client.chat.completions.create(**asked).choices[0].message.content

    assert ask(seed=7) == ask(seed=7)
    assert ask() != ask()


def test_our_fields_through_the_openai_client(client: openai.OpenAI) -> None:
    sampled = {**ASK, "temperature": 0.8, "seed": 3}
    for extra in ({"acceptance": "typical", "epsilon": 0.3, "delta": 0.5}, {"acceptance": "rejection", "top_k": 7}):
        assert client.chat.completions.create(**sampled, extra_body=extra).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="acceptance"):
        client.chat.completions.create(**sampled, extra_body={"acceptance": "lucky"})


def test_max_tokens_defaults_to_what_the_context_leaves(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


def test_models_health_version(client: openai.OpenAI, url: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-5'"):
        client.models.retrieve("gpt-5")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/version").json()["version"]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"n": 17}, 400, "n", None),
        ({"logit_bias": {"300": 1}}, 400, "logit_bias", None),
        ({"chat_template": "{{ messages }}"}, 400, "chat_template", "unsupported_parameter"),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"max_tokens": CONTEXT}, 400, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "long " * CONTEXT}]}, 400, "messages", "context_length_exceeded"),
        ({"messages": []}, 400, "messages", None),
        ({"temperature": -1}, 400, "temperature", None),
        ({"epsilon": 2}, 400, "epsilon", None),
        ({"model": "gpt-5"}, 404, "model", "model_not_found"),
        ({"stop": [""]}, 400, "stop.0", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_before_anything_is_sent(
    url: str, fields: dict[str, Any], status: int, param: str, code: str | None, stream: bool
) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={**ASK, **fields, "stream": stream})
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (status, "invalid_request_error", code)
    assert error["param"] == param


def test_a_body_of_another_content_type_is_told_which_header_to_send(url: str) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}'
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"text"', b'{"model": "tiny"}', b"\xff\xfe"])
def test_a_malformed_body_is_a_400(url: str, body: bytes) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_unknown_routes_and_methods(url: str) -> None:
    missing, wrong = httpx.get(f"{url}/v1/nothing"), httpx.get(f"{url}/v1/chat/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert "/v1/nothing" in error_of(missing)["message"]
    assert "GET" in error_of(wrong)["message"]
    assert wrong.headers["allow"] == "POST"


def test_a_body_too_large_is_a_413_announced_or_not(url: str) -> None:
    padding = b" " * (ServeSection().max_body_bytes + 1)
    for content in (padding, iter([padding])):
        response = httpx.post(
            f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 413
        assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(("max_waiting", "limit"), [(0, BATCH), (1, BATCH + 1), (64, 16)])
def test_more_answers_than_an_idle_server_takes_are_a_400_that_names_the_limit(
    make_loop: Callable, serve_app: Callable, max_waiting: int, limit: int
) -> None:
    """A 429 would have a client ask again for ever."""
    settings = {"max_batch_size": BATCH, "max_waiting": max_waiting}
    with make_loop(max_waiting=max_waiting) as loop, serve_app(loop, **settings) as url:
        most, more = (httpx.post(f"{url}/v1/chat/completions", json={**ASK, "n": limit + i}) for i in range(2))
    assert (most.status_code, more.status_code) == (200, 400)
    error = error_of(more)
    assert error["param"] == "n"
    assert f"one request may ask for {limit}" in error["message"]


def test_an_idle_server_takes_a_request_whose_own_answers_wait_for_each_other(
    make_loop: Callable, serve_app: Callable
) -> None:
    """A 429 would have a client ask again for ever: as nothing is served, the estimate stays."""
    with make_loop(max_wait_s=1.0) as loop, serve_app(loop, max_batch_size=BATCH) as url:
        loop.admission.learn(60.0)
        assert httpx.post(f"{url}/v1/chat/completions", json={**ASK, "n": BATCH + 2}).status_code == 200


def test_overload_is_a_429_with_retry_after(make_loop: Callable, serve_app: Callable) -> None:
    with make_loop(PacedEngine, max_waiting=-BATCH) as loop, serve_app(loop) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=ASK)
    assert response.status_code == 429
    assert re.fullmatch(r"[1-9]\d*", response.headers["retry-after"])  # whole seconds, as any client reads it
    assert error_of(response)["type"] == "rate_limit_error"


def test_openais_client_waits_as_long_as_a_429_says_and_is_answered(
    make_loop: Callable, serve_app: Callable, expected: Any
) -> None:
    """The slots are taken by streams that are left as soon as the client was refused once."""
    seen: list[tuple[float, httpx.Response]] = []
    taken = {**ASK, "n": BATCH, "ignore_eos": True, "stream": True, "max_tokens": CONTEXT - 100}
    with make_loop(PacedEngine, max_waiting=0) as loop, serve_app(loop) as url, ExitStack() as streams:
        every_slot = streams.enter_context(httpx.stream("POST", f"{url}/v1/chat/completions", json=taken, timeout=60))

        def see(response: httpx.Response) -> None:
            seen.append((time.monotonic(), response))
            streams.close()

        watched = httpx.Client(event_hooks={"response": [see]})
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=20, http_client=watched) as client:
            reading = events(every_slot)  # kept: when it is dropped, the connection is closed
            next(reading)
            answer = client.chat.completions.create(**ASK)
    assert answer.choices[0].message.content == expected.text
    assert [response.status_code for _, response in seen] == [429] * (len(seen) - 1) + [200]
    assert len(seen) > 1
    for (refused_at, refusal), (came_back_at, _) in pairwise(seen):
        assert came_back_at - refused_at >= int(refusal.headers["retry-after"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_reaches_the_client_as_an_error_object(
    make_loop: Callable, serve_app: Callable, stream: bool
) -> None:
    with make_loop(Failing) as loop, serve_app(loop) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json={**ASK, "stream": stream})
    if stream:
        *_, last = [line for line in response.text.splitlines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert "[DONE]" not in response.text
    else:
        assert response.status_code == 503
        assert error_of(response)["code"] == "engine_unavailable"


def test_a_dead_loop_is_a_503_everywhere(make_loop: Callable, serve_app: Callable) -> None:
    with make_loop() as loop, serve_app(loop) as url:
        loop.stop()
        answers = [httpx.get(f"{url}/health"), httpx.post(f"{url}/v1/chat/completions", json=ASK)]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert {error_of(answer)["type"] for answer in answers} == {"service_unavailable_error"}


def test_a_fault_of_ours_is_a_500_that_tells_nothing(make_loop: Callable, model: Model) -> None:
    class Broken(Model):
        def encode(self, prompt: Any) -> list[int]:
            raise RuntimeError("secret")

    broken = Broken(model.backbone, model.heads)
    with make_loop() as loop:
        app = create_app(Service(name="tiny", model=broken, loop=loop, fingerprint="fp"))
        with http_server(app) as url:
            response = httpx.post(f"{url}/v1/chat/completions", json=ASK)
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text


def test_what_is_refused_anyway_is_not_read_first(
    make_loop: Callable, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither are megabytes of text tokenised nor a schema compiled: here either would be a 500."""

    class Unread(Model):
        def encode(self, prompt: Any) -> list[int]:
            raise AssertionError(prompt)

    unread = Service(name="tiny", model=Unread(model.backbone, model.heads), loop=None, fingerprint="fp")  # type: ignore[arg-type]
    with make_loop(max_waiting=0) as loop, http_server(create_app(replace(unread, loop=loop))) as url:
        refused = [httpx.post(f"{url}/v1/chat/completions", json={**ASK, "n": n}) for n in (17, BATCH + 1)]
    assert [response.status_code for response in refused] == [400, 429]

    monkeypatch.setattr("deploy.submission.grammar_of", unread.model.encode)
    asked = {**ASK, "response_format": {"type": "json_object"}, "max_tokens": CONTEXT}
    with make_loop() as loop, http_server(create_app(replace(unread, loop=loop, model=model))) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=asked)
    assert error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_is_no_fault_of_ours(
    make_loop: Callable, serve_app: Callable, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=access_logger.name)
    asked = {**ASK, "max_tokens": 200, "ignore_eos": True, "stream": stream}
    with make_loop(PacedEngine) as loop, serve_app(loop) as url:
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked) as response:
                next(events(response))
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=httpx.Timeout(10, read=0.3))
        # The answer itself would take seconds.
        wait_until(lambda: loop.num_in_flight == 0, timeout_s=1)
        wait_until(lambda: "/v1/chat/completions" in caplog.text)  # the access log's line is the last of a request
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
