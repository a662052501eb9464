"""Every field of OpenAI's request works or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from deploy.api.errors import ApiError, from_validation
from deploy.api.protocol import MESSAGE_NO_OPS, REQUEST_NO_OPS, ChatRequest, Message
from deploy.api.translate import sampling_params

BASE: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}

ASKS = {
    "audio": {"voice": "alloy"},
    "best_of": 2,
    "frequency_penalty": 0.5,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"5": 1},
    "logprobs": True,
    "metadata": {"a": "b"},
    "min_p": 0.1,
    "min_tokens": 4,
    "modalities": ["audio"],
    "n": 2,
    "parallel_tool_calls": "yes",
    "prediction": {"type": "content", "content": ""},
    "presence_penalty": -1,
    "reasoning_effort": "low",
    "repetition_penalty": 1.1,
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function"}],
    "top_logprobs": 2,
    "tree_nodes": 8,
    "verbosity": "low",
    "web_search_options": {},
}


def refusal(fields: dict[str, Any]) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({**BASE, **fields})
    return from_validation(caught.value.errors())


def test_asks_covers_every_unsupported_field() -> None:
    assert ASKS.keys() == REQUEST_NO_OPS.keys()


@pytest.mark.parametrize("field", sorted(REQUEST_NO_OPS))
def test_an_unsupported_field_is_refused_by_name(field: str) -> None:
    error = refusal({field: ASKS[field]})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    assert field in error.message


@pytest.mark.parametrize("field", sorted(REQUEST_NO_OPS))
def test_a_value_that_asks_for_nothing_passes(field: str) -> None:
    for value in (None, *REQUEST_NO_OPS[field]):
        assert ChatRequest.model_validate({**BASE, field: value}) == ChatRequest.model_validate(BASE)


def test_true_is_not_one() -> None:
    assert refusal({"n": True}).param == "n"
    assert refusal({"logprobs": 0}).param == "logprobs"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"surprise": 1}, "surprise", "unknown request field"),
        ({"temperature": -0.1}, "temperature", "got -0.1"),
        ({"temperature": 2.1}, "temperature", "got 2.1"),
        ({"top_p": 0}, "top_p", "got 0"),
        ({"top_k": -1}, "top_k", "got -1"),
        ({"epsilon": 1.5}, "epsilon", "got 1.5"),
        ({"delta": 0}, "delta", "got 0"),
        ({"acceptance": "lucky"}, "acceptance", "'typical'"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "disagree"),
        ({"seed": -1}, "seed", "got -1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "name", "name is not supported"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
    ],
)
def test_a_bad_value_is_refused_with_its_name(fields: dict[str, Any], param: str | None, words: str) -> None:
    error = refusal(fields)
    assert error.status == 400
    assert error.param == param
    assert words in error.message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "tiny"})
    assert from_validation(caught.value.errors()).code == "missing_parameter"


def test_defaults_are_openais_so_acceptance_is_typical() -> None:
    params = sampling_params(ChatRequest.model_validate(BASE), room=40)
    assert (params.temperature, params.top_p, params.scheme, params.max_tokens) == (1.0, 1.0, "typical", 40)
    assert sampling_params(ChatRequest.model_validate({**BASE, "temperature": 0}), room=40).scheme == "greedy"


def test_our_own_fields_reach_the_engine() -> None:
    own = {"top_k": 5, "acceptance": "rejection", "epsilon": 0.2, "delta": 0.4, "seed": 9, "ignore_eos": True}
    params = sampling_params(ChatRequest.model_validate({**BASE, **own}), room=40)
    assert {name: getattr(params, name) for name in own} == own


def test_requests_without_a_seed_differ() -> None:
    request = ChatRequest.model_validate(BASE)
    assert sampling_params(request, room=9).seed != sampling_params(request, room=9).seed


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_context_leaves(field: str) -> None:
    request = ChatRequest.model_validate({**BASE, field: 41})
    with pytest.raises(ApiError, match="more than the 40 tokens") as caught:
        sampling_params(request, room=40)
    assert (caught.value.param, caught.value.code) == (field, "context_length_exceeded")


def test_messages_become_turns() -> None:
    parts = Message.model_validate({"role": "developer", "content": [{"type": "text", "text": t} for t in ("a", "b")]})
    assert parts.as_turn() == {"role": "system", "content": "ab"}
    echoed = {"role": "assistant", "content": "x", **dict.fromkeys(MESSAGE_NO_OPS)}
    assert Message.model_validate(echoed).as_turn() == {"role": "assistant", "content": "x"}


def test_a_long_value_is_not_echoed_whole() -> None:
    assert len(refusal({"top_p": "x" * 10_000}).message) < 300
