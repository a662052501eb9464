"""A request on its way through the engine, and when its answer ends. Knows token ids; knows no slots and no model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field

from medusa.config import SamplingParams
from medusa.grammar_masks import Guide
from medusa.logprobs import TokenLogprob, TokenLogprobs
from medusa.request import Completion, Delta, FinishReason, Request, Stats

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Sequence:
    """`num_read` prompt tokens are in its slot. Times are those of `time.perf_counter`, 0 before they come: `admitted` when
    it took a slot, `started` when its first token came. The engine reads `token_ids` anew at each step. `guide` is the
    state of its grammar, if it has one."""

    request: Request
    submitted: float = field(default_factory=time.perf_counter)
    guide: Guide | None = None
    admitted: float = 0.0
    started: float = 0.0
    num_read: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish_reason: FinishReason | None = None
    error: str | None = None
    cancelled: bool = False

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_ids(self) -> list[int]:
        return self.request.prompt_ids

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    def admit(self, num_cached: int) -> None:
        """It has a slot, which holds the first `num_cached` tokens of its prompt already."""
        self.num_read, self.admitted = num_cached, time.perf_counter()
        self.stats.prompt_tokens = len(self.prompt_ids)
        self.stats.cached_tokens = num_cached
        self.stats.queue_s = self.admitted - self.submitted

    def start(self) -> None:
        """Its prompt is in whole; the first token is there."""
        self.started = time.perf_counter()
        self.stats.prefill_s = self.started - self.admitted

    def take(self, tokens: Iterable[int], logprobs: TokenLogprobs, nodes: int, eos: Set[int]) -> Delta:
        """What one step gave: the tokens up to the first that ends the answer are kept, and the completion follows it.

        It ends with the end of sequence, where the caller says stop or fails, at max_tokens, and where its grammar can
        go no further. `logprobs` stands beside `tokens` or is empty.
        """
        params, on_token = self.params, self.request.on_token
        kept: list[int] = []
        for token in tokens:
            kept.append(token)
            self.token_ids.append(token)
            if on_token is not None and self._stops(on_token, token):
                self.finish_reason = "error" if self.error else "stop"
            elif token in eos and not params.ignore_eos:
                self.finish_reason = "stop"
            elif len(self.token_ids) >= params.max_tokens:
                self.finish_reason = "length"
            if self.finish_reason or self.cancelled:
                break
        if self.guide is not None and self.guide.error:
            self.finish_reason, self.error = "error", self.guide.error
        told = logprobs[: len(kept)]
        self.logprobs += told
        self.stats.tokens_per_step.append(len(kept))
        self.stats.nodes_per_step.append(min(nodes, params.tree_nodes or nodes))
        completion = self._complete(self.finish_reason) if self.finish_reason else None
        return Delta(request_id=self.request_id, token_ids=kept, completion=completion, logprobs=told)

    def _complete(self, finish_reason: FinishReason) -> Completion:
        self.stats.decode_s = time.perf_counter() - self.started
        return Completion(
            request_id=self.request_id,
            token_ids=self.token_ids,
            finish_reason=finish_reason,
            stats=self.stats,
            error=self.error,
            logprobs=tuple(self.logprobs),
        )

    def _stops(self, on_token: Callable[[int], bool], token: int) -> bool:
        """The caller's word on a token. A caller that fails ends its own answer, never the step of the others."""
        try:
            return on_token(token)
        except Exception as error:
            logger.exception("on_token of request %s failed", self.request_id)
            self.error = f"on_token failed: {type(error).__name__}: {error}"
            return True
