"""What is timed: transformers' `generate`, and our engine with any tree. Each answers one prompt at a time.

Every contender decodes greedily, on past the end of sequence, to exactly the length asked for, so that times compare.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from medusa.config import SamplingParams
from medusa.engine import Engine, Request


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`wall_s` runs from the prompt's ids to the last token's; `step_s` are the decoding steps behind the prefill."""

    token_ids: tuple[int, ...]
    wall_s: float
    step_s: tuple[float, ...] = ()


class Contender(Protocol):
    """One way to answer a prompt."""

    name: str

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Answer: ...


class TransformersGenerate:
    """transformers as it comes: its own attention, its own cache, no compilation."""

    name = "generate"

    def __init__(self, folder: str | Path, *, dtype: torch.dtype, device: torch.device) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.to(device).eval()
        # The model's own settings (its EOS among them) would fill whatever a call leaves open.
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def answer(self, prompt_ids: list[int], num_tokens: int) -> Answer:
        start = time.perf_counter()
        ids = torch.tensor([prompt_ids], device=self._model.device)
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens)
        token_ids = tuple(out[0, len(prompt_ids) :].tolist())
        return Answer(token_ids=token_ids, wall_s=time.perf_counter() - start)


class OurEngine:
    """Our engine with one sequence in its batch; the one-node tree is plain decoding."""

    def __init__(self, engine: Engine, *, name: str) -> None:
        self.name = name
        self._engine = engine

    def answer(self, prompt_ids: list[int], num_tokens: int) -> Answer:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        token_ids: list[int] = []
        step_s: list[float] = []
        start = before = time.perf_counter()
        self._engine.submit(Request(prompt_ids=prompt_ids, params=params, request_id=self.name))
        while self._engine.has_work:
            deltas = self._engine.step()
            after = time.perf_counter()
            if token_ids:  # what made the first token was the prefill
                step_s.append(after - before)
            token_ids += [token for delta in deltas for token in delta.token_ids]
            before = after
        return Answer(token_ids=tuple(token_ids), wall_s=before - start, step_s=tuple(step_s))
