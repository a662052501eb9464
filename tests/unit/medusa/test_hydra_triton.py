"""The Triton kernels fill a tree as `hydra` does: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, get_args
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton (it comes with CUDA builds of torch)")
import triton

from medusa import candidates, hydra, hydra_triton, ranks_triton
from medusa.attention import GpuKernels
from medusa.backbone import Backbone
from medusa.fused_llama import FusedLlama
from medusa.heads import MedusaHeads
from medusa.proposals import Proposer
from medusa.tree import Tree
from tests.unit.medusa.tiny import NUM_HEADS, VOCAB, random_heads, tiny_backbone

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # the interpreter cuts bfloat16 off
TREES = {
    "one node a level": Tree.chain(NUM_HEADS),
    "one level": Tree.from_paths([(4,), (1,)]),  # children in an order of their own, ranks left out
    "full": Tree.full([3, 2, 2]),
    "uneven": Tree.from_paths([(0,), (1,), (3,), (0, 0), (0, 2), (3, 1), (0, 2, 5), (3, 1, 0), (3, 1, 4)]),
    "grown": Tree.grown([(2,), (2, 1), (0,), (2, 1, 0), (0, 3), (2, 0), (0, 3, 1)]),
    "root alone": Tree.root_only(),
}
SOME = torch.tensor([0, 2, 3, 5, 7, 8, 11])


@pytest.fixture
def only_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with the plain code must not be the plain code; call the plain code by names of one's own."""
    refused = Mock(side_effect=AssertionError("the kernels were to serve this"))
    monkeypatch.setattr(hydra_triton, "hydra", Mock(sequential_candidates=refused))
    monkeypatch.setattr(ranks_triton, "candidates", Mock(fill_children=refused))


def on_device(backbone: Backbone) -> Backbone:
    backbone.model.to(DEVICE)
    return backbone


def drawn(backbone: Backbone, batch: int) -> tuple[Tensor, Tensor]:
    """Roots [B] and hidden states [B,D]."""
    roots = torch.randint(0, backbone.vocab_size, (batch,)).to(DEVICE)
    return roots, torch.randn(batch, backbone.hidden_size).to(DEVICE, backbone.dtype)


@torch.inference_mode()
def both(heads: MedusaHeads, backbone: Backbone, tree: Tree, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens [B,N] by the kernels and by `hydra`."""
    roots, hidden = drawn(backbone, batch)
    given = (heads, tree.on(DEVICE), roots, hidden, backbone.lm_head_for(heads.vocabulary))
    found = hydra_triton.sequential_candidates(*given, embeddings=backbone.model.get_input_embeddings().weight)
    want = hydra.sequential_candidates(*given)
    assert found.dtype == want.dtype and found.shape == want.shape
    return found, want


@pytest.mark.usefixtures("only_the_kernels")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("reader", ["shared", "own", "some tokens"])
@pytest.mark.parametrize("tree", TREES)
def test_a_tree_is_filled_as_by_pytorch(tree: str, reader: str, num_layers: int, batch: int) -> None:
    backbone = on_device(tiny_backbone(seed=7))
    heads = random_heads(
        backbone,
        kind="hydra",
        num_layers=num_layers,
        lm_heads="own" if reader == "own" else "shared",
        vocabulary=SOME if reader == "some tokens" else None,
    ).to(DEVICE)
    found, want = both(heads, backbone, TREES[tree], batch)
    assert torch.equal(found, want)


@pytest.mark.usefixtures("only_the_kernels")
def test_a_vocabulary_of_many_chunks_and_a_wide_hidden_state() -> None:
    """More logits than a program ranks, more of a row than a program of `add_silu` sums."""
    backbone = on_device(tiny_backbone(seed=7, vocab_size=5000, hidden_size=1200))
    heads = random_heads(backbone, kind="hydra", vocabulary=torch.arange(1, 5000, 2)).to(DEVICE)
    found, want = both(heads, backbone, TREES["uneven"], batch=2)
    assert torch.equal(found, want)


@pytest.mark.usefixtures("only_the_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_nearly_all_tokens_are_the_same(dtype: torch.dtype) -> None:
    backbone = on_device(tiny_backbone(seed=7, dtype=dtype))
    heads = random_heads(backbone, kind="hydra", num_layers=2, vocabulary=SOME).to(DEVICE)
    tree = TREES["full"]
    same = [torch.equal(*both(heads, backbone, tree)) for _ in range(8)]
    assert sum(same) >= 6, "a sum that is rounded once instead of twice may part near-ties"


@pytest.mark.usefixtures("only_the_kernels")
@pytest.mark.parametrize("vocabulary", [None, SOME])
def test_of_equal_logits_the_lowest_id_comes_first(vocabulary: Tensor | None) -> None:
    backbone = on_device(tiny_backbone(seed=7))
    heads = random_heads(backbone, kind="hydra", vocabulary=vocabulary).to(DEVICE)
    with torch.no_grad():
        backbone.lm_head_weight.zero_()
    found, want = both(heads, backbone, Tree.full([5]), batch=2)
    assert torch.equal(found, want)
    ids = range(VOCAB) if vocabulary is None else vocabulary.tolist()
    assert found[:, 1:].tolist() == [list(ids)[:5]] * 2


@pytest.mark.parametrize("vocabulary", [None, SOME])
@pytest.mark.parametrize("dtype", hydra_triton.DTYPES)
def test_children_of_tied_logits_are_those_of_the_plain_code(dtype: torch.dtype, vocabulary: Tensor | None) -> None:
    """Kernel against plain code alone, on logits with ties at every rank; other nodes' tokens stay as they are."""
    names = None if vocabulary is None else vocabulary.to(DEVICE)
    size = VOCAB if vocabulary is None else len(vocabulary)
    for name, tree in TREES.items():
        for level in tree.on(DEVICE).levels:
            logits = torch.randint(-2, 3, (2, len(level.paths), size)).to(DEVICE, dtype)
            want = torch.full((2, tree.num_nodes), -7, device=DEVICE)
            found = want.clone()
            candidates.fill_children(want, level, logits, names)
            ranks_triton.fill_children(found, level, logits, names)
            assert torch.equal(found, want), name


@pytest.mark.parametrize("num_ranks", [ranks_triton.MAX_RANKS + 1, 1])
def test_more_ranks_than_the_kernels_are_made_for(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Mock(wraps=candidates.fill_children)
    monkeypatch.setattr(ranks_triton, "candidates", Mock(fill_children=plain))
    (level,) = Tree.full([num_ranks]).on(DEVICE).levels
    logits = torch.randn(2, 1, 200, device=DEVICE)
    tokens = torch.zeros(2, 1 + num_ranks, dtype=torch.int64, device=DEVICE)
    ranks_triton.fill_children(tokens, level, logits)
    assert torch.equal(tokens[:, 1:], candidates.ranked_by_keys(logits, num_ranks)[:, 0])
    assert plain.called == (num_ranks > 1)


@pytest.mark.parametrize("dtype", hydra_triton.DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-4])  # the last: the norm's own epsilon counts
@pytest.mark.parametrize(("size", "batch"), [(8, 1), (40, 3), (576, 2)])
def test_what_heads_read_of_a_path(size: int, batch: int, scale: float, dtype: torch.dtype) -> None:
    backbone = tiny_backbone(dtype=dtype, hidden_size=size)
    heads = random_heads(backbone, kind="hydra")
    embeddings = (torch.randn(VOCAB, size) * scale).to(DEVICE, dtype)
    embeddings[3] = 0
    tree = TREES["uneven"].on(DEVICE)
    tokens = torch.randint(0, VOCAB, (batch, tree.num_nodes), device=DEVICE)
    hidden = torch.randn(batch, size).to(DEVICE, dtype)
    for level, num_read in ((tree.levels[0], 1), (tree.levels[1], 2), (tree.levels[2], 3), (tree.levels[2], 2)):
        paths = tokens[:, level.paths]
        embedded = heads.path_embeddings(paths, lambda ids: F.embedding(ids, embeddings))
        assert embedded is not None
        beside = embedded[..., :num_read, :].flatten(-2)
        want = torch.cat([hidden[:, None].expand(-1, paths.shape[1], -1), beside], dim=-1).flatten(0, 1)
        found = hydra_triton.path_inputs(tokens, level.paths, hidden, embeddings, num_read=num_read)
        assert torch.equal(found[:, :size], want[:, :size]) and found.dtype == want.dtype
        torch.testing.assert_close(found.double(), want.double(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype] / 100)


def test_embeddings_of_another_type_than_the_heads() -> None:
    """The norm's type is the embeddings'."""
    embeddings, hidden = torch.randn(VOCAB, 8).to(DEVICE, torch.float16), torch.randn(1, 8, device=DEVICE)
    tokens = torch.tensor([[5]], device=DEVICE)
    level = Tree.chain(1).on(DEVICE).levels[0]
    found = hydra_triton.path_inputs(tokens, level.paths, hidden, embeddings, num_read=1)[:, 8:]
    assert found.dtype == torch.float32 and torch.equal(found, found.half().float())
    torch.testing.assert_close(found, F.rms_norm(embeddings[tokens[0]], (8,)).float(), rtol=2e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", hydra_triton.DTYPES)
@pytest.mark.parametrize("width", [3, 1024, 1500])
def test_a_block_adds_what_it_lets_through(width: int, dtype: torch.dtype) -> None:
    wide, update = (torch.randn(3, width * times).to(DEVICE, dtype) * 8 for times in (2, 1))
    hidden = wide[:, :width]
    want = hidden.double() + F.silu(update.double())
    found = hydra_triton.add_silu(hidden, update)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    extremes = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype, device=DEVICE)
    assert hydra_triton.add_silu(torch.zeros_like(extremes), extremes).tolist() == [[0.0, extremes[0, 1].item(), 0.0]]


class _Launches(TorchDispatchMode):
    """Counts PyTorch's operations that compute, and launches of our kernels, which do nothing meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        for module in (hydra_triton, ranks_triton):
            for name in [name for name, one in vars(module).items() if isinstance(one, triton.runtime.KernelInterface)]:
                monkeypatch.setattr(
                    module, name, defaultdict(lambda name=name: lambda *_, **__: self.names.append(name))
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in results)
        if not is_view and not func.overloadpacket.__name__.startswith(("empty", "_unsafe_view")):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_a_level_of_two_blocks_is_eight_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = on_device(tiny_backbone(seed=7))
    heads = random_heads(backbone, kind="hydra", num_layers=2, vocabulary=SOME).to(DEVICE)
    given = (heads, TREES["full"].on(DEVICE), *drawn(backbone, 1), backbone.lm_head_for(SOME.to(DEVICE)))
    embeddings = backbone.model.get_input_embeddings().weight
    with _Launches(monkeypatch) as launches:
        hydra_triton.sequential_candidates(*given, embeddings=embeddings)
    assert len(launches.names) == 1 + 8 * NUM_HEADS, launches.names


@pytest.mark.parametrize("why", ["float64", "packed"])
@torch.inference_mode()
def test_what_the_kernels_are_not_made_for_is_left_to_pytorch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = on_device(tiny_backbone(seed=7, dtype=torch.float64 if why == "float64" else torch.float32))
    heads = random_heads(backbone, kind="hydra").to(DEVICE)
    if why == "packed":
        heads.pack(backbone.linear)
    monkeypatch.setattr(hydra_triton, "path_inputs", Mock(side_effect=AssertionError("not for the kernels")))
    found, want = both(heads, backbone, TREES["full"])
    assert torch.equal(found, want)


@pytest.mark.parametrize("kernels", [None, *get_args(GpuKernels)])
@torch.inference_mode()
def test_a_proposer_fills_by_the_kernels_where_steps_are_fused(
    kernels: GpuKernels | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(wraps=hydra_triton.sequential_candidates)
    monkeypatch.setattr(hydra_triton, "sequential_candidates", asked)
    backbone = on_device(tiny_backbone(seed=7))
    heads, tree = random_heads(backbone, kind="hydra").to(DEVICE), TREES["uneven"].on(DEVICE)
    roots, hidden = drawn(backbone, 2)
    want, _ = Proposer(heads, backbone)(tree, roots, hidden)
    assert not asked.called
    backbone.fused = FusedLlama(backbone.model, gpu_kernels=kernels) if kernels else None
    found, _ = Proposer(heads, backbone)(tree, roots, hidden)
    assert torch.equal(found, want) and asked.called == (kernels == "fused")
