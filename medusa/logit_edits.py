"""Penalties and logit bias at every node of a verified tree. Knows logits and token ids; knows no model and no engine.

    B rows, R rows that ask for edits, E entries of a table, N nodes, L depth, V vocabulary

A node's history is what its request has generated so far, the root included, then the node's ancestors below the root
and itself. An edited logit is one function of the model's logit, the token's count in that history and its bias: it is
the same number wherever the history stands, emitted or in the tree. So any tree decodes what plain decoding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.config import SamplingParams
from medusa.tree import RowTrees


@dataclass(frozen=True, kw_only=True)
class LogitEdits:
    """What some rows of a batch ask for. `rows` says which; `emitted`, `presence` and `frequency` [R,1] stand beside it.

    `emitted` are the very lists in which the tokens of these requests are collected: they are read anew at each step.
    The biases are E triples: place among the R rows, token id, value.
    """

    rows: Sequence[int]
    emitted: Sequence[Sequence[int]]
    presence: Tensor
    frequency: Tensor
    bias_place: tuple[Tensor, Tensor]
    bias_value: Tensor
    any_penalty: bool

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], emitted: Sequence[Sequence[int]], device: torch.device
    ) -> LogitEdits | None:
        """The edits of B requests and what each has emitted, or None where no request asks for any."""
        rows = [row for row, p in enumerate(params) if p.logit_bias or p.any_penalty]
        if not rows:
            return None
        own = [params[row] for row in rows]
        biases = [(row, token, value) for row, p in enumerate(own) for token, value in p.logit_bias.items()]
        places, ids, values = zip(*biases, strict=True) if biases else ((), (), ())

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return cls(
            rows=rows,
            emitted=[emitted[row] for row in rows],
            presence=column([p.presence_penalty for p in own])[:, None],
            frequency=column([p.frequency_penalty for p in own])[:, None],
            bias_place=_place(places, ids, device),
            bias_value=column(values),
            any_penalty=any(p.any_penalty for p in own),
        )

    def apply(self, logits: Tensor, tokens: Tensor, tree: RowTrees) -> None:
        """Edit in place the logits [B,N,V] of a tree of tokens [B,N]; rows that ask for nothing are not touched."""
        bias, counts = self._bias(logits), self._counts(logits)
        below = self._edited_in_tree(logits, tokens, tree, bias, counts) if self.any_penalty and tree.depth else None
        for row, change in zip(self.rows, self._change(bias, counts).to(logits.dtype), strict=True):
            logits[row] += change
        if below is not None:
            place, edited = below
            logits[place] = edited

    def _edited_in_tree(
        self, logits: Tensor, tokens: Tensor, tree: RowTrees, bias: Tensor, counts: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Where each node's own ancestors and itself stand in the logits, and the edited logits there, all [R,N,L].

        A shallow node has fewer than L tokens below the root; the root's own stands in for the rest, so that what is
        written there is right as well.
        """
        rows = torch.tensor(self.rows, device=logits.device)
        path = tree.node_paths[rows][..., 1:]
        real = path >= 0
        ids = tokens[rows].gather(1, path.clamp_min(0).flatten(1)).view_as(path)
        repeats = ((ids[..., :, None] == ids[..., None, :]) & real[..., None, :]).sum(dim=-1)
        flat = ids.flatten(1)
        change = self._change(bias.gather(1, flat), counts.gather(1, flat) + repeats.flatten(1)).view(ids.shape)
        place = rows[:, None, None], torch.arange(tree.num_nodes, device=logits.device)[:, None], ids
        return place, logits[place] + change.to(logits.dtype)

    def _change(self, bias: Tensor, counts: Tensor) -> Tensor:
        """What is added to logits whose tokens have this bias and stand this often in the history, both [R,…]."""
        return bias - (self.frequency * counts + self.presence * (counts > 0)).to(bias.dtype)

    def _bias(self, logits: Tensor) -> Tensor:
        """[R,V], at least float32."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        table = torch.zeros(len(self.rows), logits.shape[-1], dtype=wide, device=logits.device)
        return table.index_put_(self.bias_place, self.bias_value.to(wide))

    def _counts(self, logits: Tensor) -> Tensor:
        """How often each token was emitted, [R,V]."""
        places = [row for row, tokens in enumerate(self.emitted) for _ in tokens]
        ids = [token for tokens in self.emitted for token in tokens]
        table = torch.zeros(len(self.rows), logits.shape[-1], dtype=torch.int32, device=logits.device)
        one = torch.ones((), dtype=torch.int32, device=logits.device)
        return table.index_put_(_place(places, ids, logits.device), one, accumulate=True)


def _place(rows: Sequence[int], ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(rows, dtype=torch.long, device=device),
        torch.tensor(ids, dtype=torch.long, device=device),
    )
