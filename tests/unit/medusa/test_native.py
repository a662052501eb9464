"""The CPU kernels: right against float64, and the same to the last bit whatever stands beside a row."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medusa import fused_llama, linear
from medusa.backbone import Backbone, Placement, load_backbone
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadKind, SamplingParams
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Engine, Request
from medusa.errors import BackboneError
from medusa.fused_llama import FusedLlama
from medusa.heads import MedusaHeads
from medusa.native import linear as native_linear
from medusa.native.build import library
from medusa.native.guesses import NativeHead, NativeHeads
from medusa.native.linear import MOST_INPUTS, PackedWeight, has_tiles, kernels
from medusa.proposals import Proposer
from medusa.tree import RowTrees, Tree
from tests.tiny_models import make_tiny_backbone_model, make_tiny_tokenizer, save_tiny_folder, with_drawn_vectors
from tests.unit.medusa.tiny import chain_placement, random_heads, trees

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here")
needs_tiles = pytest.mark.skipif(library() is None or not has_tiles(), reason="no AMX here")


@pytest.fixture(
    scope="module", autouse=True, params=[False, pytest.param(True, marks=needs_tiles)], ids=["vectors", "tiles"]
)
def tiles(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Our kernels also where oneDNN would be chosen, with and without the processor's tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
        for module in (linear, native_linear):
            patch.setattr(module, "has_tiles", lambda: request.param)
        yield request.param


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tiny(
    seed: int = 4,
    *,
    family: str = "llama",
    groups: int = 2,
    int8: bool = False,
    hidden_size: int = 64,
    head_dim: int = 16,
    **overrides: Any,
) -> tuple[Backbone, Backbone]:
    """(through the kernels, in float64), the same weights. Widths that fill no whole panel."""
    made = make_tiny_backbone_model(
        family, seed, torch.bfloat16, hidden_size=hidden_size, head_dim=head_dim, num_attention_heads=4,
        num_key_value_heads=4 // groups, intermediate_size=74, vocab_size=301, initializer_range=0.15, **overrides,
    )  # fmt: skip
    model = with_drawn_vectors(made)
    exact = Backbone(model=copy.deepcopy(model).double(), tokenizer=make_tiny_tokenizer(), name="llama")
    fused = FusedLlama(model, int8=int8)
    assert fused.native is not None
    return Backbone(model=model, tokenizer=make_tiny_tokenizer(), name="llama", fused=fused), exact


@pytest.mark.parametrize(("kind", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("shape", [(70, 34), (16, 8), (3, 2), (65, 130), (33, 1030)])
def test_products_are_exact_and_rows_are_alone(
    kind: torch.dtype, int8: bool, shape: tuple[int, int], threads: int, tiles: bool
) -> None:
    weight = (torch.randn(shape) * 0.1).to(kind)
    packed = PackedWeight.of(weight, int8=int8)
    assert packed.tiles == (tiles and (int8 or kind == torch.bfloat16))
    stored = weight.double()
    if int8:
        scale = weight.double().abs().amax(dim=1, keepdim=True) / 127
        stored = (weight.double() / scale).round() * scale
    x = torch.randn(70, shape[1])
    x[3] *= 1e4
    x[5] = 0
    read = sixteen_bits(x) if int8 else x.bfloat16() if packed.tiles else x
    for rows in (1, 2, 3, 5, 6, 7, 13, 16, 17, 32, 33, 52, 70):
        out = packed(x[:rows])
        # A quotient on the edge between two steps may round either way: that is one step of one weight.
        exact = read[:rows].double() @ stored.t()
        size = exact.abs().amax(dim=1, keepdim=True).clamp_min(1)  # of each row: one is ten thousand times the others
        torch.testing.assert_close(out.double() / size, exact / size, rtol=1e-5, atol=1e-5)
        assert torch.equal(out, torch.cat([packed(row[None]) for row in x[:rows]]))


@pytest.mark.timeout(60)
def test_threads_that_wait_asleep_wake_and_see_what_others_made() -> None:
    """More threads than cores cannot all stay awake; a wake that is lost would be silence for ever."""
    weight, x = PackedWeight.of(torch.randn(300, 130), int8=True), torch.randn(9, 130)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = weight(x)
        torch.set_num_threads(4 * (os.cpu_count() or 1) + 1)
        assert all(torch.equal(weight(x), alone) for _ in range(500))
    finally:
        torch.set_num_threads(before)


def sixteen_bits(x: Tensor) -> Tensor:
    """Each row in steps of its largest / 32,512; the quotient is a float32, as the kernel's, so edges fall alike."""
    largest = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return (x.double() * (32512 / largest).double()).round() * (largest / 32512).double()


def test_sums_of_int8_neither_overflow_nor_lose_small_terms() -> None:
    """As many inputs as there may be, all of the largest steps: what is left of sums that cancel, and those that do not."""
    inputs = native_linear.MOST_INPUTS
    x = torch.full((1, inputs), 32511.0)  # the largest low byte
    x[0, 0] = 32512.0
    weight = torch.full((32, inputs), 127.0)
    whole = PackedWeight.of(weight, int8=True)(x)[0].double()
    torch.testing.assert_close(whole, torch.full_like(whole, 127.0 * (32511 * inputs + 1)), rtol=1e-3, atol=0)
    weight[:, 1::2] = -127.0
    assert PackedWeight.of(weight, int8=True)(x)[0].tolist() == [127.0] * 32


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_broken_stays_so_alone(int8: bool, value: float) -> None:
    x = torch.randn(3, 34)
    x[1, 5] = value
    out = PackedWeight.of(torch.randn(8, 34).bfloat16(), int8=int8)(x)
    assert out.isfinite().all(dim=1).tolist() == [True, False, True]
    assert not out[1].isfinite().any()


def test_heads_too_wide_for_int8_keep_the_backbones_own_type() -> None:
    backbone, _ = tiny()
    wide, narrow = torch.zeros(32, MOST_INPUTS + 2, dtype=torch.bfloat16), torch.zeros(32, 64, dtype=torch.bfloat16)
    assert backbone.linear_of_guesses(wide).panels.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert backbone.linear_of_guesses(narrow).panels.dtype == torch.int8  # type: ignore[attr-defined]


def test_int8_refuses_what_it_cannot_pack() -> None:
    for inputs in (33, 65538):
        with pytest.raises(ValueError, match=f"even number of inputs, 65536 at most, got {inputs}"):
            PackedWeight.of(torch.randn(4, inputs), int8=True)


def gap(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; one element of a thousand that is all wrong makes 0.03."""
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("family", "groups", "window", "vectors"),
    [
        ("llama", 1, None, None),
        ("llama", 2, None, None),
        ("llama", 2, None, 3),
        ("llama", 4, None, None),
        ("qwen2", 2, None, None),
        ("qwen3", 1, None, None),
        ("qwen3", 2, None, 5),
        ("mistral", 2, 3, None),
        ("mistral", 4, 8, None),
    ],
)
def test_layers_equal_the_model_in_float64(
    family: str,
    groups: int,
    window: int | None,
    vectors: int | None,
    threads: int,
    tiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt, then a tree behind prefixes of different lengths: hidden states, keys and values.

    The kernels keep keys and values in bfloat16, and so does the model here; between two values of it, theirs and ours may
    fall to different sides. Tiles round all that they multiply, by up to half a unit in 256.
    """
    near = 1e-2 if tiles else 1e-3
    head_dim = 16 if vectors is None else vectors * kernels().medusa_lanes()
    backbones = tiny(family=family, groups=groups, sliding_window=window, head_dim=head_dim)
    ids = torch.randint(0, 300, (2, 9))
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]).on(CPU)
    behind = Placement(
        first_slot=0, offsets=torch.tensor([9, 5]), depths=tree.depths, visible=tree.ancestor_mask, length=24
    )
    caches = [b.new_cache(num_slots=2, capacity=32) for b in backbones]
    update = caches[1].update

    def rounded(key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return update(key.bfloat16().double(), value.bfloat16().double(), *rest, **options)

    monkeypatch.setattr(caches[1], "update", rounded)
    with torch.inference_mode():
        for part, where in ((ids, chain_placement(9, batch=2)), (ids[:, :7].flip(1), behind)):
            ours, exact = (b.step(part, where, cache) for b, cache in zip(backbones, caches, strict=True))
            assert gap(ours, exact) < near
            assert gap(caches[0].store, caches[1].store) < near


def hidden_of(backbone: Backbone, prompt: list[int], new: list[int], visible: Tensor, depths: Tensor) -> Tensor:
    """Last hidden states [N,D] of new tokens behind a prompt."""
    cache = backbone.new_cache(num_slots=1, capacity=64)
    with torch.inference_mode():
        backbone.step(torch.tensor([prompt]), chain_placement(len(prompt)), cache)
        where = Placement(
            first_slot=0, offsets=torch.tensor([len(prompt)]), depths=depths, visible=visible, length=len(prompt) + len(new)
        )  # fmt: skip
        return backbone.step(torch.tensor([new]), where, cache)[0]


@settings(max_examples=30, deadline=None)
@given(tree=trees(max_nodes=20), seed=st.integers(0, 99), window=st.sampled_from([None, 2, 5, 13]))
def test_a_node_is_bit_for_bit_its_path_alone(tree: Tree, seed: int, window: int | None) -> None:
    backbone, _ = tiny(family="mistral", sliding_window=window)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 300, (1 + seed % 17,), generator=generator).tolist()
    tokens = torch.randint(0, 300, (tree.num_nodes,), generator=generator).tolist()
    on = tree.on(CPU)
    together = hidden_of(backbone, prompt, tokens, on.ancestor_mask, on.depths)
    for node in range(tree.num_nodes):
        path = [n for n in range(tree.num_nodes) if on.ancestor_mask[node, n]]
        steps = torch.arange(len(path))
        alone = hidden_of(backbone, prompt, [tokens[n] for n in path], steps[:, None] >= steps, steps)
        assert torch.equal(together[node], alone[-1])


@pytest.mark.parametrize("window", [None, 12])
def test_in_bfloat16_a_tree_in_a_batch_answers_as_plain_decoding_alone(window: int | None) -> None:
    """What float32 alone promises elsewhere: no near-tie can flip."""
    backbone, _ = tiny(family="mistral", sliding_window=window)
    heads = random_heads(backbone).float()  # as a checkpoint is loaded: in the type of the steps
    tree = Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)])

    def request(name: int) -> Request:
        prompt = torch.randint(3, 300, (2 + 3 * name,), generator=torch.Generator().manual_seed(name)).tolist()
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        return Request(request_id=str(name), prompt_ids=prompt, params=params)

    together = Engine(backbone, heads, tree=tree, max_batch_size=5, context_length=128)
    answers = {c.request_id: c.token_ids for c in together.run(request(name) for name in range(5))}
    for name in range(5):
        alone = Engine(backbone, max_batch_size=1, context_length=128)
        assert [c.token_ids for c in alone.run([request(name)])] == [answers[str(name)]]


def test_int8_weights_decode_nearly_as_they_were(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path / "llama", "llama", seed=4)
    rounded, whole = (load_backbone(tmp_path / "llama", dtype=kind) for kind in ("int8", "bfloat16"))
    assert (rounded.weight_dtype, whole.weight_dtype) == (torch.int8, torch.bfloat16)
    assert rounded.fingerprint == whole.fingerprint
    ids = torch.randint(0, 300, (1, 20))
    with torch.inference_mode():
        ours, theirs = (
            b.logits(b.step(ids, chain_placement(20), b.new_cache(num_slots=1, capacity=32))) for b in (rounded, whole)
        )
    assert 0 < gap(ours, theirs.double()) < 0.05


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_int8_layers_are_near_the_model_in_float64(family: str) -> None:
    backbones = tiny(family=family, int8=True)
    ids = torch.randint(0, 300, (1, 20))
    with torch.inference_mode():
        ours, exact = (b.step(ids, chain_placement(20), b.new_cache(num_slots=1, capacity=32)) for b in backbones)
    assert 0 < gap(ours, exact) < 0.1


def test_int8_is_refused_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gemma2", "llama"):
        save_tiny_folder(tmp_path / family, family, seed=4)
    with pytest.raises(BackboneError, match=r"gemma2.* int8 weights, which are for llama, mistral, qwen2, qwen3"):
        load_backbone(tmp_path / "gemma2", dtype="int8")
    with pytest.raises(BackboneError, match="int8 weights, which are for llama, mistral, qwen2, qwen3"):
        load_backbone(tmp_path / "llama", dtype="int8", fused=False)
    monkeypatch.setattr(fused_llama, "library", lambda: None)
    with pytest.raises(BackboneError, match="int8 weights need a CPU with a C compiler"):
        load_backbone(tmp_path / "llama", dtype="int8")


def same_trees(found: tuple[Tensor, RowTrees], want: tuple[Tensor, RowTrees]) -> bool:
    tables = ("depths", "parents", "node_paths", "ancestor_mask")
    return torch.equal(found[0], want[0]) and all(
        torch.equal(getattr(found[1], n), getattr(want[1], n)) for n in tables
    )


def packed_heads(backbone: Backbone, *, as_loaded: bool = True, **options: Any) -> MedusaHeads:
    heads = random_heads(backbone, **options).float()
    heads.pack(backbone.linear_of_guesses if as_loaded else backbone.linear)
    return heads


@pytest.mark.parametrize(
    ("hidden_size", "int8", "as_loaded"), [(64, False, True), (40, False, True), (92, False, False), (72, True, True)]
)
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_trees_proposed_by_the_kernels_are_those_of_pytorch(
    kind: HeadKind, hidden_size: int, int8: bool, as_loaded: bool, threads: int
) -> None:
    """The kernels' own products stand behind both, so that no rounding reorders a head's guesses: nothing is near a tie.
    Widths fill no whole vectors, blocks are of another type than the lm_head, threads more than rows."""
    backbone, _ = tiny(int8=int8, hidden_size=hidden_size)
    some = torch.arange(0, 301, 2)
    trees = (
        Tree.full([5, 3, 2]),
        Tree.chain(2),
        DynamicTree(superset=Tree.full([9, 4, 3]), num_nodes=30),
        DynamicTree(superset=Tree.full([9, 4, 3]), num_nodes=7, temperatures=(0.5, 1.0, 2.0)),
        DynamicTree(superset=Tree.full([2, 2]), num_nodes=7),
    )
    for vocabulary, num_layers, seed in ((None, 1, 0), (some, 2, 1)):
        heads = packed_heads(
            backbone, as_loaded=as_loaded, num_layers=num_layers, kind=kind, vocabulary=vocabulary, seed=seed
        )
        ours, theirs = (Proposer(heads, backbone, native=native) for native in (True, False))
        assert ours.is_native and not theirs.is_native
        hidden, root = 2 * torch.randn(5, backbone.hidden_size), torch.randint(0, 301, (5,))
        with torch.inference_mode():
            for tree, batch in product(trees, (1, 5)):
                shape = tree.on(CPU)
                found, want = (propose(shape, root[:batch], hidden[:batch]) for propose in (ours, theirs))
                assert same_trees(found, want), (str(tree), batch)


@pytest.mark.parametrize("size", [3, 64, 150, 8192])
def test_guesses_are_the_largest_first_of_equals_the_first(size: int) -> None:
    """Logits that tie all the time: an lm_head of few different rows."""
    weight = torch.randint(-1, 2, (size, 32)).float()
    weight[:, 2:] = 0
    block = PackedWeight.of(torch.zeros(32, 32))
    head = NativeHead(blocks=[block], biases=torch.zeros(1, 32), num_read=0)
    native = NativeHeads([head], lm_head=PackedWeight.of(weight), vocabulary=None, embeddings=torch.zeros(size, 32))
    hidden = torch.randint(-2, 3, (40, 32)).float()
    ranks = min(size, 16)
    tokens, log_probs = native.weighed_guess(hidden, num_heads=1, num_ranks=ranks, temperatures=torch.tensor([0.7]))
    logits = hidden @ weight.t()
    assert torch.equal(tokens[:, 0], logits.sort(dim=1, descending=True, stable=True).indices[:, :ranks])
    want = (logits.double() / 0.7).log_softmax(dim=-1).gather(1, tokens[:, 0])
    torch.testing.assert_close(log_probs[:, 0].double(), want, rtol=1e-5, atol=2e-6)
    assert (log_probs <= 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_hidden_state_still_proposes_tokens_that_exist(value: float) -> None:
    backbone, _ = tiny()
    propose = Proposer(packed_heads(backbone, kind="hydra"), backbone)
    hidden = torch.randn(2, backbone.hidden_size)
    hidden[0, 3] = value
    for tree in (Tree.full([5, 3]), DynamicTree(superset=Tree.full([9, 4]), num_nodes=20)):
        shape = tree.on(CPU)
        with torch.inference_mode():
            tokens, rows = propose(shape, torch.tensor([3, 4]), hidden)
            alone = propose(shape, torch.tensor([4]), hidden[1:])
        assert ((tokens >= 0) & (tokens < 301)).all()
        assert (rows.parents < torch.arange(tokens.shape[1])).all()
        assert torch.equal(tokens[1:], alone[0]) and torch.equal(rows.parents[1:], alone[1].parents)


def test_heads_that_the_kernels_do_not_read_are_asked_by_pytorch() -> None:
    backbone, exact = tiny()
    assert Proposer(packed_heads(backbone), backbone).is_native
    assert not Proposer(packed_heads(backbone, lm_heads="own"), backbone).is_native
    assert not Proposer(random_heads(backbone), backbone).is_native, "not laid out"
    assert not Proposer(random_heads(exact), exact).is_native


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_loaded_heads_decode_by_the_backbones_own_products(tmp_path: Path, kind: HeadKind) -> None:
    backbone, _ = tiny()
    heads = random_heads(backbone, num_layers=2, kind=kind)
    folder = save_checkpoint(
        tmp_path / "heads", heads, paths=[(0,)], backbone_name="llama", backbone_fingerprint=backbone.fingerprint
    )
    packed = load_checkpoint(folder, backbone=backbone).heads
    assert all(block.packed.panels.dtype == torch.int8 for head in packed.heads for block in head.blocks)
    to_train = load_checkpoint(folder, backbone=backbone, dtype=torch.float32).heads
    assert all(block.packed is not None for head in packed.heads for block in head.blocks)
    assert all(block.packed is None for head in to_train.heads for block in head.blocks)
    hidden, path = torch.randn(5, backbone.hidden_size), torch.randint(0, 300, (5, packed.num_heads))
    with torch.inference_mode():
        ours, exact = (h.logits(hidden, backbone, path=path) for h in (packed, to_train))
        assert gap(ours, exact.double()) < 1e-2
        packed.train()
        assert torch.equal(packed.logits(hidden, backbone, path=path), exact)
