"""Many requests through one decoder: a batch that is kept full. Knows token ids; knows nothing of text, HTTP or Ray.

Requests wait in order, take a slot, are prefilled, decoded, and leave; whoever waits takes the place between steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.errors import PromptError
from medusa.heads import MedusaHeads
from medusa.logprobs import TokenLogprob
from medusa.sampling import SamplingRows
from medusa.tree import Tree

FinishReason = Literal["stop", "length", "cancelled", "error"]
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MAX_PREFILL_ROWS = 4
_IDLE = SamplingParams(max_tokens=1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to answer. `on_token` sees each new token and ends the answer after one for which it returns True."""

    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = "0"
    on_token: Callable[[int], bool] | None = None


@dataclass(kw_only=True)
class Stats:
    """What one answer cost. `tokens_per_step[0]` is the prefill's one token; each later entry is one verify step's."""

    prompt_tokens: int = 0
    tokens_per_step: list[int] = field(default_factory=list)
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


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one engine step gave one request: new tokens, their `logprobs` if it asked, and the completion with the last."""

    request_id: str
    token_ids: list[int]
    completion: Completion | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(kw_only=True)
class _Sequence:
    request: Request
    submitted: float
    token_ids: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    started: float = 0.0
    finish_reason: FinishReason | None = None


class Engine:
    """Continuous batching over slots. Not thread-safe: one thread submits, steps and cancels.

    Every prompt and answer must fit `context_length` together, so an admitted request never runs out of room.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None = None,
        *,
        tree: Tree | None = None,
        max_batch_size: int = 8,
        context_length: int | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        length = context_length or min(backbone.max_context, 2048)
        if not 1 < length <= backbone.max_context:
            raise ValueError(
                f"context_length must lie in [2, {backbone.max_context}] for backbone {backbone.name}, got {length}"
            )
        self.backbone = backbone
        self.tree = tree or Tree.root_only()
        self.max_batch_size = max_batch_size
        self.context_length = length
        self.decoder = Decoder(backbone, heads, self.tree, num_slots=max_batch_size, context_length=length)
        self.step_seconds: deque[float] = deque(maxlen=4096)
        self._eos = backbone.eos_token_ids
        self._waiting: deque[_Sequence] = deque()
        self._active: list[_Sequence] = []
        self._rows: SamplingRows | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._active)

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """PromptError for a request that this engine can never serve."""
        check_request(request, context_length=self.context_length, vocab_size=self.backbone.vocab_size)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PromptError, and ValueError for an id already in use."""
        self.check(request)
        if any(request.request_id == s.request.request_id for s in (*self._waiting, *self._active)):
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._waiting.append(_Sequence(request=request, submitted=time.perf_counter()))

    def cancel(self, request_id: str) -> bool:
        """Drop a request, waiting or running; its slot is free at once. False where it is not known (any more)."""
        for sequence in self._waiting:
            if sequence.request.request_id == request_id:
                self._waiting.remove(sequence)
                return True
        for slot, sequence in enumerate(self._active):
            if sequence.request.request_id == request_id:
                self._remove(slot)
                return True
        return False

    def step(self) -> list[Delta]:
        """Admit who fits, decode one tree for everyone running; what each request got, in order of arrival."""
        return self._admit() or self._decode()

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer all requests, the batch kept full, completions in the order in which they finish.

        A request that cannot be served gets a completion with its `error`; the others go on.
        """
        source, exhausted = iter(requests), False
        while not exhausted or self.has_work:
            while not exhausted and len(self._waiting) + len(self._active) < self.max_batch_size:
                request = next(source, None)
                if request is None:
                    exhausted = True
                    break
                try:
                    self.submit(request)
                except PromptError as error:
                    yield Completion(
                        request_id=request.request_id,
                        token_ids=[],
                        finish_reason="error",
                        stats=Stats(),
                        error=str(error),
                    )
            for delta in self.step() if self.has_work else []:
                if delta.completion is not None:
                    yield delta.completion

    def _admit(self) -> list[Delta]:
        """Prefill waiting requests into the free slots, a few together; their first tokens."""
        free = self.max_batch_size - len(self._active)
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting), MAX_PREFILL_ROWS))]
        if not new:
            return []
        began, first = time.perf_counter(), len(self._active)
        rows = SamplingRows.of([s.request.params for s in new], self.backbone.device)
        tokens = self.decoder.prefill(first, [s.request.prompt_ids for s in new], rows)
        ended = time.perf_counter()
        self._active += new
        self._rows = None
        for sequence in new:
            sequence.stats.prompt_tokens = len(sequence.request.prompt_ids)
            sequence.stats.queue_s = began - sequence.submitted
            sequence.stats.prefill_s = ended - began
            sequence.started = ended
        return self._emit(first, [[token] for token in tokens])

    def _decode(self) -> list[Delta]:
        if not self._active:
            return []
        live = len(self._active)
        num_rows = min(next((size for size in BATCH_BUCKETS if size >= live), live), self.max_batch_size)
        if self._rows is None:
            params = [s.request.params for s in self._active]
            idle = [_IDLE] * (num_rows - len(params))
            self._rows = SamplingRows.of(params + idle, self.backbone.device)
        began = time.perf_counter()
        emitted = self.decoder.step(num_rows, self._rows).tokens
        self.step_seconds.append(time.perf_counter() - began)
        for idle_slot in range(live, num_rows):
            self.decoder.free(idle_slot)
        return self._emit(0, emitted[:live])

    def _emit(self, first: int, emitted: list[list[int]]) -> list[Delta]:
        """Give tokens to the sequences from slot `first` on; those that end leave their slots."""
        deltas = []
        for slot, tokens in enumerate(emitted, start=first):
            sequence = self._active[slot]
            kept = self._keep(sequence, tokens)
            completion = self._complete(sequence) if sequence.finish_reason else None
            deltas.append(Delta(request_id=sequence.request.request_id, token_ids=kept, completion=completion))
        for slot in range(len(self._active) - 1, first - 1, -1):
            if self._active[slot].finish_reason:
                self._remove(slot)
        return deltas

    def _keep(self, sequence: _Sequence, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends the answer: end of sequence, the caller's stop, or max_tokens."""
        request, kept = sequence.request, []
        for token in tokens:
            kept.append(token)
            sequence.token_ids.append(token)
            stopped = request.on_token is not None and request.on_token(token)
            if stopped or (token in self._eos and not request.params.ignore_eos):
                sequence.finish_reason = "stop"
            elif len(sequence.token_ids) >= request.params.max_tokens:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                break
        sequence.stats.tokens_per_step.append(len(kept))
        return kept

    def _complete(self, sequence: _Sequence) -> Completion:
        assert sequence.finish_reason is not None
        sequence.stats.decode_s = time.perf_counter() - sequence.started
        return Completion(
            request_id=sequence.request.request_id,
            token_ids=sequence.token_ids,
            finish_reason=sequence.finish_reason,
            stats=sequence.stats,
        )

    def _remove(self, slot: int) -> None:
        """Free a slot; the last running sequence takes its place, so the live rows stay together."""
        last = len(self._active) - 1
        if slot != last:
            self.decoder.move(last, slot)
            self._active[slot] = self._active[last]
        self._active.pop()
        self.decoder.free(last)
        self._rows = None


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
    odd = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if odd is not None:
        raise PromptError(f"the prompt holds token id {odd}; the vocabulary has ids 0 to {vocab_size - 1}")
