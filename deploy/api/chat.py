"""The chat completion protocol: request, answer, chunk. Pure data; what it shares with completions stands in protocol.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from deploy.api.protocol import (
    NO_OPS,
    GenerationRequest,
    Metrics,
    TokenLimit,
    TopLogprobs,
    Usage,
    without_no_ops,
)
from deploy.api.wire import Wire

REQUEST_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    **NO_OPS,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# What clients echo back when they append an earlier answer to the conversation.
MESSAGE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


class TextPart(Wire):
    """One part of a message's content; text is the only kind that a text model reads."""

    type: Literal["text"]
    text: str


class Message(Wire):
    """One turn. `developer` is OpenAI's newer word for `system`, and templates know the older."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return without_no_ops(fields, MESSAGE_NO_OPS)

    def as_turn(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    no_ops: ClassVar[Mapping[str, tuple[Any, ...]]] = REQUEST_NO_OPS
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    safety_identifier: str | None = None  # the successor of `user`
    prompt_cache_key: str | None = None  # a routing hint; changes no answer

    @model_validator(mode="after")
    def _agree_on_chat(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(f"max_tokens {both[0]} and max_completion_tokens {both[1]} disagree; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs {self.top_logprobs} is only allowed with logprobs: true")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(Wire):
    """A token, how likely the model itself holds it, and its UTF-8 bytes: a character may span several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Wire):
    """One entry for each token of the answer, its end-of-sequence token included."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(Wire):
    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str


class ChatCompletion(Wire):
    """Answer to a request without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    metrics: Metrics


class ChunkChoice(Wire):
    index: int
    delta: dict[str, str]
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Wire):
    """One server-sent event of an answer with `stream`; the last one carries `metrics`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    metrics: Metrics | None = None
