"""One request at a time through an engine, timed. What calibration and evaluation have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from medusa.config import SamplingParams
from medusa.engine import Engine, Request
from medusa.errors import PromptError


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One answer and its cost. `step_s` are the verify steps alone; `total_s` is prefill and decoding."""

    token_ids: list[int]
    tokens_per_step: list[int]
    step_s: list[float]
    total_s: float

    @property
    def num_steps(self) -> int:
        return len(self.tokens_per_step) - 1


def trace(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> Trace:
    """Answer one prompt alone. Raises PromptError where the engine cannot."""
    engine.step_seconds.clear()
    (completion,) = engine.run([Request(prompt_ids=prompt_ids, params=params)])
    if completion.error is not None:
        raise PromptError(completion.error)
    return Trace(
        token_ids=completion.token_ids,
        tokens_per_step=list(completion.stats.tokens_per_step),
        step_s=list(engine.step_seconds),
        total_s=completion.stats.prefill_s + completion.stats.decode_s,
    )


def median_step_s(traces: Sequence[Trace]) -> float:
    """Median over all steps of all traces; NaN where there was none."""
    steps = [seconds for one in traces for seconds in one.step_s]
    return median(steps) if steps else float("nan")


def tokens_per_s(traces: Sequence[Trace]) -> float:
    """Tokens of all answers over the time of all, prefill included."""
    return sum(len(one.token_ids) for one in traces) / sum(one.total_s for one in traces)


def prompts_digest(prompts: Sequence[Sequence[int]], *settings: object) -> str:
    """Names a measurement: equal for the same prompts under the same settings."""
    return hashlib.sha256(repr(([list(ids) for ids in prompts], settings)).encode()).hexdigest()[:16]
