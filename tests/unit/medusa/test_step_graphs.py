"""Replayed steps are the eager ones: the oracle is the same engine without graphs, token for token."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from medusa.backbone import Backbone
from medusa.config import SamplingParams
from medusa.decoder import Decoder, _coarse_bucket
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Engine, Request
from medusa.fused_llama import FusedLlama
from medusa.heads import MedusaHeads
from medusa.sampling import SamplingRows
from medusa.step_graphs import StepGraphs, StepShape, capture_for
from medusa.tree import Tree
from medusa.tree_policy import StepCosts, TreePolicy
from tests.unit.medusa.recording import record, run_without_values
from tests.unit.medusa.tiny import random_heads, tiny_backbone

CPU = torch.device("cpu")
CONTEXT = 160  # a bucket of 128 positions and the rest
STATIC = Tree.full([6, 3, 2])
TREES = {"static": STATIC, "dynamic": DynamicTree(superset=STATIC, num_nodes=12)}
SCHEMES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "rejection": [dict(temperature=0.9, acceptance="rejection"), {}],
    "typical": [dict(temperature=1.2, top_k=5), dict(temperature=0.7, root="greedy")],
    "mixed": [
        {},
        dict(temperature=0.9, acceptance="rejection", top_p=0.8),
        dict(temperature=0.8, top_p=0.9),
        dict(temperature=1.1, acceptance="rejection", top_k=3, tree_nodes=4),
    ],
}


def model(path: str) -> tuple[Backbone, MedusaHeads]:
    """One layer of Llama through the fused path, or of Mistral (its window moves) through transformers' own."""
    family = "llama" if path == "fused" else "mistral"
    backbone = tiny_backbone(family, seed=3, dtype=torch.float64, num_hidden_layers=1)
    backbone.fused = FusedLlama(backbone.model) if path == "fused" else None
    return backbone, random_heads(backbone)


MODELS = {path: model(path) for path in ("fused", "generic")}


def decoder_of(path: str = "fused", *, slots: int = 2, graphs: Any = record, tree: Any = STATIC) -> Decoder:
    return Decoder(*MODELS[path], tree, num_slots=slots, context_length=CONTEXT, graphs=graphs)


def jobs(scheme: str, seed: int, count: int = 5) -> list[Request]:
    """Some end early and some late, some begin just below the border of a bucket: batches shrink, grow and cross it."""
    rng = random.Random(seed)
    return [
        Request(
            prompt_ids=[rng.randrange(12) for _ in range(rng.choice([3, 20, 105, 112]))],
            params=SamplingParams(max_tokens=rng.randint(2, 30), seed=n, ignore_eos=True, **params),
            request_id=str(n),
        )
        for n, params in zip(range(count), itertools.cycle(SCHEMES[scheme]), strict=False)
    ]


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    return {done.request_id: done.token_ids for done in engine.run(requests)}


@pytest.mark.parametrize(
    ("path", "tree", "scheme"),
    [
        *(("fused", "static", scheme) for scheme in SCHEMES),
        ("fused", "dynamic", "rejection"),
        ("fused", "dynamic", "mixed"),
        ("generic", "static", "greedy"),
        ("generic", "static", "mixed"),
    ],
)
def test_replayed_steps_decode_what_eager_steps_decode(path: str, tree: str, scheme: str) -> None:
    def engine(graphs: Any) -> Engine:
        return Engine(*MODELS[path], tree=TREES[tree], max_batch_size=2, context_length=CONTEXT, graphs=graphs)

    eager, replayed = engine(False), engine(record)
    for seed in range(2):
        requests = jobs(scheme, seed)
        want = answers(eager, requests)
        assert answers(replayed, requests) == want
        assert len({token for answer in want.values() for token in answer}) > 3, "it says more than one thing"
    made = replayed.decoder.graphs
    assert made is not None
    assert {shape.num_rows for shape in made.shapes} == {1, 2} and len({shape.length for shape in made.shapes}) == 2


def test_a_few_graphs_that_make_room_for_each_other_change_no_answer() -> None:
    class Moody(TreePolicy):
        moods = itertools.cycle([4, 8, STATIC.num_nodes, 1])

        def choose(self, batch: int, gain: float = 1.0) -> int:
            return next(self.moods)

    policy = Moody(expected={1: 1.0}, costs=StepCosts(seconds={1: {1: 1.0}}))
    made = Engine(*MODELS["fused"], tree=STATIC, max_batch_size=2, context_length=CONTEXT, policy=policy, graphs=record)
    assert made.decoder.graphs is not None
    made.decoder.graphs._max_graphs = 2
    requests = jobs("greedy", 5, count=2)
    eager = Engine(*MODELS["fused"], max_batch_size=1, context_length=CONTEXT, graphs=False)
    assert answers(made, requests) == answers(eager, requests)
    assert len(made.decoder.graphs) == 2


def test_one_graph_serves_other_temperatures_seeds_and_live_rows() -> None:
    made, eager = decoder_of(), decoder_of(graphs=False)
    prompts = [[3, 1, 4], [1, 5]]
    greedy = SamplingRows.of([SamplingParams()] * 2, CPU)
    for each in (made, eager):
        each.prefill(0, prompts, greedy)
    told = []
    for seed, temperature, live in ((1, 0.5, 2), (2, 2.0, 1), (3, 2.0, 2), (4, 1.0, 1)):
        params = SamplingParams(temperature=temperature, acceptance="rejection", seed=seed)
        rows = SamplingRows.of([params] * 2, CPU)
        told.append(made.step(2, rows, live=live).tokens)
        assert told[-1] == eager.step(2, rows, live=live).tokens and len(told[-1]) == live
        for mine, theirs in ((made.lengths, eager.lengths), (made.roots, eager.roots), (made.hidden, eager.hidden)):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert made.graphs is not None and len(made.graphs) == 1


def test_a_slot_that_a_replay_wrote_to_is_zeroed_for_the_next_user() -> None:
    made, rows = decoder_of(slots=1), SamplingRows.of([SamplingParams()], CPU)
    made.prefill(0, [[3, 1, 4]], rows)
    for _ in range(2):
        made.step(1, rows)
    made.open(0)
    made.step(1, rows)  # written below the bucket's end, by a replay alone
    made.open(0)
    assert not made.cache.store.any()


@pytest.mark.parametrize("asks", [dict(logprobs=2), dict(logit_bias={3: 4.0}), dict(frequency_penalty=1.0)])
def test_what_takes_the_hosts_part_is_never_recorded(asks: dict[str, Any]) -> None:
    made = Engine(*MODELS["fused"], tree=STATIC, max_batch_size=2, context_length=CONTEXT, graphs=record)
    eager = Engine(*MODELS["fused"], tree=STATIC, max_batch_size=2, context_length=CONTEXT, graphs=False)
    requests = jobs("greedy", 1, count=2)
    requests = [replace(r, params=replace(r.params, max_tokens=8, **asks)) for r in requests]
    done, want = ({c.request_id: c for c in each.run(requests)} for each in (made, eager))
    for name, completion in want.items():
        assert done[name].token_ids == completion.token_ids and done[name].logprobs == completion.logprobs
    assert made.decoder.graphs is not None and len(made.decoder.graphs) == 0


@pytest.mark.parametrize("scheme", ["greedy", "mixed"])
@pytest.mark.parametrize(("path", "tree"), [("fused", "dynamic"), ("generic", "static")])
def test_a_step_never_looks_at_a_value(path: str, tree: str, scheme: str) -> None:
    """So it is fit for a GPU's graph. With the CPU's early exit it does look, which shows that looking is seen."""
    made = decoder_of(path, slots=4, graphs=False, tree=TREES[tree])
    rows = SamplingRows.of([SamplingParams(**params) for params in SCHEMES[scheme]], CPU)
    shape = StepShape(len(rows.seed), made.tree_of(TREES[tree].num_nodes).num_nodes, 128)
    with torch.inference_mode():
        table = run_without_values(lambda: made._advance(shape, rows, torch.ones(())).table)
        assert table.shape == (shape.num_rows, 2 + STATIC.depth)
        with pytest.raises(RuntimeError):
            run_without_values(lambda: made._advance(shape, rows, torch.ones(()), early_exit=True).table)


def test_a_transfer_to_the_host_is_seen() -> None:
    ones = torch.ones(3)
    for look in (lambda: torch.tensor((ones + 1).tolist()), lambda: ones * float(ones.max()), ones.nonzero):
        with pytest.raises((RuntimeError, TypeError)):
            run_without_values(look)
    with pytest.raises(RuntimeError, match="looks at values"):
        record(lambda: ones * float(ones.max()))


def test_the_least_recently_used_graph_makes_room() -> None:
    recorded: list[StepShape] = []

    def advance(shape: StepShape, rows: SamplingRows, live: Tensor) -> Tensor:
        assert rows.seed.shape == (shape.num_rows,)
        recorded.append(shape)
        return rows.seed + live

    def capture(step: Any) -> Any:
        assert int(step().max()) < 5, "whatever runs while recording advances nobody"
        return lambda: step() * 10

    graphs = StepGraphs(advance, num_slots=3, device=CPU, capture=capture, max_graphs=2)
    rows = {n: SamplingRows.of([SamplingParams(seed=n)] * n, CPU) for n in (1, 2, 3)}
    for n, is_known in ((1, False), (2, False), (1, True), (3, False), (1, True), (2, False)):
        recorded.clear()
        assert graphs.run(StepShape(n, 4, 128), rows[n], live=5).tolist() == [(n + 5) * 10] * n
        assert len(recorded) == (1 if is_known else 2), "once to record, once to replay"
    assert len(graphs) == 2
    with pytest.raises(ValueError, match="max_graphs must be at least 1, got 0"):
        StepGraphs(advance, num_slots=1, device=CPU, capture=capture, max_graphs=0)


def test_graphs_are_for_cuda_and_can_be_switched_off() -> None:
    assert capture_for(CPU, True) is None and capture_for(CPU, False) is None and capture_for(CPU, record) is record
    assert decoder_of(graphs=True).graphs is None


@pytest.mark.parametrize("length", [1, 128, 129, 1024, 1025, 1300, 2048, 5000, 33000])
def test_long_caches_come_in_few_sizes(length: int) -> None:
    bucket = _coarse_bucket(length)
    assert length <= bucket < length + max(128, length / 4) and bucket % 128 == 0
    sizes = {_coarse_bucket(shorter) for shorter in range(1, length + 1)}
    assert len(sizes) <= 8 + 4 * max(0, (length - 1).bit_length() - 10), "four for each doubling from 1,024 on"
