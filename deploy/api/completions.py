"""The older completion protocol: text or token ids in, text out, no chat template. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from deploy.api.protocol import NO_OPS, GenerationRequest, Metrics, TopLogprobs, Usage
from deploy.api.wire import Wire

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of this protocol alone

REQUEST_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    **NO_OPS,
    "echo": (False,),
    "suffix": ("",),
}

Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions. Several prompts are answered together, `n` times each."""

    no_ops: ClassVar[Mapping[str, tuple[Any, ...]]] = REQUEST_NO_OPS
    prompt_field: ClassVar[str] = "prompt"

    prompt: (
        Text | TokenIds | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    )
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: TopLogprobs | None = None

    @model_validator(mode="after")
    def _agree_on_choices(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of {self.best_of} must equal n {self.n}: every answer made is returned")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else DEFAULT_MAX_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself, whatever form it was sent in."""
        first = self.prompt[0]
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(first, int) else list(self.prompt)  # type: ignore[list-item, arg-type]


class LegacyLogprobs(Wire):
    """Four parallel lists over the tokens of an answer; `text_offset` is where a token begins in the answer's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Wire):
    index: int
    text: str
    logprobs: LegacyLogprobs | None = None
    finish_reason: str | None


class TextCompletion(Wire):
    """An answer, whole or (the same shape) in chunks; then the last one carries `metrics`."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    metrics: Metrics | None = None
