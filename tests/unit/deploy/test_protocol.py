"""Every field of OpenAI's requests works or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from deploy.api import chat, completions
from deploy.api.chat import MESSAGE_NO_OPS, ChatRequest, Message
from deploy.api.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from deploy.api.errors import ApiError, from_validation
from deploy.api.protocol import GenerationRequest, UsageIn
from deploy.api.translate import sampling_params
from medusa.config import SamplingParams
from pipelines.config import ServeSection

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hi"}
BASES: dict[type[GenerationRequest], dict[str, Any]] = {ChatRequest: CHAT, CompletionRequest: TEXT}
NO_OPS = {ChatRequest: chat.REQUEST_NO_OPS, CompletionRequest: completions.REQUEST_NO_OPS}
UNSUPPORTED = [(protocol, field) for protocol, fields in NO_OPS.items() for field in sorted(fields)]

ASKS = {
    "audio": {"voice": "alloy"},
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": True},
    "echo": True,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "min_p": 0.1,
    "min_tokens": 4,
    "modalities": ["audio"],
    "parallel_tool_calls": "yes",
    "prediction": {"type": "content", "content": ""},
    "reasoning_effort": "low",
    "repetition_penalty": 1.1,
    "service_tier": "flex",
    "store": True,
    "suffix": "the end",
    "tool_choice": "required",
    "tools": [{"type": "function"}],
    "verbosity": "low",
    "web_search_options": {},
}


def refusal(fields: dict[str, Any], protocol: type[GenerationRequest] = ChatRequest) -> ApiError:
    """What a client is told whose body has these fields, through JSON and FastAPI's way of naming places."""
    with pytest.raises(ValidationError) as caught:
        protocol.model_validate(json.loads(json.dumps({**BASES[protocol], **fields})))
    return from_validation([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()])


def params_of(request: GenerationRequest, *, room: int = 40, **settings: Any) -> SamplingParams:
    return sampling_params(request, room=room, vocab_size=300, settings=ServeSection(**settings))


def chat_params(*, room: int = 40, **fields: Any) -> SamplingParams:
    return params_of(ChatRequest.model_validate({**CHAT, **fields}), room=room)


def test_asks_covers_every_unsupported_field() -> None:
    assert ASKS.keys() == {field for _, field in UNSUPPORTED}


@pytest.mark.parametrize(("protocol", "field"), UNSUPPORTED)
def test_an_unsupported_field_is_refused_by_name(protocol: type[GenerationRequest], field: str) -> None:
    error = refusal({field: ASKS[field]}, protocol)
    assert (error.status, error.param, error.code) == (400, field, "unsupported_parameter")
    assert field in error.message


@pytest.mark.parametrize(("protocol", "field"), UNSUPPORTED)
def test_a_value_that_asks_for_nothing_passes(protocol: type[GenerationRequest], field: str) -> None:
    base = BASES[protocol]
    for value in (None, *NO_OPS[protocol][field]):
        assert protocol.model_validate({**base, field: value}) == protocol.model_validate(base)


def test_types_are_jsons() -> None:
    assert refusal({"n": True}).param == "n"
    assert refusal({"temperature": "0.5"}).param == "temperature"
    assert refusal({"stream": 1}).param == "stream"
    assert refusal({"logprobs": 1}).param == "logprobs"
    assert refusal({"logprobs": True}, CompletionRequest).param == "logprobs"
    assert refusal({"min_p": False}).param == "min_p"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"surprise": 1}, "surprise", "unknown request field"),
        ({"temperature": -0.1}, "temperature", "got -0.1"),
        ({"temperature": 2.1}, "temperature", "got 2.1"),
        ({"temperature": float("nan")}, "temperature", "got nan"),
        ({"top_p": 0}, "top_p", "got 0"),
        ({"top_k": -1}, "top_k", "got -1"),
        ({"top_k": 2**63}, "top_k", "less than 2147483648"),
        ({"epsilon": 1.5}, "epsilon", "got 1.5"),
        ({"delta": 0}, "delta", "got 0"),
        ({"acceptance": "lucky"}, "acceptance", "'typical'"),
        ({"tree_nodes": 0}, "tree_nodes", "got 0"),
        ({"tree_nodes": 10**20}, "tree_nodes", "less than 2147483648"),
        ({"n": 0}, "n", "got 0"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "disagree"),
        ({"seed": -1}, "seed", "got -1"),
        ({"presence_penalty": 2.5}, "presence_penalty", "got 2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "got -2.5"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "got 101"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five", "got 'five'"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias.5", "got nan"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "got 21"),
        ({"top_logprobs": 2}, None, "logprobs: true"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": "x" * 257}, "stop", "at most 256 characters"),
        ({"stop": ["x", "x" * 257]}, "stop.1", "at most 256 characters"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, None, "ignore_eos"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.json_schema", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "name", "name is not supported"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "got 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
        ({"stream_options": {"include_usage": True}}, None, "stream: true"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options", "include_usage"),
    ],
)
def test_a_bad_value_is_refused_with_its_name(fields: dict[str, Any], param: str | None, words: str) -> None:
    error = refusal(fields)
    assert error.status == 400
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": [[]]}, "prompt", ""),
        ({"prompt": [1, "two"]}, "prompt", ""),
        ({"prompt": [-1]}, "prompt", ""),
        ({"prompt": None}, "prompt", "required"),
        ({"best_of": 2}, None, "best_of 2 must equal n 1"),
        ({"logprobs": 21}, "logprobs", "got 21"),
        ({"messages": []}, "messages", "unknown request field"),
    ],
)
def test_a_bad_completion_is_refused_with_its_name(fields: dict[str, Any], param: str | None, words: str) -> None:
    error = refusal(fields, CompletionRequest)
    assert error.status == 400
    assert (error.param or "").partition(".")[0] == (param or "")
    assert words in error.message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", ["Hi"]),
        (["Hi", "Ho"], ["Hi", "Ho"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_every_form_of_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest.model_validate({**TEXT, "prompt": prompt}).prompts == prompts


def test_best_of_n_passes() -> None:
    assert CompletionRequest.model_validate({**TEXT, "best_of": 3, "n": 3}).n == 3


def test_stops_of_every_allowed_length_pass() -> None:
    for stop in ("x", "x" * 256, ["x" * 256] * 16):
        assert ChatRequest.model_validate({**CHAT, "stop": stop}).stops == ([stop] if isinstance(stop, str) else stop)


def test_a_missing_field_is_named() -> None:
    error = refusal({"messages": None})
    assert (error.param, error.code) == ("messages", "missing_parameter")


def test_defaults_are_openais_so_acceptance_is_the_servers() -> None:
    params = chat_params()
    assert (params.temperature, params.top_p, params.scheme, params.max_tokens) == (1.0, 1.0, "typical", 40)
    assert (params.logprobs, dict(params.logit_bias), params.tree_nodes) == (None, {}, None)
    assert chat_params(temperature=0).scheme == "greedy"
    assert params_of(CompletionRequest.model_validate(TEXT)).max_tokens == DEFAULT_MAX_TOKENS


def test_greedy_acceptance_is_temperature_0_and_contradicts_any_other() -> None:
    for silent in ({}, {"temperature": None}, {"temperature": 0}):
        assert chat_params(acceptance="greedy", **silent).temperature == 0
    with pytest.raises(ApiError, match=r"got temperature 0\.7; leave one of the two out") as caught:
        chat_params(acceptance="greedy", temperature=0.7)
    assert (caught.value.status, caught.value.param) == (400, "acceptance")


def test_the_server_chooses_what_a_request_leaves_open() -> None:
    settings = {"acceptance": "rejection", "epsilon": 0.2, "delta": 0.4}
    silent = params_of(ChatRequest.model_validate(CHAT), **settings)
    assert {name: getattr(silent, name) for name in settings} == settings
    own = {"acceptance": "typical", "epsilon": 0.5, "delta": 0.6}
    spoken = params_of(ChatRequest.model_validate({**CHAT, **own}), **settings)
    assert {name: getattr(spoken, name) for name in own} == own


def test_every_field_that_works_reaches_the_engine() -> None:
    own = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "acceptance": "rejection", "epsilon": 0.2, "delta": 0.4, "seed": 9,
        "ignore_eos": True, "presence_penalty": 1.5, "frequency_penalty": -1, "tree_nodes": 3,
    }  # fmt: skip
    params = chat_params(**own)
    assert {name: getattr(params, name) for name in own} == own
    assert dict(chat_params(logit_bias={"5": -100, "7": 1.5}).logit_bias) == {5: -100, 7: 1.5}


def test_logprobs_of_either_protocol() -> None:
    assert chat_params(logprobs=False).logprobs is None
    assert chat_params(logprobs=True).logprobs == 0
    assert chat_params(logprobs=True, top_logprobs=4).logprobs == 4
    for asked in (None, 0, 3):
        assert params_of(CompletionRequest.model_validate({**TEXT, "logprobs": asked})).logprobs == asked


def test_requests_without_a_seed_differ() -> None:
    assert chat_params().seed != chat_params().seed


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_context_leaves(field: str) -> None:
    with pytest.raises(ApiError, match="more than the 40 tokens") as caught:
        chat_params(**{field: 41})
    assert (caught.value.param, caught.value.code) == (field, "context_length_exceeded")


def test_a_prompt_longer_than_the_context_is_named_by_its_field() -> None:
    with pytest.raises(ApiError, match="the prompt is 4 tokens too long") as caught:
        params_of(CompletionRequest.model_validate(TEXT), room=-3)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_a_bias_outside_the_vocabulary() -> None:
    assert dict(chat_params(logit_bias={"299": 1}).logit_bias) == {299: 1}
    with pytest.raises(ApiError, match="token id 300; the vocabulary has ids 0 to 299") as caught:
        chat_params(logit_bias={"300": 1})
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (None, UsageIn.NONE),
        ({}, UsageIn.NONE),
        ({"include_usage": True}, UsageIn.LAST_CHUNK),
        ({"include_usage": True, "continuous_usage_stats": True}, UsageIn.EVERY_CHUNK),
    ],
)
def test_which_chunks_tell_usage(options: dict[str, Any] | None, where: UsageIn) -> None:
    assert ChatRequest.model_validate({**CHAT, "stream": True, "stream_options": options}).usage_in is where


def test_messages_become_turns() -> None:
    parts = Message.model_validate({"role": "developer", "content": [{"type": "text", "text": t} for t in ("a", "b")]})
    assert parts.as_turn() == {"role": "system", "content": "ab"}
    echoed = {"role": "assistant", "content": "x", **dict.fromkeys(MESSAGE_NO_OPS)}
    assert Message.model_validate(echoed).as_turn() == {"role": "assistant", "content": "x"}


def test_a_long_value_is_not_echoed_whole() -> None:
    assert len(refusal({"top_p": "x" * 10_000}).message) < 300


def test_half_a_surrogate_pair_can_be_quoted() -> None:
    error = refusal({"\ud800": 1})
    assert "\\ud800" in json.dumps(error.body(), ensure_ascii=False).encode().decode()
