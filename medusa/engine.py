"""Many requests through one decoder: a batch that is kept full. Knows token ids; knows nothing of text, HTTP or Ray.

Requests wait in order, take a slot, are prefilled, decoded, and leave; whoever waits takes the place between steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.decoder import Decoder, StepTokens
from medusa.errors import PromptError
from medusa.heads import MedusaHeads
from medusa.request import Completion, Delta, FinishReason, Phase, Request, Sequence, Stats, StepRecord, check_request
from medusa.sampling import SamplingRows
from medusa.tree import Tree

__all__ = ["Completion", "Delta", "Engine", "FinishReason", "Request", "Stats", "StepRecord", "check_request"]

BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MAX_PREFILL_ROWS = 4
_IDLE = SamplingParams(max_tokens=1)


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
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        """`on_step` is told of each forward, in the thread that steps; it must be quick and must not raise."""
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
        self._on_step = on_step
        self._eos = backbone.eos_token_ids
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []
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
        self._waiting.append(Sequence(request=request, submitted=time.perf_counter()))

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
        emitted = self.decoder.prefill(first, [s.request.prompt_ids for s in new], rows)
        ended = time.perf_counter()
        self._active += new
        self._rows = None
        for sequence in new:
            sequence.stats.prompt_tokens = len(sequence.request.prompt_ids)
            sequence.stats.queue_s = began - sequence.submitted
            sequence.stats.prefill_s = ended - began
            sequence.started = ended
        num_prompt_tokens = sum(s.stats.prompt_tokens for s in new)
        self._record("prefill", ended - began, len(new), 0, num_prompt_tokens)
        return self._emit(first, emitted, 0)

    def _decode(self) -> list[Delta]:
        if not self._active:
            return []
        live = len(self._active)
        num_rows = min(next((size for size in BATCH_BUCKETS if size >= live), live), self.max_batch_size)
        if self._rows is None:
            params = [s.request.params for s in self._active]
            idle = num_rows - live
            emitted = [s.token_ids for s in self._active] + [[]] * idle
            self._rows = SamplingRows.of(params + [_IDLE] * idle, self.backbone.device, emitted)
        began = time.perf_counter()
        step = self.decoder.step(num_rows, self._rows)
        seconds = time.perf_counter() - began
        self.step_seconds.append(seconds)
        for idle_slot in range(live, num_rows):
            self.decoder.free(idle_slot)
        nodes = self.tree.num_nodes
        deltas = self._emit(0, step, nodes)
        self._record("decode", seconds, live, nodes, sum(len(delta.token_ids) for delta in deltas))
        return deltas

    def _record(self, phase: Phase, seconds: float, rows: int, nodes: int, tokens: int) -> None:
        if self._on_step is not None:
            self._on_step(StepRecord(phase=phase, seconds=seconds, rows=rows, nodes=nodes, tokens=tokens))

    def _emit(self, first: int, step: StepTokens, nodes: int) -> list[Delta]:
        """Give tokens to the sequences from slot `first` on; those that end leave their slots."""
        deltas = []
        for sequence, tokens, logprobs in zip(self._active[first:], step.tokens, step.logprobs, strict=False):
            kept = self._keep(sequence, tokens)
            sequence.logprobs += logprobs[: len(kept)]
            sequence.stats.nodes_per_step.append(min(nodes, sequence.request.params.tree_nodes or nodes))
            completion = self._complete(sequence) if sequence.finish_reason else None
            deltas.append(
                Delta(
                    request_id=sequence.request.request_id,
                    token_ids=kept,
                    completion=completion,
                    logprobs=logprobs[: len(kept)],
                )
            )
        for slot in range(len(self._active) - 1, first - 1, -1):
            if self._active[slot].finish_reason:
                self._remove(slot)
        return deltas

    def _keep(self, sequence: Sequence, tokens: list[int]) -> list[int]:
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

    def _complete(self, sequence: Sequence) -> Completion:
        assert sequence.finish_reason is not None
        sequence.stats.decode_s = time.perf_counter() - sequence.started
        return Completion(
            request_id=sequence.request.request_id,
            token_ids=sequence.token_ids,
            finish_reason=sequence.finish_reason,
            stats=sequence.stats,
            logprobs=tuple(sequence.logprobs),
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
