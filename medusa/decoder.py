"""One decoding step for a batch: candidates → verify → accept → compact → next root. Knows token ids; knows no text.

    B sequences, N tree nodes, L depth, D hidden, C chunk of a prompt

The cache holds every emitted token but the last, the root. Plain decoding is this step with the tree of one node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.acceptance import accept
from medusa.backbone import Backbone, Placement
from medusa.candidates import static_candidates
from medusa.heads import MedusaHeads
from medusa.logprobs import TokenLogprobs
from medusa.sampling import SamplingRows
from medusa.tree import Tree

LENGTH_BUCKET = 128
CHUNK_BUCKETS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """What a step emitted for each sequence, on the host: the accepted path's tokens, then the next root.

    `logprobs` stands beside `tokens`; a row that did not ask has an empty entry.
    """

    tokens: list[list[int]]
    logprobs: list[TokenLogprobs]


class Decoder:
    """The state of up to `num_slots` sequences and the step that advances them. Rows 0…B−1 are always the live ones.

    `context_length` counts prompt and answer. Behind it each slot has room for a whole tree or chunk, so the last
    steps before the end need no smaller tree: what lies past the end is verified, and never emitted.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None,
        tree: Tree,
        *,
        num_slots: int,
        context_length: int,
        prefill_chunk: int = CHUNK_BUCKETS[-1],
    ) -> None:
        tree.check_fits(
            num_heads=heads.num_heads if heads else 0, vocab_size=heads.num_choices if heads else backbone.vocab_size
        )
        device = backbone.device
        self.backbone = backbone
        self.heads = heads
        self.head_reader = backbone.lm_head_for(heads.vocabulary) if heads else backbone
        self.tree = tree.on(device)
        self.root_only = Tree.root_only().on(device)
        self.context_length = context_length
        self.prefill_chunk = prefill_chunk
        self.cache = backbone.new_cache(
            num_slots=num_slots,
            capacity=_bucket(context_length + max(tree.num_nodes, prefill_chunk)),
        )
        self.lengths = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.roots = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.hidden = torch.zeros(num_slots, backbone.hidden_size, dtype=backbone.step_dtype, device=device)
        self._host_lengths = [0] * num_slots

    @torch.inference_mode()
    def prefill(self, first_slot: int, prompts: list[list[int]], rows: SamplingRows) -> StepTokens:
        """Run prompts into slots first_slot, first_slot+1, … and emit the first token of each answer, as a tree would
        whose root is the last token of the prompt.

        Long prompts go in chunks. A prompt that ends before the others writes on past its end: those positions are
        masked until a step overwrites them.
        """
        for slot in range(first_slot, first_slot + len(prompts)):
            self.cache.free(slot)
        device = self.backbone.device
        rows_used = slice(first_slot, first_slot + len(prompts))
        ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest, start = max(map(len, prompts)), 0
        while start < longest:
            size = _chunk_size(min(self.prefill_chunk, longest - start))
            ids = torch.zeros(len(prompts), size, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                part = prompt[start : start + size]
                ids[row, : len(part)] = torch.tensor(part, dtype=torch.long)
            steps = torch.arange(size, device=device)
            placement = Placement(
                first_slot=first_slot,
                offsets=torch.full_like(ends, start),
                depths=steps,
                visible=steps[:, None] >= steps,
                length=_bucket(start + size),
            )
            hidden = self.backbone.step(ids.to(device), placement, self.cache)
            last = ends - 1 - start
            here = (last >= 0) & (last < size)
            picked = hidden[torch.arange(len(prompts), device=device), last.clamp(0, size - 1)]
            self.hidden[rows_used] = torch.where(here[:, None], picked, self.hidden[rows_used])
            start += size
        logits = self.backbone.logits(self.hidden[rows_used])[:, None]
        before = rows.logprobs.before_edits(logits)
        node = torch.zeros_like(ends)[:, None]
        roots = accept(self.root_only, node, logits, rows, ends - 1).next_root
        self.lengths[rows_used] = ends
        self.roots[rows_used] = roots
        self._host_lengths[rows_used] = [len(prompt) for prompt in prompts]
        emitted = [[root] for root in roots.tolist()]
        return StepTokens(tokens=emitted, logprobs=rows.logprobs.read(before, node, emitted))

    @torch.inference_mode()
    def step(self, num_rows: int, rows: SamplingRows) -> StepTokens:
        """Advance sequences 0…num_rows−1 by one tree. One transfer to the host, at the end."""
        tree, live = self.tree, slice(0, num_rows)
        offsets = self.lengths[live]
        tokens = self.propose(live)
        placement = Placement(
            first_slot=0,
            offsets=offsets,
            depths=tree.depths,
            visible=tree.ancestor_mask,
            length=_bucket(max(self._host_lengths[live]) + tree.num_nodes),
        )
        hidden = self.backbone.step(tokens, placement, self.cache)
        logits = self.backbone.logits(hidden)
        before = rows.logprobs.before_edits(logits)
        accepted = accept(tree, tokens, logits, rows, offsets)

        path = tree.node_paths[accepted.node]
        if tree.num_nodes > 1:
            self.cache.compact(first_slot=0, offsets=offsets, kept=path)
        self.hidden[live] = hidden[torch.arange(num_rows, device=tokens.device), accepted.node]
        self.lengths[live] = offsets + 1 + accepted.num_accepted
        self.roots[live] = accepted.next_root
        below = tokens.gather(1, path.clamp_min(0))[:, 1:]
        emitted = self._to_host(below, accepted.num_accepted, accepted.next_root)
        return StepTokens(tokens=emitted, logprobs=rows.logprobs.read(before, path, emitted))

    def propose(self, live: slice) -> Tensor:
        """Candidate tokens [B,N] of the live sequences, the root first."""
        if self.heads is None or self.tree.depth == 0:
            return static_candidates(self.tree, self.roots[live], None)
        best = self.heads.guesses(
            self.hidden[live], self.head_reader, num_ranks=self.tree.width, num_heads=self.tree.depth
        )
        return static_candidates(self.tree, self.roots[live], best)

    def move(self, source: int, target: int) -> None:
        """Sequence in slot `source` goes on in slot `target`."""
        self.cache.move(source, target, self._host_lengths[source])
        for state in (self.lengths, self.roots, self.hidden):
            state[target] = state[source]
        self._host_lengths[target] = self._host_lengths[source]

    def free(self, slot: int) -> None:
        """Forget the sequence in a slot. A step that still covers the idle row decodes from length 0 into its own slot;
        the slot's keys and values are zeroed when it is taken again."""
        self.lengths[slot] = 0
        self.roots[slot] = 0
        self.hidden[slot] = 0
        self._host_lengths[slot] = 0

    def _to_host(self, below: Tensor, num_accepted: Tensor, next_root: Tensor) -> list[list[int]]:
        table = torch.cat([num_accepted[:, None], next_root[:, None], below], dim=1).tolist()
        emitted = []
        for row, (accepted, root, *path) in enumerate(table):
            self._host_lengths[row] += 1 + accepted
            emitted.append([*path[:accepted], root])
        return emitted


def _bucket(length: int) -> int:
    """Cache lengths come in few sizes, so that shapes repeat."""
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def _chunk_size(length: int) -> int:
    return next((size for size in CHUNK_BUCKETS if size >= length), length)
