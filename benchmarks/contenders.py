"""What is timed in this process: transformers' `generate`, and our engine with any tree. Each answers prompts by its turns.

Every contender decodes greedily, on past the end of sequence, to exactly the length asked for, so that times compare.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from medusa.config import SamplingParams
from medusa.engine import Engine, Request

GENERATE = "generate"
LOOKUP = "generate with prompt lookup"
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one contender made of some prompts, answered together.

    `token_ids` stand in the prompts' order. `wall_s` runs from the prompts' ids to the last answer's last token; `step_s`
    are the decoding steps behind the prefill, where they can be seen. `num_steps` counts verify steps, each sequence's of
    its own; None where the contender does not tell.
    """

    token_ids: tuple[tuple[int, ...], ...]
    wall_s: float
    step_s: tuple[float, ...] = ()
    num_steps: int | None = None


class Contender(Protocol):
    """One way to answer prompts, up to `max_batch_size` of them at a time."""

    name: str
    max_batch_size: int

    def answer(self, prompts: Sequence[list[int]], num_tokens: int) -> Turn: ...


def load_reference(folder: str | Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers as it comes: its own attention, its own cache, no compilation."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    # The model's own settings (its EOS among them) would fill whatever a call leaves open.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.to(device).eval()


class TransformersGenerate:
    """`generate` on a model of `load_reference`. With `lookup` it drafts so many tokens a step out of the text so far."""

    max_batch_size = 1

    def __init__(self, model: Any, *, lookup: int = 0) -> None:
        self.name = LOOKUP if lookup else GENERATE
        self._model = model
        self._drafting = {"prompt_lookup_num_tokens": lookup} if lookup else {}

    @torch.inference_mode()
    def answer(self, prompts: Sequence[list[int]], num_tokens: int) -> Turn:
        (prompt_ids,) = prompts
        start = time.perf_counter()
        ids = torch.tensor([prompt_ids], device=self._model.device)
        mask = torch.ones_like(ids)
        out = self._model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, **self._drafting)
        token_ids = tuple(out[0, len(prompt_ids) :].tolist())
        return Turn(token_ids=(token_ids,), wall_s=time.perf_counter() - start)


class OurEngine:
    """Our engine; the one-node tree is plain decoding."""

    def __init__(self, engine: Engine, *, name: str) -> None:
        self.name = name
        self.max_batch_size = engine.max_batch_size
        self.engine = engine

    def answer(self, prompts: Sequence[list[int]], num_tokens: int) -> Turn:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        self.engine.step_seconds.clear()
        start = time.perf_counter()
        requests = [Request(prompt_ids=ids, params=params, request_id=str(i)) for i, ids in enumerate(prompts)]
        done = {completion.request_id: completion for completion in self.engine.run(requests)}
        wall_s = time.perf_counter() - start
        completions = [done[request.request_id] for request in requests]
        if failed := [completion.error for completion in completions if completion.error is not None]:
            raise ValueError(f"{self.name} could not answer: {failed[0]}")
        return Turn(
            token_ids=tuple(tuple(completion.token_ids) for completion in completions),
            wall_s=wall_s,
            step_s=tuple(self.engine.step_seconds),
            num_steps=sum(completion.stats.num_steps for completion in completions),
        )
