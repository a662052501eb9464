"""Many requests through one decoder: a batch that is kept full. Knows token ids; knows nothing of text, HTTP or Ray.

Requests wait in order, take a slot, have their prompts read in chunks, are decoded, and leave; whoever waits takes the
place between steps. Between two decode steps of those running at most one chunk is read, so a long prompt stalls nobody.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.decoder import CHUNK_BUCKETS, Decoder, StepTokens
from medusa.dynamic_tree import DynamicTree
from medusa.errors import PromptError
from medusa.grammar_masks import Guide
from medusa.heads import MedusaHeads
from medusa.prefix_cache import PrefixCache
from medusa.request import Completion, Delta, FinishReason, Phase, Request, Stats, StepRecord, check_request
from medusa.sampling import SamplingRows
from medusa.schedule import Schedule
from medusa.sequence import Sequence
from medusa.step_graphs import Capture
from medusa.tree import Tree
from medusa.tree_policy import Gain, TreePolicy, tree_sizes

__all__ = ["Completion", "Delta", "Engine", "FinishReason", "Request", "Stats", "StepRecord", "check_request"]

BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# A chunk should take about as long as a few decode steps: that is how long those running may wait.
PREFILL_TOKENS = {"cpu": 256, "cuda": 512}
_IDLE = SamplingParams(max_tokens=1)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Those running as a step sees them, the same until one of them comes or goes; `num_rows` counts idle rows too.

    Of a tree some use `least` nodes whatever a policy offers, and nobody more than `most`. `unlimited` are the slots whose
    requests set no limit.
    """

    num_rows: int
    rows: SamplingRows
    least: int
    most: int
    unlimited: tuple[int, ...]


class Engine:
    """Continuous batching over slots. Not thread-safe: one thread submits, steps and cancels.

    Every prompt and answer must fit `context_length` together and a slot has room for that, so an admitted request never
    runs out. What a request leaves unused of its slot is the memory wasted; prefixes are kept apart, in whole blocks.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None = None,
        *,
        tree: Tree | DynamicTree | None = None,
        max_batch_size: int = 8,
        context_length: int | None = None,
        prefill_tokens: int | None = None,
        prefix_cache_tokens: int = 0,
        policy: TreePolicy | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        graphs: bool | Capture = True,
    ) -> None:
        """`prefill_tokens` bounds a chunk (one of CHUNK_BUCKETS; None: by the device). `prefix_cache_tokens` are kept of
        prompts and answers for later prompts that begin alike (0: none); an engine starts with none and shares them with
        no other. `policy` shrinks the tree as the batch grows, for requests whose answers do not depend on it (None:
        always `tree`). `on_step` is told of each forward, in the thread that steps; it must be quick and not raise.
        `graphs` replays recorded decode steps on a GPU (False: never; a function of `step_graphs`: by that).
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size}")
        length = context_length or min(backbone.max_context, 2048)
        if not 1 < length <= backbone.max_context:
            raise ValueError(
                f"context_length must lie in [2, {backbone.max_context}] for backbone {backbone.name}, got {length}"
            )
        chunk = prefill_tokens or PREFILL_TOKENS.get(backbone.device.type, PREFILL_TOKENS["cpu"])
        if chunk not in CHUNK_BUCKETS:
            raise ValueError(f"prefill_tokens must be one of {', '.join(map(str, CHUNK_BUCKETS))}, got {chunk}")
        self.backbone = backbone
        self.tree: Tree | DynamicTree = tree or Tree.root_only()
        self.max_batch_size = max_batch_size
        self.context_length = length
        self.prefill_tokens = chunk
        self.policy = policy
        self.prefixes = PrefixCache(prefix_cache_tokens)
        self.decoder = Decoder(
            backbone,
            heads,
            self.tree,
            num_slots=max_batch_size,
            context_length=length,
            prefill_chunk=chunk,
            graphs=graphs,
        )
        self.step_seconds: deque[float] = deque(maxlen=4096)
        self._on_step = on_step
        self._eos = backbone.eos_token_ids
        self._sizes = tree_sizes(self.tree)
        self._gain = Gain()
        self._schedule = Schedule(max_batch_size)
        self._batch: _Batch | None = None
        self._step_owed = False  # those running wait since the last chunk

    @property
    def has_work(self) -> bool:
        return bool(self.num_active or self.num_waiting)

    @property
    def num_active(self) -> int:
        """Requests that hold a slot."""
        return self._schedule.num_taken

    @property
    def num_waiting(self) -> int:
        return len(self._schedule.waiting)

    def check(self, request: Request) -> None:
        """PromptError for a request that this engine can never serve."""
        check_request(request, context_length=self.context_length, vocab_size=self.backbone.vocab_size)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PromptError, and ValueError for an id already in use."""
        self.check(request)
        if request.request_id in self._schedule:
            raise ValueError(f"request id {request.request_id!r} is in use")
        grammar = request.params.grammar
        guide = Guide(grammar, self.backbone.grammar_vocabulary) if grammar else None
        self._schedule.waiting.append(Sequence(request=request, guide=guide))

    def cancel(self, request_id: str) -> bool:
        """Drop a request, waiting or running; its slot is free at once. False where it is not known (any more)."""
        for sequence in self._schedule.waiting:
            if sequence.request_id == request_id:
                self._schedule.waiting.remove(sequence)
                return True
        half = self._schedule.half_read
        if half is not None and half.request_id == request_id:
            self._schedule.half_read = None
            self.decoder.free(len(self._schedule.running))
            return True
        for slot, sequence in enumerate(self._schedule.running):
            if sequence.request_id == request_id:
                sequence.cancelled = True
                self._remove(slot)
                return True
        return False

    def step(self) -> list[Delta]:
        """Read at most one chunk of prompts, then decode one tree for everyone running; what each request got.

        A chunk that ends prompts gives their first tokens, which leave at once: the decode step is that of the next call.
        """
        if self._schedule.can_read and not self._step_owed:
            self._step_owed = bool(self._schedule.running)
            first_tokens = self._prefill()
            if first_tokens:
                return first_tokens
        self._step_owed = False
        return self._decode()

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer all requests, the batch kept full, completions in the order in which they finish.

        A request that cannot be served gets a completion with its `error`; the others go on.
        """
        source, exhausted = iter(requests), False
        while not exhausted or self.has_work:
            while not exhausted and self.num_active + self.num_waiting < self.max_batch_size:
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

    def _prefill(self) -> list[Delta]:
        """Read the next chunk of prompts; the first tokens of those that are in whole then."""
        began, first = time.perf_counter(), len(self._schedule.running)
        chunk = self._schedule.next_prompts(self.prefill_tokens, self._known if self.prefixes.enabled else None)
        for slot, sequence in enumerate(chunk, start=first):
            if sequence is not self._schedule.half_read:
                self._admit(slot, sequence)
        parts = [s.prompt_ids[s.num_read : s.num_read + self.prefill_tokens] for s in chunk]
        self.decoder.extend(first, parts)
        for sequence, part in zip(chunk, parts, strict=True):
            sequence.num_read += len(part)
        deltas: list[Delta] = []
        if chunk[0].num_read < len(chunk[0].prompt_ids):
            self._schedule.begin_half(chunk[0])
        else:
            deltas = self._start(first, chunk)
        self._record("prefill", time.perf_counter() - began, len(chunk), 0, sum(map(len, parts)))
        return deltas

    def _known(self, sequence: Sequence) -> int:
        """Prompt tokens whose keys and values are at hand; never the last: the heads need its hidden state."""
        return self.prefixes.known(sequence.prompt_ids[:-1], self.backbone.version)

    def _admit(self, slot: int, sequence: Sequence) -> None:
        prefix = self.prefixes.take(sequence.prompt_ids[:-1], self.backbone.version) if self.prefixes.enabled else []
        self.decoder.open(slot, prefix)
        sequence.admit(self.decoder.length_of(slot))

    def _start(self, first: int, sequences: list[Sequence]) -> list[Delta]:
        """The first tokens of sequences whose prompts are in, in the slots from `first` on."""
        step = self.decoder.start(first, self._sampling_rows(sequences))
        for slot, sequence in enumerate(sequences, start=first):
            sequence.start()
            self._keep_prefix(slot, sequence)
        self._schedule.begin(sequences)
        self._batch = None
        return self._emit(first, step, 0)

    def _keep_prefix(self, slot: int, sequence: Sequence) -> None:
        """Keep what a slot holds of the text so far, for prompts to come."""
        if self.prefixes.enabled:
            text = [*sequence.prompt_ids, *sequence.token_ids][: self.decoder.length_of(slot)]
            self.prefixes.keep(
                text, lambda start, stop: self.decoder.cache.read(slot, start, stop), self.backbone.version
            )

    def _decode(self) -> list[Delta]:
        live = len(self._schedule.running)
        if not live:
            return []
        if self._batch is None:
            self._batch = self._gather(self._schedule.running)
        batch = self._batch
        nodes = self._choose_nodes(batch)
        began = time.perf_counter()
        step = self.decoder.step(batch.num_rows, batch.rows, live=live, nodes=nodes)
        seconds = time.perf_counter() - began
        self.step_seconds.append(seconds)
        if self.policy is not None:
            emitted = [len(step.tokens[slot]) for slot in batch.unlimited]
            self._gain.see(expected=self.policy.expected.get(nodes, 1.0), emitted=emitted)
        deltas = self._emit(0, step, nodes)
        self._record("decode", seconds, live, nodes, sum([len(delta.token_ids) for delta in deltas]))
        return deltas

    def _gather(self, sequences: list[Sequence]) -> _Batch:
        """For typical acceptance, whose answers depend on its tree, the tree is always the whole of what it may use."""
        live, whole = len(sequences), self.tree.num_nodes
        num_rows = min(next((size for size in BATCH_BUCKETS if size >= live), live), self.max_batch_size)
        params = [sequence.params for sequence in sequences]
        most = [min(p.tree_nodes or whole, whole) for p in params]
        return _Batch(
            num_rows=num_rows,
            rows=self._sampling_rows(sequences, num_idle=num_rows - live),
            least=max(n if p.scheme == "typical" else 1 for n, p in zip(most, params, strict=True)),
            most=max(most),
            unlimited=tuple(slot for slot, p in enumerate(params) if p.tree_nodes is None),
        )

    def _sampling_rows(self, sequences: list[Sequence], num_idle: int = 0) -> SamplingRows:
        return SamplingRows.of(
            [s.params for s in sequences] + [_IDLE] * num_idle,
            self.backbone.device,
            emitted=[s.token_ids for s in sequences] + [[]] * num_idle,
            guides=[s.guide for s in sequences],
        )

    def _choose_nodes(self, batch: _Batch) -> int:
        """Nodes of the coming step: what the policy offers, within what those running may and must use."""
        offered = batch.most if self.policy is None else self.policy.choose(batch.num_rows, self._gain.value)
        wanted = max(batch.least, min(offered, batch.most))
        return next(size for size in self._sizes if size >= wanted)

    def _record(self, phase: Phase, seconds: float, rows: int, nodes: int, tokens: int) -> None:
        if self._on_step is not None:
            self._on_step(StepRecord(phase=phase, seconds=seconds, rows=rows, nodes=nodes, tokens=tokens))

    def _emit(self, first: int, step: StepTokens, nodes: int) -> list[Delta]:
        """Give tokens to the sequences from slot `first` on; those that end leave their slots. A caller may cancel any of
        them meanwhile, which moves others to other slots."""
        running = self._schedule.running
        given = [
            (sequence, sequence.take(tokens, logprobs, nodes, self._eos))
            for sequence, tokens, logprobs in zip(running[first:], step.tokens, step.logprobs, strict=True)
            if not sequence.cancelled
        ]
        deltas = [delta for sequence, delta in given if not sequence.cancelled]
        for slot in range(len(running) - 1, -1, -1):
            if running[slot].finish_reason:
                self._keep_prefix(slot, running[slot])
                self._remove(slot)
        return deltas

    def _remove(self, slot: int) -> None:
        """Free a slot; the last running sequence takes its place and the half-read one follows: slots stay together."""
        running = self._schedule.running
        last = len(running) - 1
        if slot != last:
            self.decoder.move(last, slot)
            running[slot] = running[last]
        running.pop()
        if self._schedule.half_read is not None:
            self.decoder.move(last + 1, last)
            last += 1
        self.decoder.free(last)
        self._batch = None
