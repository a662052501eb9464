"""Log-probabilities of emitted tokens under the backbone's own distribution. Knows logits; knows no text and no request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """An emitted token, its natural log-probability, and the best alternatives `top` as (token id, log-probability).

    Best first, of equal ones the lowest id first; `top` has the emitted token among them where it is one of the best.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
