"""`response_format` through the route: whatever a random model would say, the answer parses, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from medusa.engine import Delta, Engine

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "mood": {"enum": ["good", "bad"]}},
    "required": ["ok", "mood"],
    "additionalProperties": False,
}
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 200, "seed": 1}
FORMAT = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA, "strict": True}}


def keeps_to_the_schema(text: str) -> bool:
    answer = json.loads(text)
    return answer.keys() == {"ok", "mood"} and isinstance(answer["ok"], bool) and answer["mood"] in ("good", "bad")


@pytest.mark.parametrize("temperature", [0, 1])
def test_json_of_a_schema(client: openai.OpenAI, temperature: float) -> None:
    ask: dict[str, Any] = {**ASK, "response_format": FORMAT, "temperature": temperature}
    whole = client.chat.completions.create(**ask, n=2)
    assert all(keeps_to_the_schema(choice.message.content or "") for choice in whole.choices)
    assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    chunks = client.chat.completions.create(**ask, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_a_json_object_begins_as_one(client: openai.OpenAI) -> None:
    """A random model may never end it; as far as it came it is an object's beginning."""
    answer = client.chat.completions.create(**{**ASK, "max_tokens": 12}, response_format={"type": "json_object"})
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")


def test_a_schema_that_cannot_be_is_refused_by_name(url: str) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    response = httpx.post(f"{url}/v1/chat/completions", json={**ASK, "response_format": bad})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "response_format")
    assert "the JSON schema cannot be used" in error["message"]


def test_text_is_what_it_was(client: openai.OpenAI) -> None:
    plain, asked = (
        client.chat.completions.create(**ASK, **extra) for extra in ({}, {"response_format": {"type": "text"}})
    )
    assert plain.choices[0].message.content == asked.choices[0].message.content


class Failing(Engine):
    """Its grammars turn out too ambiguous on the way: llguidance stays in error after a token that it forbids."""

    def _decode(self) -> list[Delta]:
        for sequence in self._schedule.running:
            if sequence.guide is not None and len(sequence.token_ids) >= 2:
                (forbidden,) = self.backbone.tokenizer("?", add_special_tokens=False)["input_ids"]
                assert not sequence.guide._matcher.consume_token(forbidden)
        return super()._decode()


def test_a_grammar_that_fails_on_the_way_is_an_error_and_no_answer(make_loop: Callable, serve_app: Callable) -> None:
    asked = {**ASK, "response_format": {"type": "json_object"}}
    with make_loop(Failing) as loop, serve_app(loop) as base:
        whole = httpx.post(f"{base}/v1/chat/completions", json=asked)
        streamed = httpx.post(f"{base}/v1/chat/completions", json={**asked, "stream": True})
        free = httpx.post(f"{base}/v1/chat/completions", json={**ASK, "max_tokens": 4})
        metrics = httpx.get(f"{base}/metrics").text
    assert whole.status_code == 400 and free.status_code == 200
    *_, last = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    for error in (whole.json()["error"], json.loads(last)["error"]):
        assert error["param"] == "response_format" and "the grammar failed: " in error["message"]
    assert 'finish_reason":"error' not in streamed.text
    [count] = [line for line in metrics.splitlines() if "request_failure_total" in line and 'reason="invalid"' in line]
    assert count.endswith(" 2.0")
