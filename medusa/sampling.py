"""Drawing tokens from logits, with noise that depends on nothing but its key. Knows logits; knows no tree and no model.

    B rows, V vocabulary

A token is drawn by Gumbel-max: argmax(filtered logits / T + g). The noise g of a token is a pure function of (seed,
choice, position, token id), so a draw is the same whatever the tree, the batch or the step that asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from medusa.config import SCHEMES, SamplingParams
from medusa.grammar_masks import GrammarMasks, Guide
from medusa.logit_edits import LogitEdits
from medusa.logprobs import LogprobRows

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number: SplitMix64's increment
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

NO_LIMIT = 2**31
GREEDY, TYPICAL, REJECTION = (SCHEMES.index(name) for name in ("greedy", "typical", "rejection"))


INTEGERS = "scheme", "top_k", "seed", "choice", "sample_root", "max_nodes"
REALS = "temperature", "top_p", "epsilon", "delta"


class SamplingKind(NamedTuple):
    """What the rows of a batch need, and so which operations a step has. Named as in `SamplingRows`."""

    any_typical: bool
    any_walk: bool
    any_noise: bool
    any_filter: bool
    any_two_filters: bool
    any_limit: bool


@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """The settings of B requests side by side; the flags say what no row needs. `edits` change logits before a token is
    chosen, in this order.

    `integers` [6,B] and `reals` [4,B] hold the settings, since few transfers take less time than many; the fields that
    INTEGERS and REALS name are their rows [B].
    """

    integers: Tensor
    reals: Tensor
    scheme: Tensor = field(init=False)
    top_k: Tensor = field(init=False)
    seed: Tensor = field(init=False)
    choice: Tensor = field(init=False)
    sample_root: Tensor = field(init=False)
    max_nodes: Tensor = field(init=False)
    temperature: Tensor = field(init=False)
    top_p: Tensor = field(init=False)
    epsilon: Tensor = field(init=False)
    delta: Tensor = field(init=False)
    any_typical: bool
    any_walk: bool
    any_noise: bool
    any_filter: bool
    any_two_filters: bool
    any_limit: bool
    edits: tuple[LogitEdits | GrammarMasks, ...]
    logprobs: LogprobRows

    def __post_init__(self) -> None:
        for names, table in ((INTEGERS, self.integers), (REALS, self.reals)):
            for name, column in zip(names, table.unbind(), strict=True):
                object.__setattr__(self, name, column)

    @property
    def kind(self) -> SamplingKind:
        return SamplingKind(*(getattr(self, flag) for flag in SamplingKind._fields))

    @property
    def stays_on_device(self) -> bool:
        """Is choosing tokens a matter of tensors alone? Edits read what was emitted, and log-probabilities are told."""
        return not self.edits and not self.logprobs.num_top

    def load(self, other: SamplingRows) -> None:
        """Copy the columns of as many or fewer rows into the first of these; flags stay."""
        for mine, theirs in ((self.integers, other.integers), (self.reals, other.reals)):
            mine[:, : theirs.shape[1]] = theirs

    def view(self, num_rows: int, kind: SamplingKind) -> SamplingRows:
        """The first rows, with other flags: their columns are these columns."""
        integers, reals = self.integers[:, :num_rows], self.reals[:, :num_rows]
        return replace(self, integers=integers, reals=reals, **kind._asdict())

    @classmethod
    def of(
        cls,
        params: list[SamplingParams],
        device: torch.device,
        emitted: Sequence[Sequence[int]] | None = None,
        guides: Sequence[Guide | None] = (),
    ) -> SamplingRows:
        """`emitted` are the lists in which the requests' tokens are collected, read anew at each step (None: all empty),
        `guides` the state of their grammars (empty: no request has one)."""
        schemes = [p.scheme for p in params]
        emitted = emitted or [()] * len(params)
        asked = LogitEdits.of(params, emitted, device), GrammarMasks.of(guides, emitted)
        edits = tuple(edit for edit in asked if edit is not None)
        noisy = [
            s == "rejection" or (s == "typical" and p.root == "sample") for s, p in zip(schemes, params, strict=True)
        ]
        filters = [0 if s == "greedy" else (p.top_p < 1) + (p.top_k > 0) for s, p in zip(schemes, params, strict=True)]
        columns: dict[str, list] = dict(
            scheme=[SCHEMES.index(s) for s in schemes],
            top_k=[p.top_k for p in params],
            seed=[p.seed for p in params],
            choice=[p.choice for p in params],
            sample_root=noisy,
            max_nodes=[p.tree_nodes or NO_LIMIT for p in params],
            temperature=[p.temperature if s != "greedy" else 1.0 for s, p in zip(schemes, params, strict=True)],
            top_p=[p.top_p for p in params],
            epsilon=[p.epsilon for p in params],
            delta=[p.delta for p in params],
        )
        return cls(
            integers=torch.tensor([columns[name] for name in INTEGERS], dtype=torch.long, device=device),
            reals=torch.tensor([columns[name] for name in REALS], dtype=torch.float64, device=device),
            any_typical="typical" in schemes,
            any_walk=any(s != "typical" for s in schemes),
            any_noise=any(noisy),
            any_filter=any(filters),
            any_two_filters=2 in filters,
            any_limit=any(p.tree_nodes is not None for p in params),
            edits=edits,
            logprobs=LogprobRows.of(params, [row for edit in edits for row in edit.rows]),
        )


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser over int64, with logical shifts."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def gumbel_noise(seed: Tensor, choice: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """seed, choice, position [B] int64 → standard Gumbel noise [B,V] float32, a pure function of its arguments."""
    key = _mix(_mix(_mix(seed + GOLDEN) + choice * GOLDEN) + position * GOLDEN)
    counter = torch.arange(1, vocab_size + 1, device=seed.device) * GOLDEN
    bits = (_mix(key[:, None] + counter) >> 32) & 0xFFFFFFFF
    # The small exponentials win, so the uniform is kept fine near zero and -log1p(-u) keeps it so.
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """logits [B,V] at the request's temperature → the same with −inf outside top-k, then top-p (nucleus) of what is left.

    top_k, top_p [B]; 0 and 1 switch them off. Ties are ranked by token id, lowest first.
    """
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])
    kept = order.values.masked_fill(rank >= limit[:, None], float("-inf"))
    probs = torch.softmax(kept.to(torch.promote_types(kept.dtype, torch.float32)), dim=-1)
    before = probs.cumsum(dim=-1) - probs
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    kept = kept.masked_fill(outside, float("-inf"))
    return torch.empty_like(kept).scatter_(-1, order.indices, kept)


def draw(logits: Tensor, rows: SamplingRows, position: Tensor, node: Tensor | None = None) -> Tensor:
    """One token [B] for each row of logits [B,V], to stand at `position` [B]: the argmax, or a keyed draw where asked.

    With `node` [B] the logits are [B,N,V], and each row's are those at its node. Of equal values the lowest token id wins.
    """
    if node is None:
        logits, node = logits[:, None], torch.zeros_like(position)
    wide = torch.promote_types(logits.dtype, torch.float32)
    at_node = logits[torch.arange(len(node), device=node.device), node].to(wide)
    top = at_node.argmax(dim=-1)
    if not rows.any_noise:
        return top
    scaled = at_node / rows.temperature[:, None].to(wide)
    if rows.any_filter:
        scaled = filter_logits(scaled, rows.top_k, rows.top_p)
    noise = gumbel_noise(rows.seed, rows.choice, position, logits.shape[-1])
    return torch.where(rows.sample_root > 0, (scaled + noise).argmax(dim=-1), top)
