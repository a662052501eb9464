"""Contenders in turn on the same prompts, and what came of it at one batch size. Knows contenders; knows no command line."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import track

from benchmarks.command import console
from benchmarks.comparison import Comparison, Repeat, StepAgreement, compare, step_agreement
from benchmarks.contenders import PLAIN, Contender, OurEngine
from benchmarks.our_engines import OUR_CHAIN
from benchmarks.peers.engines import VLLM_HEADS
from benchmarks.roofline import Roofline, cache_bytes, weight_bytes

WARM_UP_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything measured at one batch size. `chain` compares our chain with vLLM's, where both were there."""

    comparison: Comparison
    roofline: Roofline
    chain: StepAgreement | None

    def as_dict(self) -> dict[str, object]:
        chain = {"chain": vars(self.chain)} if self.chain else {}
        return self.comparison.as_dict() | {"roofline": self.roofline.as_dict()} | chain


def in_groups(prompts: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """The prompts by `size`, each at least once; the last group is filled up with the first prompts."""
    count = -(-len(prompts) // size) * size
    rows = [prompts[i % len(prompts)] for i in range(count)]
    return [rows[start : start + size] for start in range(0, count, size)]


def run_interleaved(
    contenders: Sequence[Contender], groups: Sequence[list[list[int]]], *, num_tokens: int, num_repeats: int
) -> list[Repeat]:
    """Every contender on every group of prompts, `num_repeats` times over; who begins rotates from group to group.

    ValueError where two have one name.
    """
    twice = [name for name, number in Counter(contender.name for contender in contenders).items() if number > 1]
    if twice:
        raise ValueError(f"several contenders are called {', '.join(twice)}; name each tree once")
    for contender in contenders:
        contender.answer(groups[0], WARM_UP_TOKENS)
    gc.collect()
    gc.freeze()  # a collection then looks at what turns leave behind, not at all that is loaded
    repeats: list[Repeat] = []
    for _ in track(range(num_repeats), description="repeats", console=console, transient=True):
        repeat: Repeat = {contender.name: [] for contender in contenders}
        for index, group in enumerate(groups):
            turn = (index + len(repeats)) % len(contenders)
            for contender in (*contenders[turn:], *contenders[:turn]):
                gc.collect()
                repeat[contender.name].append(contender.answer(group, num_tokens))
        repeats.append(repeat)
    gc.unfreeze()
    return repeats


def measure_section(
    ours: Sequence[OurEngine],
    others: Sequence[Contender],
    prompts: Sequence[list[int]],
    *,
    num_rounds: int = 1,
    num_tokens: int,
    num_repeats: int,
    bandwidth: float,
) -> Section:
    """`ours` are plain and trees, made for one batch size; of the others those that can take so many take part.

    With several rounds each place of a batch (of more than one) gives so many answers: whoever is done early goes on with
    the next, where in one round it waits for the slowest.
    """
    plain, trees = ours[0], ours[1:]
    batch = plain.max_batch_size
    able = [other for other in others if other.max_batch_size >= batch]
    groups = in_groups(prompts, batch * num_rounds if batch > 1 else 1)
    repeats = run_interleaved([*able, *ours], groups, num_tokens=num_tokens, num_repeats=num_repeats)
    first, comparison = repeats[0], compare(repeats, plain=PLAIN, trees=[tree.name for tree in trees])
    mean_context = sum(map(len, prompts)) // len(prompts) + num_tokens // 2
    return Section(
        comparison=comparison,
        roofline=Roofline(
            weight_bytes=weight_bytes(plain.engine.backbone),
            cache_bytes=cache_bytes(plain.engine.decoder.cache, length=mean_context) * batch,
            bandwidth=bandwidth,
            step_s=comparison.plain_step_s,
        ),
        chain=step_agreement(first[OUR_CHAIN], first[VLLM_HEADS]) if {OUR_CHAIN, VLLM_HEADS} <= first.keys() else None,
    )
