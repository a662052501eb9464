"""One decoding step for a batch: candidates → verify → accept → compact → next root. Knows token ids; knows no text.

    B sequences, N tree nodes, L depth, D hidden, C chunk of a prompt

The cache holds every emitted token but the last, the root. Plain decoding is this step with the tree of one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.acceptance import Acceptance, accept
from medusa.backbone import Backbone, Placement
from medusa.dynamic_tree import DeviceDynamicTree, DynamicTree
from medusa.heads import MedusaHeads
from medusa.logprobs import TokenLogprobs
from medusa.native.build import library
from medusa.proposals import Proposer
from medusa.sampling import SamplingRows
from medusa.step_graphs import Capture, StepGraphs, StepShape, capture_for
from medusa.tree import DeviceTree, RowTrees, Tree

LENGTH_BUCKET = 128
CHUNK_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024)
DEFAULT_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """What a step emitted for each sequence, on the host: the accepted path's tokens, then the next root.

    `logprobs` stands beside `tokens`; a row that did not ask has an empty entry.
    """

    tokens: list[list[int]]
    logprobs: list[TokenLogprobs]


@dataclass(frozen=True, kw_only=True)
class _Advanced:
    """A step as it stands on the device. `table` [B,2+L]: accepted nodes, next root, the tokens below the root.

    `path` [B,L+1] holds the accepted nodes from the root on, `before` the logits that log-probabilities are read from.
    """

    table: Tensor
    path: Tensor
    before: dict[int, Tensor]


class Decoder:
    """The state of up to `num_slots` sequences and the step that advances them. Rows 0…B−1 are always the live ones.

    `context_length` counts prompt and answer. Behind it each slot has room for a whole tree or chunk, so the last
    steps before the end need no smaller tree: what lies past the end is verified, and never emitted.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads | None,
        tree: Tree | DynamicTree,
        *,
        num_slots: int,
        context_length: int,
        prefill_chunk: int = DEFAULT_CHUNK,
        graphs: bool | Capture = True,
    ) -> None:
        """`graphs` replays steps as CUDA graphs where the device has them; a function of `step_graphs` does it by that."""
        tree.check_fits(
            num_heads=heads.num_heads if heads else 0, vocab_size=heads.num_choices if heads else backbone.vocab_size
        )
        device = backbone.device
        self._looks_at_data = device.type == "cpu"  # elsewhere each look is a synchronisation
        self._fused = backbone.fuses_steps
        if device.type == "cpu":
            library()  # compiled now, if it must be, not in the first step
        self.backbone = backbone
        self.heads = heads
        self._proposer = None if heads is None else Proposer(heads, backbone)
        self.shape = tree
        self._trees: dict[int, DeviceTree | DeviceDynamicTree] = {}
        self._root_only = Tree.root_only().on(device)
        self.num_slots = num_slots
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
        capture = capture_for(device, graphs)
        self.graphs = capture and StepGraphs(
            lambda shape, rows, live: self._advance(shape, rows, live).table,
            num_slots=num_slots,
            device=device,
            capture=capture,
        )

    def open(self, slot: int, prefix: Sequence[Tensor] = ()) -> None:
        """Give a slot to a new sequence; `prefix` holds the keys and values of its first tokens where they are known."""
        self.free(slot)
        self.cache.free(slot)
        self._set_length(slot, self.cache.write(slot, prefix))

    @torch.inference_mode()
    def extend(self, first_slot: int, parts: Sequence[Sequence[int]]) -> None:
        """Run the next tokens of the prompts in slots first_slot, first_slot+1, …, behind what those slots hold.

        A part that is shorter than the longest writes on past its end: those positions are masked until a later part
        or step overwrites them.
        """
        device, slots = self.backbone.device, slice(first_slot, first_slot + len(parts))
        size = chunk_size(max(map(len, parts)))
        ids = torch.tensor([[*part, *[0] * (size - len(part))] for part in parts], dtype=torch.long)
        steps = torch.arange(size, device=device)
        placement = Placement(
            first_slot=first_slot,
            offsets=self.lengths[slots],
            depths=steps,
            visible=steps[:, None] >= steps,
            length=_bucket(max(self._host_lengths[slots]) + size),
        )
        hidden = self.backbone.step(ids.to(device), placement, self.cache)
        counts = torch.tensor([len(part) for part in parts], device=device)  # all rows at once: there may be thousands
        last = hidden[torch.arange(len(parts), device=device), (counts - 1).clamp_min(0)]
        self.hidden[slots] = torch.where(counts[:, None] > 0, last, self.hidden[slots])
        self.lengths[slots] += counts
        for slot, part in enumerate(parts, start=first_slot):
            self._host_lengths[slot] += len(part)

    @torch.inference_mode()
    def start(self, first_slot: int, rows: SamplingRows) -> StepTokens:
        """The first token of the answers in slots first_slot, …, one for each of `rows`, whose prompts are in whole: what
        a tree emits whose root is the last token of the prompt."""
        slots = slice(first_slot, first_slot + rows.scheme.shape[0])
        logits = self.backbone.logits(self.hidden[slots])[:, None]
        before = rows.logprobs.before_edits(logits)
        node = torch.zeros_like(self.roots[slots])[:, None]
        tree, before_root = self._root_only.rows(len(node)), self.lengths[slots] - 1
        roots = accept(
            tree, node, logits, rows, before_root, early_exit=self._looks_at_data, fused=self._fused
        ).next_root
        self.roots[slots] = roots
        emitted = [[root] for root in roots.tolist()]
        return StepTokens(tokens=emitted, logprobs=rows.logprobs.read(before, node, emitted))

    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]], rows: SamplingRows) -> StepTokens:
        """All of this at once: whole prompts into slots first_slot, … and the first token of each answer."""
        self._forget(first_slot, first_slot + len(prompts))
        for slot in range(first_slot, first_slot + len(prompts)):
            self.cache.free(slot)
        for start in range(0, max(map(len, prompts)), self.prefill_chunk):
            self.extend(first_slot, [prompt[start : start + self.prefill_chunk] for prompt in prompts])
        return self.start(first_slot, rows)

    @torch.inference_mode()
    def step(
        self, num_rows: int, rows: SamplingRows, *, live: int | None = None, nodes: int | None = None
    ) -> StepTokens:
        """Advance sequences 0…live−1 by one tree: the first `nodes` nodes of this decoder's, all of them by default;
        where it is dynamic, each row's best.

        Rows up to `num_rows` (default: the live ones) are computed with them so that shapes repeat. Whatever sequence lies
        there stays as it is: what is written goes behind its length. One transfer to the host, at the end; but edits and
        log-probabilities take the host's part in between, so such rows are never replayed.
        """
        live, nodes = num_rows if live is None else live, nodes or self.shape.num_nodes
        needed = max(self._host_lengths[:num_rows]) + self.tree_of(nodes).num_nodes  # made here: not while recording
        if self.graphs is not None and rows.stays_on_device:
            shape = StepShape(num_rows, nodes, min(_coarse_bucket(needed), self.cache.capacity))
            self.cache.mark_used(0, num_rows, shape.length)
            emitted = self._to_host(self.graphs.run(shape, rows, live)[:live])
            return StepTokens(tokens=emitted, logprobs=[()] * live)
        shape = StepShape(num_rows, nodes, _bucket(needed))
        advanced = self._advance(shape, rows, live, early_exit=self._looks_at_data)
        emitted = self._to_host(advanced.table[:live])
        return StepTokens(tokens=emitted, logprobs=rows.logprobs.read(advanced.before, advanced.path, emitted))

    def _advance(
        self, shape: StepShape, rows: SamplingRows, live: Tensor | int, *, early_exit: bool = False
    ) -> _Advanced:
        """The step itself, on the device alone unless rows have edits or `early_exit` is asked for: every shape is known
        beforehand, the data decides about nothing but data. Rows from `live` on keep length, root and hidden state."""
        everyone = slice(0, shape.num_rows)
        offsets = self.lengths[everyone]
        tokens, tree = self.propose(everyone, self.tree_of(shape.nodes))
        placement = Placement(
            first_slot=0, offsets=offsets, depths=tree.depths, visible=tree.ancestor_mask, length=shape.length
        )
        hidden = self.backbone.step(tokens, placement, self.cache)
        logits = self.backbone.logits(hidden)
        before = rows.logprobs.before_edits(logits)
        accepted = accept(tree, tokens, logits, rows, offsets, early_exit=early_exit, fused=self._fused)

        if tree.num_nodes > 1:
            self.cache.compact(first_slot=0, offsets=offsets, kept=accepted.path)
        table = self._settle(accepted, tokens, hidden, live)
        return _Advanced(table=table, path=accepted.path, before=before)

    def _settle(self, accepted: Acceptance, tokens: Tensor, hidden: Tensor, live: Tensor | int) -> Tensor:
        """Length, root and hidden state of the rows below `live` become those of the accepted path; the table [B,2+L]."""
        lengths, roots, last = self.lengths, self.roots, self.hidden
        if self._fused:
            from medusa import step_triton  # Triton is where CUDA builds of torch are

            return step_triton.settle(accepted, tokens, hidden, live, lengths=lengths, roots=roots, last_hidden=last)
        below = tokens.gather(1, accepted.path.clamp_min(0))[:, 1:]
        table = torch.cat([accepted.num_accepted[:, None], accepted.next_root[:, None], below], dim=1)
        row = torch.arange(len(tokens), device=tokens.device)
        everyone = slice(0, len(tokens))
        for state, new in (
            (lengths, lengths[everyone] + 1 + accepted.num_accepted),
            (roots, accepted.next_root),
            (last, hidden[row, accepted.node]),
        ):
            advancing = (row < live).view(-1, *[1] * (state.dim() - 1))
            state[everyone] = torch.where(advancing, new, state[everyone])
        return table

    def tree_of(self, nodes: int) -> DeviceTree | DeviceDynamicTree:
        """The first `nodes` nodes of this decoder's tree."""
        if nodes not in self._trees:
            self._trees[nodes] = self.shape.first(nodes).on(self.backbone.device)
        return self._trees[nodes]

    def length_of(self, slot: int) -> int:
        """Positions of the sequence in a slot whose keys and values are held."""
        return self._host_lengths[slot]

    def pretend(self, num_rows: int, length: int) -> None:
        """Let the first rows hold sequences of `length` positions, whatever keys and values lie there: to time a step."""
        for slot in range(num_rows):
            self.free(slot)
            self._set_length(slot, length)

    def propose(self, batch: slice, tree: DeviceTree | DeviceDynamicTree) -> tuple[Tensor, RowTrees]:
        """Candidate tokens [B,N] of those sequences, the root first, and the trees that they stand in."""
        roots, hidden = self.roots[batch], self.hidden[batch]
        if self._proposer is None or tree.depth == 0:
            return roots[:, None], self._root_only.rows(len(roots))
        return self._proposer(tree, roots, hidden)

    def move(self, source: int, target: int) -> None:
        """Sequence in slot `source` goes on in slot `target`."""
        self.cache.move(source, target, self._host_lengths[source])
        for state in (self.lengths, self.roots, self.hidden):
            state[target] = state[source]
        self._host_lengths[target] = self._host_lengths[source]

    def free(self, slot: int) -> None:
        """Forget the sequence in a slot. A step that still covers the idle row decodes from length 0 into its own slot;
        the slot's keys and values are zeroed when it is taken again."""
        self._forget(slot, slot + 1)

    def _forget(self, first: int, stop: int) -> None:
        """As `free`, of slots first…stop−1 at once."""
        for state in (self.lengths, self.roots, self.hidden):
            state[first:stop] = 0
        self._host_lengths[first:stop] = [0] * (stop - first)

    def _set_length(self, slot: int, length: int) -> None:
        self.lengths[slot] = length
        self._host_lengths[slot] = length

    def _to_host(self, table: Tensor) -> list[list[int]]:
        emitted = []
        for row, values in enumerate(table.tolist()):
            accepted, root = values[:2]
            self._host_lengths[row] += 1 + accepted
            emitted.append([*values[2 : 2 + accepted], root])
        return emitted


def _bucket(length: int) -> int:
    """Cache lengths come in few sizes, so that shapes repeat."""
    return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def _coarse_bucket(length: int) -> int:
    """Fewer sizes for long caches, since each is a graph: from 1,024 on, four to eight for each doubling."""
    size = max(LENGTH_BUCKET, (1 << (length - 1).bit_length()) // 8)
    return -(-length // size) * size


def chunk_size(length: int) -> int:
    """What a part of a prompt of this length is padded to."""
    return next((size for size in CHUNK_BUCKETS if size >= length), length)
