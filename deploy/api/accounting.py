"""From engine statistics to the protocol's usage and speculative decoding metrics: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.api.protocol import Metrics, PromptTokensDetails, SpeculativeDecoding, Usage
from medusa.engine import Completion


def usage(completions: Sequence[Completion], *, n: int) -> Usage:
    """Of all answers to one request, `n` to each prompt, side by side. A prompt counts once, as OpenAI counts it."""
    firsts = [completion.stats for completion in completions[::n]]
    prompt = sum(stats.prompt_tokens for stats in firsts)
    answer = sum(len(completion.token_ids) for completion in completions)
    cached = sum(stats.cached_tokens for stats in firsts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def running_usage(num_prompt_tokens: int, num_tokens: int) -> Usage:
    """Of an answer that still grows; what the prefix cache gave is told at its end."""
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        prompt_tokens_details=None,
    )


def metrics(completions: Sequence[Completion], *, tree_depth: int) -> Metrics:
    """Of all answers to one request together; `tree_depth` is how many guesses can come true in one step."""
    stats = [completion.stats for completion in completions]
    steps = sum(each.num_steps for each in stats)
    if not steps:
        return Metrics(speculative_decoding=None)
    drafted = sum(each.num_draft_tokens for each in stats)
    accepted = sum(each.num_accepted_tokens for each in stats)
    return Metrics(
        speculative_decoding=SpeculativeDecoding(
            mean_acceptance_length=1 + accepted / steps,
            draft_acceptance_rate=accepted / drafted if drafted else None,
            acceptance_histogram=_added([each.acceptance_histogram for each in stats]),
            num_spec_steps=steps,
            num_draft_tokens=drafted,
            num_accepted_draft_tokens=accepted,
            num_spec_tokens=tree_depth,
        )
    )


def _added(histograms: Sequence[Sequence[int]]) -> list[int]:
    length = max(map(len, histograms))
    return [sum(each[depth] for each in histograms if depth < len(each)) for depth in range(length)]
