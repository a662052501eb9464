"""What goes into an engine and what comes out: requests, deltas, completions, statistics. Knows token ids; knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from medusa.config import SamplingParams
from medusa.errors import PromptError
from medusa.logprobs import TokenLogprob

FinishReason = Literal["stop", "length", "error"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to answer. `on_token` sees each new token and ends the answer after one for which it returns True; where
    it raises, the answer ends with that `error`, and no other."""

    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = "0"
    on_token: Callable[[int], bool] | None = None


@dataclass(kw_only=True)
class Stats:
    """What one answer cost. `tokens_per_step[0]` is the prefill's one token; each later entry is one verify step's.

    `nodes_per_step` runs parallel to it: how many tree nodes the step could accept from, 0 for the prefill. Of the
    prompt's tokens `cached_tokens` were taken from the prefix cache. Times are wall-clock: `queue_s` from submission to
    the first chunk of the prompt, `prefill_s` from there to the first token, `decode_s` from there to the last.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens_per_step: list[int] = field(default_factory=list)
    nodes_per_step: list[int] = field(default_factory=list)
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_per_step)

    @property
    def num_steps(self) -> int:
        """Verify steps."""
        return max(len(self.tokens_per_step) - 1, 0)

    @property
    def acceleration_rate(self) -> float | None:
        """(tokens − 1) / verify steps; None for an answer that needed no step."""
        return (self.num_tokens - 1) / self.num_steps if self.num_steps else None

    @property
    def num_draft_tokens(self) -> int:
        """Tree nodes below the root that were verified, over all steps."""
        return sum(nodes - 1 for nodes in self.nodes_per_step[1:])

    @property
    def num_accepted_tokens(self) -> int:
        """Tree nodes below the root whose tokens are in the answer."""
        return sum(tokens - 1 for tokens in self.tokens_per_step[1:])

    @property
    def acceptance_histogram(self) -> tuple[int, ...]:
        """How many verify steps accepted 0, 1, 2, … nodes below the root; as long as the longest path accepted."""
        accepted = [tokens - 1 for tokens in self.tokens_per_step[1:]]
        return tuple(accepted.count(depth) for depth in range(max(accepted, default=-1) + 1))

    @property
    def tokens_per_s(self) -> float:
        """Tokens over prefill and decoding time together."""
        return self.num_tokens / max(self.prefill_s + self.decode_s, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished answer. `token_ids` holds the end-of-sequence token where there was one; `error` says why there is none.

    `logprobs` stands beside `token_ids`, and is empty where the request did not ask for it.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Delta(NamedTuple):
    """What one engine step gave one request: new tokens, their `logprobs` if it asked, and the completion with the last."""

    request_id: str
    token_ids: list[int]
    completion: Completion | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One forward of the engine: `rows` sequences took part, with trees of `nodes` (0 in a prefill); `tokens` is what came
    of it, prompt tokens computed in a prefill and tokens emitted in a decode."""

    phase: Phase
    seconds: float
    rows: int
    nodes: int
    tokens: int


def check_request(request: Request, *, context_length: int, vocab_size: int) -> None:
    """PromptError for what no engine of this context and vocabulary can ever serve."""
    prompt, limit = request.prompt_ids, context_length
    if not prompt:
        raise PromptError("the prompt is empty; give at least one token")
    if len(prompt) >= limit:
        raise PromptError(f"the prompt has {len(prompt)} tokens and the context {limit}; shorten the prompt")
    if len(prompt) + request.params.max_tokens > limit:
        raise PromptError(
            f"max_tokens {request.params.max_tokens} and a prompt of {len(prompt)} tokens exceed the context of {limit}; "
            f"ask for max_tokens {limit - len(prompt)} or less"
        )
    for name, tokens in (("the prompt holds", prompt), ("logit_bias names", request.params.logit_bias)):
        odd = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if odd is not None:
            raise PromptError(f"{name} token id {odd}; the vocabulary has ids 0 to {vocab_size - 1}")
