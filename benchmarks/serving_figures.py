"""From how requests ended to what a load test says. Pure arithmetic; knows no server and no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.serving_client import Ending, Outcome

# An answer that follows another prompt's expected one this many characters further than its own is another's.
TELLING_CHARACTERS = 24
TOLD = (Ending.FINISHED, Ending.REFUSED, Ending.ERROR)


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Milliseconds; None without a single value."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        ordered = sorted(seconds)

        def at(share: float) -> float | None:
            return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

        return cls(p50=at(0.5), p95=at(0.95), p99=at(0.99))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Finished answers beside what each prompt's should be.

    `differing` ones part from their own and follow no other: in half precision a near-tie may fall either way, in
    float32 each is a fault. `mixed` ones follow another prompt's.
    """

    identical: int
    differing: int
    mixed: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], expected: Mapping[str, str]) -> Answers:
        kinds = Counter(_compare(one, expected) for one in outcomes if one.ending is Ending.FINISHED)
        return cls(identical=kinds["identical"], differing=kinds["differing"], mixed=kinds["mixed"])


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One level of load. `tokens_per_s` counts finished answers alone, over the time from first request to last answer.

    `lost` requests got neither an answer nor a refusal nor an error that their client can read. TPOT is the time per
    token behind the first; `gap_ms` lie between pieces of text, each of one token or several.
    """

    num_requests: int
    endings: dict[str, int]
    lost: int
    answers: Answers
    seconds: float
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: Quantiles
    gap_ms: Quantiles
    tpot_ms: Quantiles

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], expected: Mapping[str, str]) -> Figures:
        """ValueError without a single request."""
        if not outcomes:
            raise ValueError("no request was sent: the time was too short; raise --seconds")
        finished = [one for one in outcomes if one.ending is Ending.FINISHED]
        seconds = max(one.ended for one in outcomes) - min(one.began for one in outcomes)
        firsts = [one.first_text - one.began for one in finished if one.first_text is not None]
        return cls(
            num_requests=len(outcomes),
            endings=dict(Counter(one.ending.value for one in outcomes)),
            lost=sum(one.ending not in TOLD for one in outcomes),
            answers=Answers.of(outcomes, expected),
            seconds=seconds,
            requests_per_s=len(finished) / seconds,
            tokens_per_s=sum(one.num_tokens for one in finished) / seconds,
            ttft_ms=Quantiles.of(firsts),
            gap_ms=Quantiles.of([gap for one in finished for gap in one.gaps_s]),
            tpot_ms=Quantiles.of([_token_s(one) for one in finished if one.num_tokens > 1 and one.first_text]),
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def _token_s(one: Outcome) -> float:
    assert one.first_text is not None
    return (one.ended - one.first_text) / (one.num_tokens - 1)


def _compare(one: Outcome, expected: Mapping[str, str]) -> str:
    if one.text == expected[one.prompt]:
        return "identical"
    own = _shared(one.text, expected[one.prompt])
    others = (_shared(one.text, text) for prompt, text in expected.items() if prompt != one.prompt)
    return "mixed" if max(others, default=0) >= own + TELLING_CHARACTERS else "differing"


def _shared(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
