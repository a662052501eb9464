"""The chat completion protocol as pydantic models: OpenAI's fields, and this project's own beside them. Pure data.

Every field of OpenAI's request either works or is refused by name; none is silently ignored. A field that this server
does not do passes at the value that asks for nothing (`n: 1`, `logprobs: false`), because clients send those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.api.errors import UnsupportedField
from medusa.config import DEFAULT_DELTA, DEFAULT_EPSILON, Scheme

MAX_STOPS = 16

# Field → the values (null besides) that ask for nothing beyond what is done anyway.
REQUEST_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "tree_nodes": (),
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


def _without_no_ops(fields: Any, no_ops: Mapping[str, tuple[Any, ...]]) -> Any:
    """`fields` less those of `no_ops`; raises UnsupportedField for one that asks for something."""
    if not isinstance(fields, Mapping):
        return fields
    for name in fields.keys() & no_ops.keys():
        value, allowed = fields[name], no_ops[name]
        # The type counts: True == 1 in Python, but `n: true` is a mistake and `logprobs: 1` a request.
        if value is not None and not any(value == no_op and _alike(value, no_op) for no_op in allowed):
            instead = f" or send {' or '.join(map(repr, allowed))}" if allowed else ""
            raise UnsupportedField(name, f"{name} is not supported by this server; leave it out{instead}")
    return {name: value for name, value in fields.items() if name not in no_ops}


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool)


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TextPart(_Wire):
    """One part of a message's content; text is the only kind that a text model reads."""

    type: Literal["text"]
    text: str


class Message(_Wire):
    """One turn. `developer` is OpenAI's newer word for `system`, and templates know the older."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        return _without_no_ops(fields, MESSAGE_NO_OPS)

    def as_turn(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Wire):
    include_usage: bool = False


class ChatRequest(_Wire):
    """Body of POST /v1/chat/completions. Null means the default, as everywhere in OpenAI's protocol.

    `temperature` is OpenAI's 1 unless given, so acceptance is typical unless `acceptance` says otherwise; 0 is greedy.
    Ours beyond OpenAI: `top_k`, `acceptance`, `epsilon`, `delta`, `ignore_eos`.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], max_length=MAX_STOPS
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # OpenAI's label for abuse reports; changes no answer
    safety_identifier: str | None = None  # its successor
    prompt_cache_key: str | None = None  # a routing hint; changes no answer
    acceptance: Scheme | None = None
    epsilon: Annotated[float, Field(gt=0, le=1)] = DEFAULT_EPSILON
    delta: Annotated[float, Field(gt=0, le=1)] = DEFAULT_DELTA
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        kept = _without_no_ops(fields, REQUEST_NO_OPS)
        return {name: value for name, value in kept.items() if value is not None} if isinstance(kept, dict) else kept

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(f"max_tokens {both[0]} and max_completion_tokens {both[1]} disagree; send one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens wanted; None leaves it to the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Usage(_Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(_Wire):
    index: int = 0
    message: dict[str, str | None]
    logprobs: None = None
    finish_reason: str


class ChatCompletion(_Wire):
    """Answer to a request without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ChunkChoice(_Wire):
    index: int = 0
    delta: dict[str, str]
    logprobs: None = None
    finish_reason: str | None = None


class ChatChunk(_Wire):
    """One server-sent event of an answer with `stream`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(_Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "medusa"
    max_model_len: int


class ModelList(_Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]
