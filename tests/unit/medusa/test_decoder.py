"""The laws of tree decoding, on models small enough that random guesses are accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.backbone import Backbone, Placement
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.dynamic_tree import DynamicTree
from medusa.sampling import SamplingRows
from medusa.tree import Tree
from tests.tiny_models import FAMILIES
from tests.unit.medusa.tiny import chain_placement, random_heads, tiny_backbone, trees

BACKBONES: dict[str, Backbone] = {}


def backbone_of(family: str) -> Backbone:
    """One float64 model of each family for the whole module: the laws are exact, rounding is not their business."""
    if family not in BACKBONES:
        BACKBONES[family] = next(
            filter(wanders, (tiny_backbone(family, seed=s, dtype=torch.float64) for s in range(20)))
        )
    return BACKBONES[family]


def wanders(backbone: Backbone) -> bool:
    """Does it say more than one thing over and over? A model stuck on one token would pass any test of equality."""
    return all(len(set(plain_continuation(backbone, prompt_of(n, n), 25))) >= 4 for n in (5, 17))


def plain_continuation(backbone: Backbone, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by the model's own eager forward over the whole text, token after token: no cache, none of our code."""
    ids = list(prompt)
    backbone.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            for _ in range(count):
                ids.append(int(backbone.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    finally:
        backbone.model.set_attn_implementation("medusa_tree")
    return ids[len(prompt) :]


def decode(
    backbone: Backbone,
    tree: Tree | DynamicTree,
    prompts: list[list[int]],
    params: list[SamplingParams],
    count: int,
    **options: Any,
) -> tuple[list[list[int]], Decoder]:
    """At least `count` tokens for each prompt, all in one batch; and the decoder as it stands then."""
    heads = random_heads(backbone)
    decoder = Decoder(backbone, heads, tree, num_slots=len(prompts), context_length=128, **options)
    rows = SamplingRows.of(params, backbone.device)
    answers = decoder.prefill(0, prompts, rows).tokens
    while min(map(len, answers)) < count:
        for answer, new in zip(answers, decoder.step(len(prompts), rows).tokens, strict=True):
            answer += new
    return answers, decoder


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, 12, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_tree_decodes_greedily_what_the_model_itself_decodes(family: str) -> None:
    backbone = backbone_of(family)
    prompts = [prompt_of(n, n) for n in (5, 17, 1)]
    want = [plain_continuation(backbone, prompt, 25) for prompt in prompts]
    for tree in (Tree.root_only(), Tree.chain(3), Tree.full([12, 4, 2])):
        answers, _ = decode(backbone, tree, prompts, [SamplingParams()] * 3, 25)
        assert [answer[:25] for answer in answers] == want
    assert len(answers[0]) + len(answers[1]) + len(answers[2]) > 75, (
        "the whole vocabulary at depth one is always accepted"
    )


@settings(max_examples=25, deadline=None)
@given(
    tree=trees(),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.8, 1.3]),
    top=st.sampled_from([{}, {"top_k": 4}, {"top_p": 0.8}]),
    seed=st.integers(0, 1000),
)
def test_a_seeded_answer_depends_on_neither_tree_nor_batch(
    tree: Tree, lengths: list[int], temperature: float, top: dict[str, Any], seed: int
) -> None:
    backbone = backbone_of("llama")
    prompts = [prompt_of(n, seed + i) for i, n in enumerate(lengths)]
    params = [
        SamplingParams(temperature=temperature, acceptance="rejection", seed=seed, choice=i, **top)
        for i in range(len(prompts))
    ]
    answers, _ = decode(backbone, tree, prompts, params, 12)
    for prompt, own, answer in zip(prompts, params, answers, strict=True):
        alone, _ = decode(backbone, Tree.root_only(), [prompt], [own], 12)
        assert answer[:12] == alone[0][:12]


@settings(max_examples=20, deadline=None)
@given(tree=trees(), family=st.sampled_from(FAMILIES), lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_the_logits_of_every_node_equal_those_of_its_path_alone(tree: Tree, family: str, lengths: list[int]) -> None:
    backbone = backbone_of(family)
    tokens = torch.randint(0, 12, (len(lengths), tree.num_nodes))
    prompts = [prompt_of(n, n) for n in lengths]
    cache = backbone.new_cache(num_slots=len(lengths), capacity=64)
    with torch.inference_mode():
        for slot, prompt in enumerate(prompts):
            backbone.step(torch.tensor([prompt]), chain_placement(len(prompt), first_slot=slot), cache)
        where = Placement(
            first_slot=0, offsets=torch.tensor(lengths), depths=torch.tensor(tree.depths),
            visible=tree.ancestor_mask, length=64,
        )  # fmt: skip
        hidden = backbone.step(tokens, where, cache)
        for row, prompt in enumerate(prompts):
            for node in range(tree.num_nodes):
                walked = tree.node_paths[node]
                path = tokens[row, walked[walked >= 0]].tolist()
                alone = backbone.hidden_states(torch.tensor([[*prompt, *path]]))[0, -1]
                torch.testing.assert_close(hidden[row, node], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@settings(max_examples=10, deadline=None)
@given(tree=trees(), steps=st.integers(0, 6))
def test_after_any_steps_the_cache_is_that_of_a_fresh_forward(family: str, tree: Tree, steps: int) -> None:
    backbone = backbone_of(family)
    prompts = [prompt_of(n, n) for n in (3, 14)]
    answers, decoder = decode(backbone, tree, prompts, [SamplingParams()] * 2, 1)
    rows = SamplingRows.of([SamplingParams()] * 2, backbone.device)
    for _ in range(steps):
        for answer, new in zip(answers, decoder.step(2, rows).tokens, strict=True):
            answer += new
    for slot, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = [*prompt, *answer[:-1]]
        assert decoder.lengths[slot] == len(text), "the cache holds every emitted token but the last"
        assert decoder.roots[slot] == answer[-1]
        fresh = backbone.new_cache(num_slots=1, capacity=128)
        with torch.inference_mode():
            hidden = backbone.step(torch.tensor([text]), chain_placement(len(text)), fresh)
        kept = decoder.cache.store[:, slot, :, : len(text)]
        torch.testing.assert_close(kept, fresh.store[:, 0, :, : len(text)], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(decoder.hidden[slot], hidden[0, -1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [8, 16, 32])
def test_a_prompt_in_chunks_is_the_prompt_at_once(chunk: int) -> None:
    backbone = backbone_of("gemma3_text")
    prompts = [prompt_of(n, n) for n in (70, 9, 33)]
    params = [SamplingParams(temperature=0.9, acceptance="rejection", seed=4)] * 3
    at_once, _ = decode(backbone, Tree.chain(2), prompts, params, 10)
    chunked, _ = decode(backbone, Tree.chain(2), prompts, params, 10, prefill_chunk=chunk)
    assert [a[:10] for a in chunked] == [a[:10] for a in at_once]


def test_nan_of_a_former_tenant_does_not_leak_through_masked_slots() -> None:
    backbone = backbone_of("llama")
    prompt, params = prompt_of(6, 1), [SamplingParams()]
    decoder = Decoder(backbone, random_heads(backbone), Tree.full([3, 2]), num_slots=1, context_length=64)
    rows = SamplingRows.of(params, backbone.device)
    clean = [decoder.prefill(0, [prompt], rows).tokens, *decoder.step(1, rows).tokens]
    decoder.cache.begin(first_slot=0, offsets=torch.tensor([0]), num_new=1, length=64)
    decoder.cache.store[:, 0, :, :64] = float("nan")
    decoder.free(0)
    assert [decoder.prefill(0, [prompt], rows).tokens, *decoder.step(1, rows).tokens] == clean


def test_an_idle_row_and_a_moved_row_change_nothing() -> None:
    backbone = backbone_of("llama")
    prompts = [prompt_of(n, n) for n in (4, 11)]
    want = [plain_continuation(backbone, p, 12) for p in prompts]
    decoder = Decoder(backbone, random_heads(backbone), Tree.full([4, 2]), num_slots=3, context_length=64)
    rows = SamplingRows.of([SamplingParams()] * 3, backbone.device)
    answers = decoder.prefill(0, prompts, SamplingRows.of([SamplingParams()] * 2, backbone.device)).tokens
    for _ in range(2):
        for answer, new in zip(answers, decoder.step(3, rows).tokens, strict=False):
            answer += new
        decoder.free(2)
    decoder.move(1, 0)  # the first leaves; the second takes its place
    decoder.free(1)
    while len(answers[1]) < 12:
        answers[1] += decoder.step(1, rows).tokens[0]
    assert answers[1][:12] == want[1]


def test_float32_agrees_too_or_names_the_margin() -> None:
    """The same law in the type that users run; a near-tie would show as a small margin of the two best logits."""
    backbone = tiny_backbone("qwen3", seed=5)
    prompt = prompt_of(8, 8)
    want = plain_continuation(backbone, prompt, 40)
    answers, _ = decode(backbone, Tree.full([5, 3, 2]), [prompt], [SamplingParams()], 40)
    for at, (ours, theirs) in enumerate(zip(answers[0], want, strict=False)):
        if ours != theirs:
            hidden = backbone.hidden_states(torch.tensor([[*prompt, *want[:at]]]))[0, -1]
            best = backbone.logits(hidden).topk(2).values
            pytest.fail(f"token {at} differs; logit margin {float(best[0] - best[1]):.3g}")
