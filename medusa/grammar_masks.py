"""What grammars allow at every node of a verified tree. Knows token ids and logits; knows no text, no model, no engine.

    B rows, N nodes, M nodes that a grammar can reach, V vocabulary

At a node the grammar's state is that after the request's emitted tokens, the node's ancestors and itself. What is
forbidden there gets the logit −inf, before any scheme chooses a token: a node whose token its grammar forbids has
probability 0 at its parent, so no scheme accepts it. The end of sequence is allowed exactly where the document is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.errors import PromptError
from medusa.grammar import Grammar, GrammarVocabulary, first_line
from medusa.tree import RowTrees


class Guide:
    """How far one answer is in its grammar. Raises PromptError for a grammar that this vocabulary cannot write."""

    def __init__(self, grammar: Grammar, vocabulary: GrammarVocabulary) -> None:
        self._matcher = vocabulary.matcher(grammar)
        self._eos = vocabulary.eos
        self._num_read = 0
        if self.error:
            raise PromptError(self.error)

    @property
    def error(self) -> str | None:
        """Why this grammar can go no further, if it cannot: it is too large or too ambiguous for llguidance's limits."""
        return f"the grammar failed: {first_line(self._matcher.get_error())}" if self._matcher.is_error() else None

    def reachable(
        self, emitted: Sequence[int], tokens: Sequence[int], children: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, bytes]]:
        """The nodes of a tree that the grammar can reach, with what it allows after each: a bit for each token id.

        `emitted` ends with the tree's root. A node that the grammar forbids, and whatever stands below it or below the
        end of sequence, is left out: it cannot be accepted.
        """
        self._matcher.consume_tokens(list(emitted[self._num_read :]))
        self._num_read = len(emitted)
        yield from self._walk(0, tokens, children)

    def _walk(self, node: int, tokens: Sequence[int], children: Sequence[Sequence[int]]) -> Iterator[tuple[int, bytes]]:
        mask = self._matcher.compute_bitmask()
        yield node, mask
        for child in children[node]:
            token = tokens[child]
            if _allows(mask, token) and token not in self._eos and self._matcher.consume_token(token):
                yield from self._walk(child, tokens, children)
                self._matcher.rollback(1)


@dataclass(frozen=True, kw_only=True)
class GrammarMasks:
    """The grammars of R rows of a batch: `rows` says which, the others stand beside it.

    `emitted` are the very lists in which the tokens of these requests are collected: they are read anew at each step.
    """

    rows: Sequence[int]
    guides: Sequence[Guide]
    emitted: Sequence[Sequence[int]]

    @classmethod
    def of(cls, guides: Sequence[Guide | None], emitted: Sequence[Sequence[int]]) -> GrammarMasks | None:
        """The grammars of B requests and what each has emitted, or None where no request has one."""
        own = [(row, guide, emitted[row]) for row, guide in enumerate(guides) if guide is not None]
        if not own:
            return None
        rows, found, lists = zip(*own, strict=True)
        return cls(rows=rows, guides=found, emitted=lists)

    def apply(self, logits: Tensor, tokens: Tensor, tree: RowTrees) -> None:
        """Put −inf in place of what a row's grammar forbids at each node, in logits [B,N,V] of a tree of tokens [B,N]."""
        own = tokens[list(self.rows)].tolist()
        rows, nodes, masks = [], [], []
        for row, guide, emitted, row_tokens in zip(self.rows, self.guides, self.emitted, own, strict=True):
            for node, mask in guide.reachable(emitted, row_tokens, tree.children_of(row)):
                rows.append(row)
                nodes.append(node)
                masks.append(mask)
        allowed = _unpack(masks, logits.shape[-1], logits.device)
        logits[rows, nodes] = logits[rows, nodes].masked_fill(~allowed, float("-inf"))


def _allows(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)


def _unpack(masks: Sequence[bytes], vocab_size: int, device: torch.device) -> Tensor:
    """M masks of one bit a token → bool [M,V]."""
    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).view(len(masks), -1).to(device)
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=device)
    return (bits & 1).flatten(1)[:, :vocab_size].bool()
