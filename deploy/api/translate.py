"""From the protocol's words to the engine's and back: pure functions. Knows both vocabularies; does no I/O."""

from __future__ import annotations

import secrets
from typing import Any

from deploy.api.errors import bad_request
from deploy.api.protocol import ChatChunk, ChatCompletion, ChatRequest, Choice, ChunkChoice, Usage
from medusa.config import SamplingParams
from medusa.engine import Completion


def sampling_params(request: ChatRequest, *, room: int) -> SamplingParams:
    """How to decode `request`; `room` is how many tokens the context leaves for the answer, the default limit.

    A request without a seed gets a random one: two clients who ask the same must not get the same sample.
    """
    if room < 1:
        raise bad_request(
            f"the messages are {1 - room} tokens too long for the context; shorten them",
            param="messages",
            code="context_length_exceeded",
        )
    if request.limit is not None and request.limit > room:
        raise bad_request(
            f"max_tokens {request.limit} is more than the {room} tokens that the context leaves after the messages",
            param="max_tokens" if request.max_completion_tokens is None else "max_completion_tokens",
            code="context_length_exceeded",
        )
    return SamplingParams(
        max_tokens=request.limit or room,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed if request.seed is not None else secrets.randbits(63),
        acceptance=request.acceptance,
        epsilon=request.epsilon,
        delta=request.delta,
        ignore_eos=request.ignore_eos,
    )


def usage(completion: Completion) -> Usage:
    prompt, answer = completion.stats.prompt_tokens, len(completion.token_ids)
    return Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)


class Answer:
    """Builds the response objects of one request; they share id, time, model and fingerprint."""

    def __init__(self, *, request_id: str, created: int, model: str, fingerprint: str) -> None:
        self._head: dict[str, Any] = dict(id=request_id, created=created, model=model, system_fingerprint=fingerprint)

    def whole(self, text: str, completion: Completion) -> ChatCompletion:
        message: dict[str, str | None] = {"role": "assistant", "content": text, "refusal": None}
        choice = Choice(message=message, finish_reason=completion.finish_reason)
        return ChatCompletion(**self._head, choices=[choice], usage=usage(completion))

    def opening(self) -> ChatChunk:
        """The role comes first, in a chunk without text, as OpenAI sends it."""
        return ChatChunk(**self._head, choices=[ChunkChoice(delta={"role": "assistant", "content": ""})])

    def text(self, text: str) -> ChatChunk:
        return ChatChunk(**self._head, choices=[ChunkChoice(delta={"content": text})])

    def closing(self, completion: Completion) -> ChatChunk:
        return ChatChunk(**self._head, choices=[ChunkChoice(delta={}, finish_reason=completion.finish_reason)])

    def accounting(self, completion: Completion) -> ChatChunk:
        """The last chunk of a stream that was asked for its usage: no choices."""
        return ChatChunk(**self._head, choices=[], usage=usage(completion))
