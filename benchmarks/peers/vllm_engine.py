"""vLLM's offline engine, for `lines.py`. Runs in vLLM's environment: imports nothing of this project."""

from __future__ import annotations

from typing import Any

import vllm

DRAFTS = "vllm:spec_decode_num_drafts"


class Engine:
    """Greedy, on past the end of sequence, without detokenising; no prompt is remembered for the next."""

    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        context_length: int,
        max_batch_size: int,
        draft: dict[str, Any] | None,
        options: dict[str, Any],
    ) -> None:
        """`draft` is vLLM's speculative configuration; `options` are further arguments of its `LLM`, and win."""
        settings: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "max_model_len": context_length,
            "max_num_seqs": max_batch_size,
            "enable_prefix_caching": False,
            "disable_log_stats": False,  # or nothing is counted
        }
        if draft is not None:
            settings["speculative_config"] = draft
        self.version = f"vLLM {vllm.__version__}"
        self._drafts = draft is not None
        self._llm = vllm.LLM(**{**settings, **options})

    def answer(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], int | None]:
        """Every decoding step of a sequence verifies one draft, so drafts are steps; plain decoding counts none."""
        params = vllm.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        before = self._num_drafts()
        done = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        token_ids = [list(one.outputs[0].token_ids) for one in done]
        return token_ids, self._num_drafts() - before if self._drafts else None

    def _num_drafts(self) -> int:
        return sum(int(metric.value) for metric in self._llm.get_metrics() if metric.name == DRAFTS)
