"""Many prompts continued at once by one decoder whose tree is the root alone. Knows token ids; knows no text and no files.

A pool of sequences, refilled in waves: those that end leave, and when half the slots are free the next prompts take
them. So few batch sizes occur, and on a GPU few steps are recorded. Where a step is as fast as here, what the host does
for each token counts: nothing but lists.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.decoder import DEFAULT_CHUNK, Decoder, StepTokens, chunk_size
from medusa.sampling import SamplingRows
from medusa.step_graphs import Capture
from medusa.tree import Tree

PREFILL_TOKENS = 65536  # of prompts read at once, padding included: what their activations take
SIZES = 4  # batch sizes that steps are computed at
TELL_EVERY_S = 10.0

Tell = Callable[[dict[str, float]], None]


@dataclass(slots=True, kw_only=True)
class Continuation:
    """The `number`-th prompt and what follows it, the end of sequence included."""

    number: int
    prompt_ids: Sequence[int]
    token_ids: list[int] = field(default_factory=list)


def plain_decoder(
    backbone: Backbone, *, batch: int, max_prompt: int, max_tokens: int, graphs: bool | Capture = True
) -> Decoder:
    """A decoder without heads for `batch` sequences at once; `graphs` as it takes them."""
    return Decoder(
        backbone, None, Tree.root_only(), num_slots=batch, context_length=max_prompt + max_tokens,
        prefill_chunk=min(chunk_size(max_prompt), DEFAULT_CHUNK), graphs=graphs,
    )  # fmt: skip


def complete(
    decoder: Decoder,
    prompts: Iterable[Sequence[int]],
    params: SamplingParams,
    *,
    until: float = math.inf,
    tell: Tell | None = None,
) -> Iterator[Continuation]:
    """Continue each prompt as `params` say, the n-th with `choice` n, in the order in which they end.

    Whatever else the decoder held is lost. At `until` (monotonic seconds) those unfinished are dropped. `prompts` may be
    endless: they are taken as slots become free. `tell` is told of progress now and then. ValueError for a prompt that
    does not fit the decoder's context with `params.max_tokens` behind it.
    """
    pool, source = _Pool(decoder, params), iter(prompts)
    finished, told, tokens_told = 0, time.monotonic(), 0
    while (now := time.monotonic()) < until:
        if tell is not None and now - told >= TELL_EVERY_S:
            rate = (pool.num_tokens - tokens_told) / (now - told)
            tell({"finished": finished, "running": len(pool.live), "tokens": pool.num_tokens, "tokens/s": rate})
            told, tokens_told = now, pool.num_tokens
        half_free = 2 * len(pool.live) <= decoder.num_slots
        new = list(islice(source, decoder.num_slots - len(pool.live))) if half_free else []
        if new:
            pool.admit(new)
        elif pool.live:
            pool.step()
        else:
            return
        ended = pool.leave()
        finished += len(ended)
        yield from ended


class _Pool:
    """Sequences in slots 0…live−1 of a decoder, each with its last token not yet in the cache."""

    def __init__(self, decoder: Decoder, params: SamplingParams) -> None:
        self.live: list[Continuation] = []
        self.num_tokens = 0
        self._decoder = decoder
        self._params = params
        self._ends = decoder.backbone.eos_token_ids
        self._all_rows = SamplingRows.of([params] * decoder.num_slots, decoder.backbone.device)
        self._rows: SamplingRows | None = None
        self._num_prompts = 0

    def admit(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read prompts into the free slots, and choose the first token of each."""
        longest, room = max(map(len, prompts)), self._decoder.context_length - self._params.max_tokens
        if longest > room:
            raise ValueError(f"a prompt of {longest} tokens is too long: {room} fit with the answer behind them")
        new = [Continuation(number=n, prompt_ids=ids) for n, ids in enumerate(prompts, start=self._num_prompts)]
        self._num_prompts += len(new)
        at_once = max(1, PREFILL_TOKENS // chunk_size(longest))
        for start in range(0, len(new), at_once):
            group = new[start : start + at_once]
            ids = [s.prompt_ids for s in group]
            self._take(group, self._decoder.prefill(len(self.live), ids, self._rows_of(group, len(group))))
            self.live += group
        self._rows = None

    def step(self) -> None:
        """A token more for everyone."""
        size = -(-self._decoder.num_slots // SIZES)
        num_rows = min(-(-len(self.live) // size) * size, self._decoder.num_slots)
        if self._rows is None or len(self._rows.choice) != num_rows:
            self._rows = self._rows_of(self.live, num_rows)
        self._take(self.live, self._decoder.step(num_rows, self._rows, live=len(self.live)))

    def leave(self) -> list[Continuation]:
        """Those that have ended; the last live ones move into their slots. What lies behind the live ones is cleared
        when its slot is taken again, so not now."""
        limit = self._params.max_tokens
        ended = [
            slot
            for slot, sequence in enumerate(self.live)
            if sequence.token_ids[-1] in self._ends or len(sequence.token_ids) >= limit
        ]
        left = []
        for slot in reversed(ended):
            left.append(self.live[slot])
            last = self.live.pop()
            if slot < len(self.live):
                self._decoder.move(len(self.live), slot)
                self.live[slot] = last
        if ended and self._all_rows.any_noise:  # greedy rows are all alike
            self._rows = None
        return left

    def _take(self, sequences: list[Continuation], step: StepTokens) -> None:
        for sequence, tokens in zip(sequences, step.tokens, strict=True):
            sequence.token_ids += tokens
        self.num_tokens += len(sequences)

    def _rows_of(self, sequences: list[Continuation], num_rows: int) -> SamplingRows:
        """How the sequences sample, in the order of their slots, until this is asked again; rows behind them are computed
        for nothing."""
        if self._all_rows.any_noise:
            self._all_rows.choice[: len(sequences)] = torch.tensor([s.number for s in sequences])
        return self._all_rows.view(num_rows, self._all_rows.kind)
