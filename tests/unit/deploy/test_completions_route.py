"""/v1/completions and several choices, against what the model itself gives: every form of prompt, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from medusa import Model

TEXTS = ["The sky is", "Once upon a time"]
ASK: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}


def ids_of(model: Model, text: str) -> list[int]:
    return list(model.backbone.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def expected(model: Model) -> list[str]:
    """Plain texts are no turns of a chat: no template stands around them."""
    return [model.generate(ids_of(model, text), max_tokens=12).text for text in TEXTS]


@pytest.mark.parametrize("form", ["text", "texts", "ids", "id lists"])
def test_every_form_of_prompt_gives_the_models_answer(
    client: openai.OpenAI, model: Model, expected: list[str], form: str
) -> None:
    ids = [ids_of(model, text) for text in TEXTS]
    prompt: Any = {"text": TEXTS[0], "texts": TEXTS, "ids": ids[0], "id lists": ids}[form]
    answer = client.completions.create(prompt=prompt, **ASK)
    count = 1 if form in ("text", "ids") else 2
    assert answer.object == "text_completion"
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected[:count]))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids[:count]))
    assert answer.usage.completion_tokens == 12 * count


def test_a_completion_streams(client: openai.OpenAI, expected: list[str]) -> None:
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in client.completions.create(prompt=TEXTS, stream=True, **ASK):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert list(texts.values()) == expected
    assert reasons == {0: "length", 1: "length"}


def test_choices_are_those_of_the_seed(client: openai.OpenAI, model: Model) -> None:
    """Choice k of a seed is one answer, asked for by whatever protocol, together with whichever others."""
    sampled: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    answer = client.completions.create(
        model="tiny", prompt=TEXTS, n=3, extra_body={"acceptance": "rejection"}, **sampled
    )
    oracle = [
        model.generate(ids_of(model, text), acceptance="rejection", choice=choice, **sampled).text
        for text in TEXTS
        for choice in range(3)
    ]
    assert [choice.text for choice in answer.choices] == oracle
    assert len(set(oracle)) == 6


def test_choices_of_a_chat_stream_interleaved(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "n": 3, "seed": 5, "max_tokens": 16,
        "extra_body": {"acceptance": "rejection", "ignore_eos": True},
    }  # fmt: skip
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    *parts, last = chunks
    texts = dict.fromkeys(range(3), "")
    order = [chunk.choices[0].index for chunk in parts]
    for chunk in parts:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.message.content for choice in whole.choices] == list(texts.values())
    assert order.index(2) < len(order) - 1 - order[::-1].index(0), "choices must come side by side"
    assert last.usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 48


def test_usage_and_metrics_agree(url: str) -> None:
    """tokens = 1 of the prefill + what the steps gave, for each choice; the histogram counts steps and guesses."""
    ask = {**ASK, "prompt": TEXTS, "n": 2, "max_tokens": 20, "ignore_eos": True}
    body = httpx.post(f"{url}/v1/completions", json=ask, timeout=30).json()
    usage, spec = body["usage"], body["metrics"]["speculative_decoding"]
    assert usage["completion_tokens"] == 80
    assert usage["total_tokens"] == usage["prompt_tokens"] + 80
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    histogram = spec["acceptance_histogram"]
    assert sum(histogram) == spec["num_spec_steps"]
    # What a last step accepted beyond max_tokens is no token of the answer.
    assert sum(hits * steps for hits, steps in enumerate(histogram)) == spec["num_accepted_draft_tokens"]
    assert spec["num_spec_steps"] + spec["num_accepted_draft_tokens"] == 80 - 4
    assert spec["mean_acceptance_length"] == pytest.approx(76 / spec["num_spec_steps"])
    assert spec["num_draft_tokens"] == spec["num_spec_steps"] * spec["num_spec_tokens"]  # the tree is a chain
    assert spec["draft_acceptance_rate"] == pytest.approx(spec["num_accepted_draft_tokens"] / spec["num_draft_tokens"])


@pytest.mark.parametrize("with_usage", [False, True])
def test_the_last_chunk_tells_the_metrics(url: str, with_usage: bool) -> None:
    ask = {**ASK, "prompt": TEXTS[0], "stream": True}
    if with_usage:
        ask["stream_options"] = {"include_usage": True}
    lines = httpx.post(f"{url}/v1/completions", json=ask).text.split("\n\n")
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert last["metrics"]["speculative_decoding"]["num_spec_steps"] >= 1
    assert all(chunk["metrics"] is None for chunk in chunks)
    assert (last["choices"] == []) is with_usage


def test_usage_so_far_grows_to_the_whole(url: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    ask = {**ASK, "prompt": TEXTS[0], "stream": True, "stream_options": options}
    lines = httpx.post(f"{url}/v1/completions", json=ask).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 12


def test_max_tokens_is_16_where_it_is_not_said(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hi", temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"prompt": [299, 300]}, "prompt", "token id 300"),
        ({"prompt": ["x"] * 17}, "prompt", "17 answers; one request may ask for 16"),
        ({"prompt": ["x"] * 3, "n": 6}, "n", "18 answers"),
        ({"prompt": "x" * 4000}, "prompt", "too long for the context"),
        ({"max_tokens": 256}, "max_tokens", "context leaves after the prompt"),
    ],
)
def test_refusals_name_the_field(url: str, fields: dict[str, Any], param: str, words: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={**ASK, "prompt": "Hi", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_the_async_client_many_at_once(url: str, model: Model, expected: list[str]) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=30) as client:

            async def streamed(text: str) -> str:
                stream = await client.completions.create(prompt=text, stream=True, **ASK)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(streamed, TEXTS * 4))

    assert asyncio.run(ask_all()) == expected * 4
