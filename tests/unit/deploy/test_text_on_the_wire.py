"""Scripted answers through the routes: characters across tokens, log-probabilities, time limits, who is let go and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deploy.api.token_text import TokenTexts
from medusa import Model
from tests.unit.deploy.conftest import ScriptedLoop, wait_until

ANSWER = "naïve 你好 😀👩‍👩‍👧 done"
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hi"}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(choice: dict[str, Any]) -> str:
    text: str = choice["text"] if "text" in choice else choice.get("delta", choice.get("message"))["content"]
    return text


@pytest.fixture
def token_ids(model: Model) -> list[int]:
    return list(model.backbone.tokenizer(ANSWER, add_special_tokens=False)["input_ids"])


@pytest.fixture
def loop(model: Model, token_ids: list[int]) -> ScriptedLoop:
    return ScriptedLoop(model.backbone.tokenizer, token_ids)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stop", [[], ["😀"], ["👩‍👧"]])
def test_characters_split_across_tokens_leave_whole(
    loop: ScriptedLoop, serve_app: Callable, path: str, stop: list[str], token_ids: list[int]
) -> None:
    """Every chunk is text that later tokens leave as it is, though each token here is a few bytes."""
    expected = ANSWER.partition(stop[0])[0] if stop else ANSWER
    assert len(token_ids) > len(ANSWER)
    with serve_app(loop) as url:
        response = httpx.post(f"{url}{path}", json={**ROUTES[path], "stream": True, "stop": stop})
        whole = httpx.post(f"{url}{path}", json={**ROUTES[path], "stop": stop}).json()
    texts = [text_of(chunk["choices"][0]) for chunk in chunks_of(response)[:-1]]
    assert "".join(texts) == expected
    assert not any("\ufffd" in text for text in texts)
    assert text_of(whole["choices"][0]) == expected


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("written", "shown"), [("é😀".encode()[:-1], "é"), ("é\ufffd".encode(), "é\ufffd")])
def test_a_cut_leaves_no_part_of_a_character_and_keeps_what_was_written(
    model: Model, serve_app: Callable, path: str, written: bytes, shown: str
) -> None:
    tokens = TokenTexts(model.backbone.tokenizer)
    id_of = {tokens.bytes_of(token): token for token in range(model.backbone.vocab_size)}
    loop = ScriptedLoop(model.backbone.tokenizer, [id_of[bytes([byte])] for byte in written])
    with serve_app(loop) as url:
        response = httpx.post(f"{url}{path}", json={**ROUTES[path], "stream": True})
        whole = httpx.post(f"{url}{path}", json=ROUTES[path]).json()
    assert "".join(text_of(chunk["choices"][0]) for chunk in chunks_of(response)[:-1]) == shown
    assert text_of(whole["choices"][0]) == shown


@pytest.mark.parametrize("stream", [False, True])
def test_an_engines_answer_that_is_cut_inside_a_character_is_empty(
    url: str, token_ids: list[int], stream: bool
) -> None:
    """No script: the bias makes the model begin an emoji, for which one token is no room."""
    first_byte = token_ids[ANSWER.encode().index("😀".encode())]
    ask = {**CHAT, "max_tokens": 1, "logit_bias": {first_byte: 100}, "stream": stream}
    response = httpx.post(f"{url}/v1/chat/completions", json=ask)
    answers = [chunk["choices"][0] for chunk in chunks_of(response)] if stream else response.json()["choices"]
    assert "".join(answer.get("delta", answer.get("message")).get("content", "") for answer in answers) == ""
    assert answers[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(
    loop: ScriptedLoop, serve_app: Callable, model: Model, token_ids: list[int], stream: bool
) -> None:
    """One entry a token, in order, its bytes those of the text; also for the tokens within a character."""
    ask = {**CHAT, "logprobs": True, "top_logprobs": 2, "stream": stream}
    with serve_app(loop) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=ask)
    answers = [chunk["choices"][0] for chunk in chunks_of(response)] if stream else response.json()["choices"]
    entries = [entry for answer in answers if answer["logprobs"] for entry in answer["logprobs"]["content"]]
    assert [entry["logprob"] for entry in entries] == [-count / 4 for count in range(1, len(token_ids) + 1)]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == ANSWER
    tokens = TokenTexts(model.backbone.tokenizer)
    for entry in entries:
        tops = [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]
        assert tops == [(tokens.text_of(0), 0.0), (tokens.text_of(1), -0.125)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(loop: ScriptedLoop, serve_app: Callable, token_ids: list[int], stream: bool) -> None:
    ask = {**TEXT, "logprobs": 1, "stream": stream}
    with serve_app(loop) as url:
        response = httpx.post(f"{url}/v1/completions", json=ask)
    answers = [chunk["choices"][0] for chunk in chunks_of(response)] if stream else response.json()["choices"]
    told: dict[str, list[Any]] = {}
    for answer in answers:
        for name, values in (answer["logprobs"] or {}).items():
            told.setdefault(name, []).extend(values)
    assert {name: len(values) for name, values in told.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), len(token_ids)
    )
    assert told["token_logprobs"] == [-count / 4 for count in range(1, len(token_ids) + 1)]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    for token, logprob, top, offset in zip(*(told[name] for name in names), strict=True):
        assert top[token] == logprob
        if not token.startswith("\\x"):
            assert ANSWER.startswith(token, offset)


@pytest.mark.parametrize("path", ROUTES)
def test_every_chunk_tells_the_usage_so_far_where_it_is_asked_for(
    loop: ScriptedLoop, serve_app: Callable, path: str, token_ids: list[int]
) -> None:
    """A chat's opening chunks too, which come before any token."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    with serve_app(loop) as url:
        response = httpx.post(f"{url}{path}", json={**ROUTES[path], "n": 2, "stream": True, "stream_options": options})
    usages = [chunk["usage"] for chunk in chunks_of(response)]
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    assert len({usage["prompt_tokens"] for usage in usages}) == 1
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == 2 * len(token_ids)


def test_no_logprobs_unless_asked(loop: ScriptedLoop, serve_app: Callable) -> None:
    with serve_app(loop) as url:
        for path, ask in ROUTES.items():
            assert httpx.post(f"{url}{path}", json=ask).json()["choices"][0]["logprobs"] is None
    assert [request.params.logprobs for request in loop.requests] == [None, None]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends(
    model: Model, token_ids: list[int], serve_app: Callable, path: str, stream: bool
) -> None:
    """408 that clients do not repeat, or the same object at the end of the stream; every choice is let go."""
    loop = ScriptedLoop(model.backbone.tokenizer, token_ids, pause_s=0.05)
    with serve_app(loop, request_timeout_s=0.2) as url:
        response = httpx.post(f"{url}{path}", json={**ROUTES[path], "n": 2, "stream": stream})
    if stream:
        error = chunks_of(response)[-1]["error"]
        assert "[DONE]" not in response.text
    else:
        error = response.json()["error"]
        assert response.status_code == 408
        assert response.headers["x-should-retry"] == "false"
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    assert "0.2 s" in error["message"]
    wait_until(lambda: loop.closed == 2)


def test_every_choice_is_let_go_when_the_client_leaves(model: Model, token_ids: list[int], serve_app: Callable) -> None:
    loop = ScriptedLoop(model.backbone.tokenizer, token_ids, pause_s=0.05)
    with serve_app(loop) as url:
        with httpx.stream("POST", f"{url}/v1/completions", json={**TEXT, "n": 3, "stream": True}) as response:
            next(response.iter_lines())
        wait_until(lambda: loop.closed == 3, timeout_s=2)


def test_the_requests_own_settings_reach_every_choice(loop: ScriptedLoop, serve_app: Callable) -> None:
    ask = {
        **TEXT,
        "n": 2,
        "seed": 4,
        "tree_nodes": 3,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "logit_bias": {"7": 2},
    }
    with serve_app(loop, acceptance="rejection", epsilon=0.2) as url:
        httpx.post(f"{url}/v1/completions", json=ask).raise_for_status()
    first, second = (request.params for request in loop.requests)
    assert (first.choice, second.choice) == (0, 1)
    for params in (first, second):
        assert (params.seed, params.tree_nodes, params.scheme, params.epsilon) == (4, 3, "rejection", 0.2)
        assert (params.presence_penalty, params.frequency_penalty, dict(params.logit_bias)) == (1, -1, {7: 2})
