"""Builds the response objects of one request, whole or in chunks, in either protocol. Knows texts and completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from deploy.api import accounting
from deploy.api.chat import (
    AssistantMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    TokenLogprob,
    TopLogprob,
)
from deploy.api.completions import CompletionChoice, LegacyLogprobs, TextCompletion
from deploy.api.token_text import TextOffsets, TokenTexts, shown
from medusa.engine import Completion
from medusa.logprobs import TokenLogprob as Scored

LEAST_LOGPROB = -9999.0  # JSON knows no infinity; OpenAI sends this for it


@dataclass(kw_only=True)
class Text:
    """A stretch of one choice, from a step or from all: its text, and its scored tokens where they were asked for."""

    text: str = ""
    scored: list[Scored] = field(default_factory=list)


class Reply(ABC):
    """The response objects of one request; they share id, time, model and fingerprint. `index` numbers its choices.

    `n` choices belong to each prompt; `tree_depth` is how many guesses can come true in one step. `with_logprobs` says
    whether tokens are told with their log-probabilities.
    """

    id_prefix: ClassVar[str]

    def __init__(
        self,
        *,
        request_id: str,
        created: int,
        model: str,
        fingerprint: str,
        n: int,
        tree_depth: int,
        tokens: TokenTexts,
        with_logprobs: bool,
    ) -> None:
        self._head: dict[str, Any] = dict(id=request_id, created=created, model=model, system_fingerprint=fingerprint)
        self._n = n
        self._tree_depth = tree_depth
        self._tokens = tokens
        self._with_logprobs = with_logprobs

    @abstractmethod
    def whole(self, texts: Sequence[Text], completions: Sequence[Completion]) -> BaseModel:
        """The answer to a request without `stream`."""

    @abstractmethod
    def opening(self, index: int, **account: Any) -> BaseModel | None:
        """What comes before the first text of a choice, if anything does."""

    @abstractmethod
    def step(self, index: int, text: Text, **account: Any) -> BaseModel:
        """What one step gave a choice, with the `usage` so far where it is wanted."""

    @abstractmethod
    def closing(self, index: int, reason: str, **account: Any) -> BaseModel:
        """The end of a choice, with `metrics` where it is the end of the stream."""

    @abstractmethod
    def accounting(self, completions: Sequence[Completion]) -> BaseModel:
        """The last chunk of a stream that was asked for its usage: no choices."""

    def metrics(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return dict(metrics=accounting.metrics(completions, tree_depth=self._tree_depth))

    def account(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return dict(usage=accounting.usage(completions, n=self._n), **self.metrics(completions))


class ChatReply(Reply):
    """In the words of /v1/chat/completions."""

    id_prefix = "chatcmpl"

    def whole(self, texts: Sequence[Text], completions: Sequence[Completion]) -> ChatCompletion:
        choices = [
            Choice(
                index=index,
                message=AssistantMessage(content=text.text),
                logprobs=self._logprobs(text),
                finish_reason=completion.finish_reason,
            )
            for index, (text, completion) in enumerate(zip(texts, completions, strict=True))
        ]
        return ChatCompletion(**self._head, choices=choices, **self.account(completions))

    def opening(self, index: int, **account: Any) -> ChatChunk:
        """The role comes first, in a chunk without text, as OpenAI sends it."""
        return self._chunk(ChunkChoice(index=index, delta={"role": "assistant", "content": ""}), **account)

    def step(self, index: int, text: Text, **account: Any) -> ChatChunk:
        choice = ChunkChoice(index=index, delta={"content": text.text}, logprobs=self._logprobs(text))
        return self._chunk(choice, **account)

    def closing(self, index: int, reason: str, **account: Any) -> ChatChunk:
        return self._chunk(ChunkChoice(index=index, delta={}, finish_reason=reason), **account)

    def accounting(self, completions: Sequence[Completion]) -> ChatChunk:
        return self._chunk(**self.account(completions))

    def _chunk(self, *choices: ChunkChoice, **account: Any) -> ChatChunk:
        return ChatChunk(**self._head, choices=list(choices), **account)

    def _logprobs(self, text: Text) -> ChoiceLogprobs | None:
        if not self._with_logprobs:
            return None
        entries = [
            TokenLogprob(
                **self._entry(scored.token_id, scored.logprob),
                top_logprobs=[TopLogprob(**self._entry(*alternative)) for alternative in scored.top],
            )
            for scored in text.scored
        ]
        return ChoiceLogprobs(content=entries)

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._tokens.bytes_of(token_id)
        return dict(token=shown(token), logprob=_finite(logprob), bytes=list(token))


class CompletionReply(Reply):
    """In the words of /v1/completions, whose chunks have the shape of a whole answer."""

    id_prefix = "cmpl"

    def __init__(self, **head: Any) -> None:
        super().__init__(**head)
        self._offsets: defaultdict[int, TextOffsets] = defaultdict(lambda: TextOffsets(self._tokens))

    def whole(self, texts: Sequence[Text], completions: Sequence[Completion]) -> TextCompletion:
        choices = [
            self._choice(index, text, completion.finish_reason)
            for index, (text, completion) in enumerate(zip(texts, completions, strict=True))
        ]
        return self._chunk(*choices, **self.account(completions))

    def opening(self, index: int, **account: Any) -> None:
        return None

    def step(self, index: int, text: Text, **account: Any) -> TextCompletion:
        return self._chunk(self._choice(index, text, None), **account)

    def closing(self, index: int, reason: str, **account: Any) -> TextCompletion:
        return self._chunk(CompletionChoice(index=index, text="", finish_reason=reason), **account)

    def accounting(self, completions: Sequence[Completion]) -> TextCompletion:
        return self._chunk(**self.account(completions))

    def _chunk(self, *choices: CompletionChoice, **account: Any) -> TextCompletion:
        return TextCompletion(**self._head, choices=list(choices), **account)

    def _choice(self, index: int, text: Text, reason: str | None) -> CompletionChoice:
        logprobs = self._logprobs(index, text) if self._with_logprobs else None
        return CompletionChoice(index=index, text=text.text, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, index: int, text: Text) -> LegacyLogprobs:
        """The chosen token stands among the alternatives too, as OpenAI always returned it."""
        name, offsets = self._tokens.text_of, self._offsets[index]
        return LegacyLogprobs(
            tokens=[name(scored.token_id) for scored in text.scored],
            token_logprobs=[_finite(scored.logprob) for scored in text.scored],
            top_logprobs=[
                {name(token): _finite(logprob) for token, logprob in (*scored.top, (scored.token_id, scored.logprob))}
                for scored in text.scored
            ],
            text_offset=[offsets.push(scored.token_id) for scored in text.scored],
        )


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
