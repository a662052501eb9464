"""Log-probabilities of emitted tokens under the backbone's own distribution. Knows logits; knows no text and no request.

B rows, N nodes, L depth, M tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from medusa.candidates import ranked_tokens
from medusa.config import SamplingParams


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """An emitted token, its natural log-probability, and the best alternatives `top` as (token id, log-probability).

    Best first, of equal ones the lowest id first; `top` has the emitted token among them where it is one of the best.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


TokenLogprobs = tuple[TokenLogprob, ...]


@dataclass(frozen=True, kw_only=True)
class LogprobRows:
    """Which rows of a batch ask for log-probabilities, and of how many alternatives. `edited` are those among them whose
    logits are changed in place before a token is chosen."""

    num_top: dict[int, int]
    edited: frozenset[int]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], edited: Sequence[int]) -> LogprobRows:
        """`edited` are the rows with edits, whether or not they ask here."""
        num_top = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None}
        return cls(num_top=num_top, edited=frozenset(edited) & set(num_top))

    def before_edits(self, logits: Tensor) -> dict[int, Tensor]:
        """The logits [N,V] of each row that asks, from logits [B,N,V]: a copy of those that will be edited."""
        return {row: logits[row].clone() if row in self.edited else logits[row] for row in self.num_top}

    def read(self, before: dict[int, Tensor], path: Tensor, emitted: Sequence[Sequence[int]]) -> list[TokenLogprobs]:
        """For each of B rows, one entry beside each token emitted, or none where the row does not ask.

        `before` is what `before_edits` gave, `path` [B,L+1] the accepted nodes from the root on: the logits at the i-th
        of them are those of the i-th emitted token.
        """
        if not before:
            return [()] * len(emitted)
        logits = torch.cat([scores[path[row, : len(emitted[row])]] for row, scores in before.items()])
        tokens = [token for row in before for token in emitted[row]]
        num_top = [self.num_top[row] for row in before for _ in emitted[row]]
        each = token_logprobs(logits, tokens, num_top)
        own = {row: tuple(islice(each, len(emitted[row]))) for row in before}
        return [own.get(row, ()) for row in range(len(emitted))]


def token_logprobs(logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> Iterator[TokenLogprob]:
    """logits [M,V], the token chosen from each and how many alternatives to name → an entry for each."""
    log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    chosen = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1)
    best = ranked_tokens(logits, min(max(num_top), logits.shape[-1]))
    columns = chosen.tolist(), best.tolist(), log_probs.gather(1, best).tolist()
    for token, count, logprob, ids, values in zip(tokens, num_top, *columns, strict=True):
        yield TokenLogprob(token_id=token, logprob=logprob, top=tuple(zip(ids, values, strict=True))[:count])
