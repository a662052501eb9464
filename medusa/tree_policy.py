"""How many tree nodes a step should verify, by load: measured step times against expected tokens. Knows no request.

    B sequences of a step, N nodes of each one's tree

One sequence leaves a processor idle enough that a tree costs little more than a token; many sequences do not. Trees are
nested, so a smaller one is the first nodes of the larger. One node is plain decoding, and always among the choices.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.dynamic_tree import DynamicTree
from medusa.sampling import SamplingRows
from medusa.tree import Tree
from medusa.tree_search import expected_tokens

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HOPELESS = 1.5  # a tree that takes this many times what its tokens are worth is not measured for larger batches
MEASURED_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """`seconds[B][N]` of one decode step, as measured. A size missing at a batch was too dear to be worth measuring."""

    seconds: Mapping[int, Mapping[int, float]]

    def __post_init__(self) -> None:
        if not self.seconds or any(1 not in row for row in self.seconds.values()):
            raise ValueError("step costs need at least one batch size, and the plain step (1 node) at each")
        if any(not value > 0 for row in self.seconds.values() for value in row.values()):
            raise ValueError("step costs must be seconds above 0")

    def at(self, batch: int, nodes: int) -> float:
        """Seconds of a step: between two measured batches on the line through them, outside those of the nearest."""
        if batch in self.seconds:
            return self.seconds[batch].get(nodes, float("inf"))
        known = sorted(self.seconds)
        place = bisect_left(known, batch)
        above = known[min(place, len(known) - 1)]
        below = above if batch >= above else known[max(place - 1, 0)]
        low, high = (self.seconds[b].get(nodes, float("inf")) for b in (below, above))
        if above == below or float("inf") in (low, high):
            return max(low, high)
        return low + (high - low) * (batch - below) / (above - below)


@dataclass(frozen=True, kw_only=True)
class TreePolicy:
    """Batch → nodes. `expected[N]` tokens of a step; a tree must promise `margin` more than plain decoding to be used.

    The margin stands for the noise of measuring, a tenth on a shared machine: at no batch may a tree be slower than plain
    decoding.
    """

    expected: Mapping[int, float]
    costs: StepCosts
    margin: float = 0.1

    def __post_init__(self) -> None:
        if self.expected.get(1) != 1:
            raise ValueError(f"a step of 1 node gives 1 token, got {self.expected.get(1)}")
        if self.margin < 0:
            raise ValueError(f"margin must be 0 or more, got {self.margin}")

    def choose(self, batch: int, gain: float = 1.0) -> int:
        """The size with the most tokens per second at this batch, the smaller of equals; `gain` as in `Gain`."""
        rates = {n: (1 + gain * (self.expected[n] - 1)) / self.costs.at(batch, n) for n in sorted(self.expected)}
        best = max(rates, key=rates.__getitem__)
        return best if rates[best] > (1 + self.margin) * rates[1] else 1


class Gain:
    """What trees give beyond the first token, over what was expected of them: a running mean over sequences' steps.

    Expectations come from other texts than those decoded now. While decoding is plain nothing is seen, so the value
    drifts back to 1 and trees get another, short, chance.
    """

    MEMORY = 64  # sequences' steps
    DRIFT = 1 / 2048  # a plain step's

    def __init__(self) -> None:
        self.value = 1.0

    def see(self, *, expected: float, emitted: Sequence[int]) -> None:
        """One step: tokens that each sequence was expected to emit, and that they emitted."""
        if expected <= 1:
            self.value += (1 - self.value) * self.DRIFT
            return
        for tokens in emitted:
            self.value += ((tokens - 1) / (expected - 1) - self.value) / self.MEMORY


def tree_sizes(tree: Tree | DynamicTree) -> tuple[int, ...]:
    """The sizes that a tree is cut to: few, so that shapes repeat; its own the last."""
    return (*(size for size in SIZES if size < tree.num_nodes), tree.num_nodes)


def expected_by_size(accuracy: Sequence[Sequence[float]], tree: Tree | DynamicTree) -> dict[int, float]:
    """Nodes → tokens that a step is expected to emit, from the heads' `accuracy` [K][R] as a checkpoint has it."""
    table = torch.tensor(accuracy, dtype=torch.float64)
    return {size: expected_tokens(table, tree.first(size).paths[1:]) for size in tree_sizes(tree)}


def measure_step_costs(
    decoder: Decoder,
    expected: Mapping[int, float],
    *,
    budget_s: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Time the decoder's own steps, for every size in `expected` and batches up to its slots. The decoder must be idle.

    Each is timed twice, the first time to warm up; rounds follow until `budget_s` is spent. The least of a size's times
    counts: what else the machine did falls out of it.
    """
    batches = [*(b for b in BATCHES if b < decoder.num_slots), decoder.num_slots]
    length = min(MEASURED_LENGTH, decoder.context_length - 1)
    began, sizes = clock(), sorted(expected)

    def run(batch: int, nodes: int) -> float:
        rows = SamplingRows.of([SamplingParams()] * batch, decoder.backbone.device)
        decoder.pretend(batch, length)
        start = clock()
        decoder.step(batch, rows, nodes=nodes)
        return clock() - start

    best: dict[int, dict[int, float]] = {}
    try:
        for batch in batches:
            row = best[batch] = {nodes: min(run(batch, nodes), run(batch, nodes)) for nodes in sizes}
            sizes = [nodes for nodes in sizes if row[nodes] <= HOPELESS * expected[nodes] * row[1]]
        while clock() - began < budget_s:
            for batch, row in best.items():
                for nodes in row:
                    row[nodes] = min(row[nodes], run(batch, nodes))
    finally:
        for slot in range(decoder.num_slots):
            decoder.free(slot)
    return StepCosts(seconds=best)


def fit_policy(decoder: Decoder, accuracy: Sequence[Sequence[float]], *, budget_s: float = 5.0) -> TreePolicy:
    """The policy of an idle decoder and its heads: expected tokens by their accuracy, step times measured now."""
    expected = expected_by_size(accuracy, decoder.shape)
    return TreePolicy(expected=expected, costs=measure_step_costs(decoder, expected, budget_s=budget_s))
