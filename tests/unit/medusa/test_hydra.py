"""Hydra heads: each node's token is what its head says after that node's own path; and the laws of decoding hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from medusa.backbone import Backbone
from medusa.checkpoint import WEIGHTS, Checkpoint, load_checkpoint, save_checkpoint
from medusa.confidence import fit_temperatures
from medusa.config import HeadsConfig, SamplingParams
from medusa.dynamic_tree import DeviceDynamicTree, DynamicTree
from medusa.engine import Engine, Request
from medusa.errors import CheckpointError
from medusa.formats import export_heads
from medusa.heads import MedusaHeads
from medusa.hydra import searched_candidates, sequential_candidates
from medusa.losses import IGNORE, head_targets, medusa1_loss, true_path
from medusa.replay import guessed_ranks, num_steps
from medusa.tree import Path as TreePath
from medusa.tree import Tree
from medusa.tree_search import measure_hits
from tests.unit.medusa.recording import record
from tests.unit.medusa.tiny import NUM_HEADS, VOCAB, random_heads, tiny_backbone, trees

SOME = torch.tensor([0, 2, 3, 5, 7, 8, 11])
DOUBLE = tiny_backbone(seed=7, dtype=torch.float64)
SINGLE = tiny_backbone(seed=7)
PROMPTS = ([3, 4, 5], [7], [6, 6, 2, 8, 9], [1, 10])


def alone(heads: MedusaHeads, backbone: Backbone, hidden: Tensor, tokens: list[int]) -> Tensor:
    """Logits [V] of the head that goes on from `tokens`, the root first, for hidden [D]: the formula, one vector at a time."""
    head = heads.heads[len(tokens) - 1]
    table = backbone.model.get_input_embeddings().weight
    # The tiny models' padding token has the zero vector.
    seen = [hidden] + [table[token] / table[token].square().mean().sqrt().clamp_min(1e-9) for token in tokens]
    for layer, block in enumerate(head.blocks):  # type: ignore[union-attr,arg-type]
        read = torch.cat(seen) if layer == 0 else hidden
        bump = block.weight @ read + block.bias
        hidden = hidden + bump * torch.sigmoid(bump)
    weight = backbone.lm_head_weight if head.lm_head is None else head.lm_head.weight  # type: ignore[union-attr]
    return backbone.transform(weight @ hidden)  # type: ignore[operator]


def named(tree: Tree, path: TreePath) -> int:
    return tree.paths.index(path)


@settings(max_examples=20, deadline=None)
@given(
    tree=trees(width=len(SOME)),
    batch=st.integers(1, 3),
    num_layers=st.sampled_from([1, 2]),
    reader=st.sampled_from(["shared", "own", "some tokens"]),
    seed=st.integers(0, 1000),
)
def test_each_node_carries_what_its_head_says_after_its_own_path(
    tree: Tree, batch: int, num_layers: int, reader: str, seed: int
) -> None:
    some = SOME if reader == "some tokens" else None
    kind = "own" if reader == "own" else "shared"
    heads = random_heads(DOUBLE, num_layers=num_layers, lm_heads=kind, vocabulary=some, kind="hydra", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, DOUBLE.hidden_size, generator=generator, dtype=torch.float64)
    roots = torch.randint(0, VOCAB, (batch,), generator=generator)
    reader = DOUBLE.lm_head_for(some)
    with torch.inference_mode():
        tokens = sequential_candidates(heads, tree.on(DOUBLE.device), roots, hidden, reader)
    assert tokens[:, 0].tolist() == roots.tolist()
    for row, (node, path) in itertools.product(range(batch), enumerate(tree.paths[1:], start=1)):
        before = [int(tokens[row, named(tree, path[:depth])]) for depth in range(len(path))]
        with torch.no_grad():
            order = alone(heads, DOUBLE, hidden[row], before).argsort(descending=True).tolist()
        ranked = order if some is None else [token for token in order if token in some.tolist()]
        assert tokens[row, node] == ranked[path[-1]]


def searched_by_hand(
    heads: MedusaHeads, hidden: Tensor, root: int, tree: DynamicTree, some: Tensor | None
) -> list[tuple[float, list[int]]]:
    """All nodes that a beam sees, with their scores and tokens from the root on: a list for each depth, in their order."""
    nodes = level = [(0.0, [root])]
    for head, (num_parents, ranks) in enumerate(tree.beams):
        children = []
        for score, tokens in sorted(level, key=lambda node: -node[0])[:num_parents]:
            logits = alone(heads, DOUBLE, hidden, tokens) / (tree.temperatures or (1.0,) * NUM_HEADS)[head]
            log_probs = (logits if some is None else logits[some]).log_softmax(-1)
            for place in log_probs.argsort(descending=True)[:ranks].tolist():
                token = place if some is None else int(some[place])
                children.append((score + float(log_probs[place]), [*tokens, token]))
        nodes, level = nodes + children, children
    return nodes


@settings(max_examples=25, deadline=None)
@given(
    superset=trees(width=len(SOME), max_nodes=30),
    batch=st.integers(1, 3),
    reader=st.sampled_from(["shared", "own", "some tokens"]),
    temperatures=st.sampled_from([None, (0.5, 1.0, 2.0)]),
    data=st.data(),
    seed=st.integers(0, 1000),
)
def test_a_dynamic_tree_is_the_best_of_what_a_search_by_hand_sees(
    superset: Tree, batch: int, reader: str, temperatures: tuple[float, ...] | None, data: st.DataObject, seed: int
) -> None:
    assume(superset.num_nodes > 1)
    tree = DynamicTree(
        superset=superset, num_nodes=data.draw(st.integers(2, superset.num_nodes)), temperatures=temperatures
    )
    some = SOME if reader == "some tokens" else None
    heads = random_heads(
        DOUBLE, lm_heads="own" if reader == "own" else "shared", vocabulary=some, kind="hydra", seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, DOUBLE.hidden_size, generator=generator, dtype=torch.float64)
    roots = torch.randint(0, VOCAB, (batch,), generator=generator)
    on_device = tree.on(DOUBLE.device)
    assert isinstance(on_device, DeviceDynamicTree)
    with torch.inference_mode():
        tokens, rows = searched_candidates(heads, on_device, roots, hidden, DOUBLE.lm_head_for(some))
        for row in range(batch):
            nodes = searched_by_hand(heads, hidden[row], int(roots[row]), tree, some)
            best = sorted(nodes, key=lambda node: -node[0])[: tree.num_nodes]
            paths = [path for _, path in best]
            ours = [tokens[row, [n for n in line if n >= 0]].tolist() for line in rows.node_paths[row].tolist()]
            assert ours == paths
            assert rows.depths[row].tolist() == [len(path) - 1 for path in paths]
            places = [(paths.index(path[:-1]) if len(path) > 1 else -1) for path in paths]
            assert rows.parents[row].tolist() == places


@settings(max_examples=15, deadline=None)
@given(superset=trees(max_nodes=30), data=st.data(), seed=st.integers(0, 1000))
def test_a_smaller_dynamic_tree_is_the_beginning_of_the_larger(superset: Tree, data: st.DataObject, seed: int) -> None:
    """So that a request that may use few nodes gets the same ones alone and beside others that may use more."""
    assume(superset.num_nodes > 2)
    whole = DynamicTree(superset=superset, num_nodes=data.draw(st.integers(3, superset.num_nodes)))
    some = data.draw(st.integers(2, whole.num_nodes - 1))
    heads = random_heads(DOUBLE, kind="hydra", seed=seed)
    hidden = torch.randn(2, DOUBLE.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.inference_mode():
        (larger, rows), (smaller, first_rows) = (
            searched_candidates(heads, tree.on(DOUBLE.device), torch.tensor([3, 4]), hidden, DOUBLE)  # type: ignore[arg-type]
            for tree in (whole, whole.first(whole.num_nodes - 1).first(some))
        )
    assert torch.equal(larger[:, :some], smaller)
    assert torch.equal(rows.node_paths[:, :some], first_rows.node_paths)


def test_a_typical_answer_with_hydra_heads_does_not_depend_on_its_neighbours() -> None:
    heads = random_heads(DOUBLE, kind="hydra")
    tree = DynamicTree(superset=Tree.full([6, 6, 3]), num_nodes=40)
    typical = dict(max_tokens=20, temperature=0.9, acceptance="typical", epsilon=0.02, delta=0.1, ignore_eos=True)
    limited = [SamplingParams(seed=i, tree_nodes=nodes, **typical) for i, nodes in enumerate((5, 9, 12, 7))]  # type: ignore[arg-type]
    beside = [*limited[:3], SamplingParams(seed=9, **typical)]  # type: ignore[arg-type]
    alone, together = answers(heads, tree, limited, 1), answers(heads, tree, beside, 4)
    assert [alone[str(i)] for i in range(3)] == [together[str(i)] for i in range(3)]


def test_a_search_that_leaves_nothing_out_finds_the_likeliest_of_all_paths() -> None:
    """Where the superset is at most twice as large as the tree every node goes on, as it does in the whole tree by hand."""
    heads, hidden = random_heads(DOUBLE, kind="hydra"), torch.randn(1, DOUBLE.hidden_size, dtype=torch.float64)
    tree = DynamicTree(superset=Tree.full([3, 3, 3]), num_nodes=20)
    everything = [(0.0, [3])]
    for score, path in everything:
        if len(path) <= NUM_HEADS:
            with torch.no_grad():
                log_probs = alone(heads, DOUBLE, hidden[0], path).log_softmax(-1)
            best = log_probs.argsort(descending=True)[:3].tolist()
            everything += [(score + float(log_probs[token]), [*path, token]) for token in best]
    on_device = tree.on(DOUBLE.device)
    assert isinstance(on_device, DeviceDynamicTree)
    with torch.inference_mode():
        tokens, rows = searched_candidates(heads, on_device, torch.tensor([3]), hidden, DOUBLE)
    ours = [tokens[0, [n for n in line if n >= 0]].tolist() for line in rows.node_paths[0].tolist()]
    assert ours == [path for _, path in sorted(everything, key=lambda node: -node[0])[:20]]


def test_siblings_subtrees_differ_so_the_law_above_is_no_accident() -> None:
    heads = random_heads(DOUBLE, kind="hydra")
    tree = Tree.full([6, 3])
    tokens = sequential_candidates(
        heads, tree.on(DOUBLE.device), torch.tensor([3]), torch.randn(1, 32, dtype=torch.float64), DOUBLE
    )[0]
    below = {tuple(tokens[[named(tree, (r, s)) for s in range(3)]].tolist()) for r in range(6)}
    assert len(below) > 1


@pytest.mark.parametrize("lm_heads", ["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fresh_hydra_heads_are_exactly_the_backbones_own_head(family: str, lm_heads: str) -> None:
    backbone = tiny_backbone(family)
    heads = MedusaHeads(
        HeadsConfig(num_heads=3, num_layers=2, lm_heads=lm_heads, kind="hydra"),  # type: ignore[arg-type]
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        lm_head_weight=backbone.lm_head_weight,
    )
    hidden, path = torch.randn(5, backbone.hidden_size), torch.randint(0, VOCAB, (5, 3))
    assert torch.equal(
        heads.features(hidden, path=heads.path_embeddings(path, backbone.embed)), hidden[:, None].expand(-1, 3, -1)
    )
    want = backbone.logits(hidden)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(heads.logits(hidden, backbone, path=path), want, rtol=1e-6, atol=1e-6)


def requests(params: list[SamplingParams]) -> list[Request]:
    return [
        Request(prompt_ids=p, params=one, request_id=str(i))
        for i, (p, one) in enumerate(zip(PROMPTS, params, strict=True))
    ]


def answers(
    heads: MedusaHeads | None, tree: Tree | DynamicTree, params: list[SamplingParams], batch: int
) -> dict[str, list[int]]:
    engine = Engine(DOUBLE, heads, tree=tree, max_batch_size=batch, context_length=64)
    return {done.request_id: done.token_ids for done in engine.run(requests(params))}


@settings(max_examples=8, deadline=None)
@given(
    tree=trees(),
    dynamic=st.booleans(),
    temperature=st.sampled_from([0.0, 0.8, 1.3]),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 4),
)
def test_an_answer_does_not_depend_on_hydra_heads(
    tree: Tree, dynamic: bool, temperature: float, seed: int, batch: int
) -> None:
    """Greedy and rejection acceptance, through the engine, beside plain decoding of each request by itself."""
    params = [
        SamplingParams(max_tokens=14, temperature=temperature, acceptance="rejection", seed=seed, choice=i,
                       tree_nodes=nodes, ignore_eos=True)
        for i, nodes in enumerate((None, 2, None, 5))
    ]  # fmt: skip
    plain = [replace(one, tree_nodes=1) for one in params]
    heads = random_heads(DOUBLE, kind="hydra", vocabulary=SOME if tree.width <= len(SOME) else None)
    shape = DynamicTree(superset=tree, num_nodes=tree.num_nodes // 2 + 1) if dynamic else tree
    assert answers(heads, shape, params, batch) == answers(None, Tree.root_only(), plain, 1)


@pytest.mark.parametrize(
    "tree", [Tree.full([4, 3, 2]), DynamicTree(superset=Tree.full([4, 3, 2]), num_nodes=12)], ids=str
)
def test_recorded_steps_say_what_eager_ones_say(tree: Tree | DynamicTree) -> None:
    """A graph of the sequential levels is one of tensors alone: see test_step_graphs.py."""
    heads = random_heads(DOUBLE, kind="hydra", vocabulary=SOME)
    params = [SamplingParams(max_tokens=n, ignore_eos=True, seed=n, temperature=0.7 * (n % 2), acceptance="rejection")
              for n in (9, 14, 20, 5)]  # fmt: skip
    found = [
        Engine(DOUBLE, heads, tree=tree, max_batch_size=2, context_length=64, graphs=graphs)
        for graphs in (record, False)
    ]
    recorded, eager = ({one.request_id: one.token_ids for one in engine.run(requests(params))} for engine in found)
    assert recorded == eager
    assert found[0].decoder.graphs is not None, "steps were recorded"


@settings(max_examples=8, deadline=None)
@given(tree=trees(), max_tokens=st.integers(1, 24))
def test_replayed_steps_are_those_of_the_engine(tree: Tree, max_tokens: int) -> None:
    """The replay gives heads the answer's own path; the engine, each node's."""
    heads = random_heads(SINGLE, kind="hydra")
    engine = Engine(SINGLE, heads, tree=tree, max_batch_size=2, context_length=64)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    done = {int(one.request_id): one for one in engine.run(requests([params] * len(PROMPTS)))}
    pairs = [(prompt, done[i].token_ids) for i, prompt in enumerate(PROMPTS)]
    for i, ranks in enumerate(guessed_ranks(SINGLE, heads, pairs, num_ranks=VOCAB, rows=5)):
        assert num_steps(ranks, tree) == done[i].stats.num_steps


def positions(pair: tuple[list[int], list[int]]) -> Iterator[tuple[Tensor, int, list[int], int]]:
    """Hidden state, head, the path it reads and the token it should say: every target of an answer, by hand."""
    prompt, answer = pair
    ids = prompt + answer
    with torch.no_grad():
        hidden = DOUBLE.hidden_states(torch.tensor([ids]))[0]
    for t in range(len(prompt) - 1, len(ids)):
        for head in range(NUM_HEADS):
            if t + head + 2 < len(ids):
                yield hidden[t], head, ids[t + 1 : t + head + 2], ids[t + head + 2]


def test_hits_and_temperatures_are_those_after_the_right_path() -> None:
    heads = random_heads(DOUBLE, kind="hydra")
    pair = ([3, 4, 5], torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(2)).tolist())
    want = torch.zeros(NUM_HEADS, VOCAB, dtype=torch.long)
    log_p = torch.zeros(3, NUM_HEADS, dtype=torch.float64)
    heats = (0.5, 1.0, 4.0)
    with torch.no_grad():
        for hidden, head, path, token in positions(pair):
            logits = alone(heads, DOUBLE, hidden, path)
            want[head, logits.argsort(descending=True).tolist().index(token)] += 1
            log_p[:, head] += torch.stack([(logits / heat).log_softmax(-1)[token] for heat in heats])
    assert measure_hits(DOUBLE, heads, [pair], num_ranks=VOCAB, rows=7).hits.tolist() == want.tolist()
    fitted = fit_temperatures(DOUBLE, heads, [pair], rows=7)
    with torch.no_grad():
        for head in range(NUM_HEADS):
            found = sum(
                (alone(heads, DOUBLE, h, path) / fitted[head]).log_softmax(-1)[token]
                for h, k, path, token in positions(pair)
                if k == head
            )
            assert found >= log_p[:, head].max(), "no temperature of those tried here is likelier"


@pytest.mark.parametrize("lm_heads", ["shared", "own"])
def test_loss_and_gradients_are_those_of_the_formula(lm_heads: str) -> None:
    """In float64, position by position, against autograd through the formula."""
    heads = random_heads(DOUBLE, num_layers=2, lm_heads=lm_heads, kind="hydra")
    prompt, answer = [3, 4, 5], [6, 7, 8, 9, 10, 3, 1, 1]
    ids = torch.tensor(prompt + answer)
    targets = head_targets(torch.tensor([IGNORE] * len(prompt) + answer), NUM_HEADS)
    kept = targets[:, 0] != IGNORE
    hidden = DOUBLE.hidden_states(ids[None])[0].detach()
    path = heads.path_embeddings(true_path(ids, NUM_HEADS)[kept], DOUBLE.embed)
    assert path is not None
    found = medusa1_loss(
        heads, hidden[kept], targets[kept], DOUBLE.lm_head_weight.detach(), chunk_size=3, path=path.detach()
    )
    want = torch.zeros((), dtype=torch.float64)
    for state, head, tokens, token in positions((prompt, answer)):
        nats = -F.log_softmax(alone(heads, DOUBLE, state, tokens), dim=-1)[token]
        want = want + 0.8 ** (head + 1) * nats / int(kept.sum())
    torch.testing.assert_close(found.loss, want)
    parameters = tuple(heads.parameters())
    got, exact = torch.autograd.grad(found.loss, parameters), torch.autograd.grad(want, parameters)
    torch.testing.assert_close(got, exact)
    assert all(grad.abs().sum() > 0 for grad in got), "every weight learns"


def saved(folder: Path, heads: MedusaHeads) -> Path:
    return save_checkpoint(
        folder / "heads", heads, paths=[(0,), (0, 0), (1,)], backbone_name="tiny",
        backbone_fingerprint=SINGLE.fingerprint, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_saved_set_loads_back_equal_its_kind_read_from_the_tensors(tmp_path: Path, num_layers: int) -> None:
    want = random_heads(SINGLE, num_layers=num_layers, kind="hydra")
    folder = saved(tmp_path, want)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"hydra"', '"medusa"'))
    back = load_checkpoint(folder, backbone=SINGLE)
    assert back.heads.config == want.config
    for name, weight in want.named_parameters():
        assert torch.equal(back.heads.get_parameter(name), weight)
    assert set(load_file(folder / WEIGHTS)) == set(dict(want.named_parameters())), "no embeddings of the backbone"


def test_a_block_of_another_width_than_its_heads_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, random_heads(SINGLE, kind="hydra"))
    weights = load_file(folder / WEIGHTS)
    weights["heads.2.blocks.0.weight"] = weights["heads.2.blocks.0.weight"][:, :-32].clone()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"heads.2.blocks.0.weight must be \[D,4·D\]"):
        load_checkpoint(folder)


def test_what_hydra_heads_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    heads = random_heads(SINGLE, kind="hydra")
    checkpoint = Checkpoint(
        heads=heads, paths=[(0,), (0, 0)], backbone_name="tiny", backbone_fingerprint=SINGLE.fingerprint
    )
    for format in ("vllm", "reference"):
        with pytest.raises(ValueError, match=f"format {format} cannot hold hydra heads"):
            export_heads(tmp_path / "out", checkpoint, SINGLE, format=format, force=True)
    with pytest.raises(ValueError, match="give `path`"):
        heads.logits(torch.zeros(1, SINGLE.hidden_size), SINGLE)
    with pytest.raises(ValueError, match="kind must be one of medusa, hydra"):
        HeadsConfig(kind="eagle")  # type: ignore[arg-type]
