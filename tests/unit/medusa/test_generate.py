"""The face: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count, product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medusa
from medusa import tree_policy
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.decoder import Decoder
from medusa.engine import Delta, Engine
from medusa.heads import MedusaHeads
from medusa.pretrained import SUFFIXES, heads_folder, pretrained_heads
from medusa.provision import DEFAULT_BACKBONE
from medusa.tree_policy import StepCosts


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> medusa.Model:
    plain = medusa.load(tiny_folder, heads=None, dtype="float32")
    heads = MedusaHeads(HeadsConfig(num_heads=3), hidden_size=32, vocab_size=300)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.normal_(std=0.2)
    paths = [(0,), (1,), (0, 0), (2,), (0, 1), (0, 0, 0)]
    folder = save_checkpoint(
        tmp_path_factory.mktemp("heads") / "h", heads, paths=paths, backbone_name="tiny",
        backbone_fingerprint=plain.backbone.fingerprint, default_nodes=5,
    )  # fmt: skip
    return medusa.load(tiny_folder, heads=folder, dtype="float32")


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> medusa.Model:
    return medusa.load(tiny_folder, heads=None, dtype="float32")


def test_a_prompt_gives_an_answer_and_a_list_gives_a_list(model: medusa.Model, plain: medusa.Model) -> None:
    one = model.generate("hello", max_tokens=20)
    assert isinstance(one, medusa.Generation)
    several = model.generate(["hello", "other words", "hello"], max_tokens=20)
    assert next(g.token_ids for g in several) == one.token_ids == several[2].token_ids
    assert one.token_ids == plain.generate("hello", max_tokens=20).token_ids
    assert one.stats.num_tokens == len(one.token_ids)


def test_text_messages_and_ids_are_the_same_prompt(model: medusa.Model) -> None:
    messages = [{"role": "user", "content": "hello"}]
    want = model.generate("hello", max_tokens=6).token_ids
    assert model.generate(messages, max_tokens=6).token_ids == want
    assert model.generate(model.encode("hello"), max_tokens=6).token_ids == want
    assert [g.token_ids for g in model.generate([messages, "hello"], max_tokens=6)] == [want, want]


def test_roles_are_the_usual_ones_and_those_that_the_template_names(
    model: medusa.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(role: str) -> list[int]:
        return model.encode([{"role": role, "content": "be brief"}, {"role": "user", "content": "hello"}])

    assert ask("developer") == ask("system") != ask("tool")
    tokenizer = model.backbone.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", f'{{# "wizard" #}}{tokenizer.chat_template}')
    assert ask("wizard")


@pytest.mark.parametrize("acceptance", ["greedy", "typical", "rejection"])
def test_every_scheme_is_reachable_and_streams_what_it_generates(model: medusa.Model, acceptance: str) -> None:
    temperature = 0.0 if acceptance == "greedy" else 0.8
    settings = dict(max_tokens=15, temperature=temperature, acceptance=acceptance, seed=5, tree=4)
    whole = model.generate("hello", **settings)
    chunks = list(model.stream("hello", **settings))
    assert "".join(chunks) == whole.text
    assert [t for chunk in chunks for t in chunk.token_ids] == whole.token_ids
    assert [chunk.step for chunk in chunks] == list(range(len(chunks)))
    assert chunks[-1].generation is not None and chunks[-1].generation.token_ids == whole.token_ids


def test_seeds_matter_and_repeat(model: medusa.Model) -> None:
    def ask(seed: int) -> list[int]:
        return model.generate("hello", max_tokens=12, temperature=1.0, acceptance="rejection", seed=seed).token_ids

    assert ask(1) == ask(1) != ask(2)


def test_a_stop_string_ends_the_text_before_it(model: medusa.Model) -> None:
    free = model.generate("hello", max_tokens=30)
    stop = free.text[6:9]
    cut = model.generate("hello", max_tokens=30, stop=stop)
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert "".join(model.stream("hello", max_tokens=30, stop=[stop])) == cut.text


def test_leaving_a_stream_early_leaves_a_working_model(model: medusa.Model) -> None:
    next(model.stream("hello", max_tokens=30))
    assert model.generate("hello", max_tokens=5).stats.num_tokens == 5


def test_two_streams_at_once_do_not_mix(model: medusa.Model) -> None:
    streams = model.stream("hello", max_tokens=12), model.stream("other words", max_tokens=12)
    rounds = list(zip_longest(*streams, fillvalue=""))
    assert rounds[0][0].token_ids and rounds[0][1].token_ids, "both began"
    texts = ["".join(pieces) for pieces in zip(*rounds, strict=True)]
    assert texts == [model.generate(prompt, max_tokens=12).text for prompt in ("hello", "other words")]


def interrupted(model: medusa.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second step of generate()."""
    step, steps = Engine.step, count()

    def until_interrupted(engine: Engine) -> list[Delta]:
        if next(steps):
            raise KeyboardInterrupt
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(["hello", "other words"], max_tokens=9)


def not_begun(model: medusa.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        model.stream("hello", max_tokens=9)


def ended_and_held(model: medusa.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose last piece was taken, and which is closed while another runs."""
    held = model.stream("hello", max_tokens=2)
    assert next(piece for piece in held if piece.generation)
    other = model.stream("other words", max_tokens=9)
    first = next(other)
    held.close()  # type: ignore[attr-defined]
    assert "".join((first, *other)) == model.generate("other words", max_tokens=9).text


@pytest.mark.parametrize("use", [interrupted, not_begun, ended_and_held])
def test_whatever_befell_a_model_it_works_and_keeps_at_most_one_cache(
    model: medusa.Model, monkeypatch: pytest.MonkeyPatch, use: Callable
) -> None:
    made = weakref.WeakSet[Engine]()

    class Watched(Engine):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.add(self)

    monkeypatch.setattr("medusa.generate.Engine", Watched)
    fresh = medusa.Model(model.backbone, model.heads, model.checkpoint)
    use(fresh, monkeypatch)
    gc.collect()
    assert len(made) <= 1 and not any(engine.has_work for engine in made)
    want = model.generate("hello", max_tokens=9).text
    assert fresh.generate("hello", max_tokens=9).text == "".join(fresh.stream("hello", max_tokens=9)) == want


def test_trees_by_size_by_paths_and_by_value(model: medusa.Model) -> None:
    assert model.tree.num_nodes == 5
    assert model.resolve_tree(3).paths == ((), (0,), (1,))
    assert model.resolve_tree([(1,), (1, 0)]).num_nodes == 3
    assert model.resolve_tree(medusa.Tree.chain(2)).depth == 2
    assert model.resolve_tree("3") == model.resolve_tree(3)


def test_heads_without_a_checkpoint_have_a_chain(model: medusa.Model) -> None:
    bare = medusa.Model(model.backbone, model.heads)
    whole = bare.resolve_tree(None)
    assert whole == medusa.Tree.chain(model.heads.num_heads)
    for num_nodes in (1, 2, whole.num_nodes):
        assert bare.resolve_tree(num_nodes) == whole.first(num_nodes)
    for tree, why in [(whole.num_nodes + 1, "at most, got"), (0, "at least 1 node"), (True, "at least 1 node")]:
        with pytest.raises(ValueError, match=why):
            bare.resolve_tree(tree)
    assert set(bare.generate("Hello", max_tokens=6, tree=1, ignore_eos=True).stats.nodes_per_step[1:]) == {1}


def test_dynamic_trees_by_name_change_no_answer(model: medusa.Model, plain: medusa.Model) -> None:
    assert str(model.resolve_tree("dynamic")) == "dynamic tree of 5", "as many nodes as the checkpoint's own tree"
    assert model.resolve_tree("dynamic:7").num_nodes == 7
    prompts = ["hello", "other words"]
    for tree in ("dynamic", "dynamic:3", "dynamic:1", model.resolve_tree("dynamic:4")):
        got, want = (m.generate(prompts, max_tokens=15, tree=t) for m, t in ((model, tree), (plain, None)))
        assert [one.token_ids for one in got] == [one.token_ids for one in want]
    untrained = medusa.Model(model.backbone, model.heads)
    with pytest.raises(ValueError, match="give a DynamicTree of your own"):
        untrained.resolve_tree("dynamic:2")


@pytest.fixture
def timed(model: medusa.Model, monkeypatch: pytest.MonkeyPatch) -> tuple[medusa.Model, list[tuple[int, int]]]:
    """The model with accuracies, on a machine where eight rows cost what one does and each further row as much again; the
    (sequences, nodes) that were timed."""
    assert model.checkpoint is not None
    accuracy = ((0.6, 0.2, 0.1), (0.5, 0.2, 0.1), (0.4, 0.2, 0.1))
    known = medusa.Model(model.backbone, model.heads, replace(model.checkpoint, accuracy=accuracy))
    seen: list[tuple[int, int]] = []

    def measured(decoder: Decoder, expected: Mapping[int, float], *, budget_s: float) -> StepCosts:
        batches = [b for b in (1, 2, 4, 8) if b <= decoder.num_slots]
        seen.extend(product(batches, expected))
        return StepCosts(seconds={b: {n: 1.0 + max(b * n - 8, 0) for n in expected} for b in batches})

    monkeypatch.setattr(tree_policy, "measure_step_costs", measured)
    return known, seen


def test_auto_takes_the_nodes_that_are_fastest_here(
    timed: tuple[medusa.Model, list[tuple[int, int]]], plain: medusa.Model
) -> None:
    model, seen = timed
    assert model.resolve_tree("auto").num_nodes == 7, "all there are"
    assert seen == [(1, 1), (1, 2), (1, 4), (1, 7)]
    one = model.generate("hello", max_tokens=20, tree="auto")
    assert set(one.stats.nodes_per_step[1:]) == {7}
    assert len(seen) == 4, "measured once"
    prompts = ["hello", "other words", "more of them", "and more"]
    four, again = (model.generate(prompts, max_tokens=20, tree="auto") for _ in range(2))
    model.generate(prompts[:3], max_tokens=3, tree="auto")
    assert seen[4:] == [*product((1, 2, 4), (1, 2, 4, 7))], "once for as many"
    assert {nodes for answer in four for nodes in answer.stats.nodes_per_step[1:8]} == {2}, (
        "together no more than 8 rows"
    )
    assert [g.token_ids for g in four] == [g.token_ids for g in again]
    assert [g.token_ids for g in four] == [g.token_ids for g in plain.generate(prompts, max_tokens=20)]
    fixed = model.generate(prompts, max_tokens=20, tree=7)
    assert {nodes for answer in fixed for nodes in answer.stats.nodes_per_step[1:]} == {7}, "no policy is left behind"
    assert "".join(model.stream("hello", max_tokens=20, tree="auto")) == one.text
    warm = model.generate(prompts, max_tokens=8, tree="auto", temperature=0.9, seed=3)
    assert {nodes for answer in warm for nodes in answer.stats.nodes_per_step[1:]} == {7}, (
        "typical answers depend on it"
    )


def test_auto_measures_nothing_for_what_no_engine_could_serve(
    timed: tuple[medusa.Model, list[tuple[int, int]]],
) -> None:
    model, seen = timed
    with pytest.raises(medusa.PromptError, match="ask for max_tokens"):
        model.generate("hello", max_tokens=10_000, tree="auto")
    assert not seen


def test_auto_is_plain_decoding_where_no_tree_pays(
    timed: tuple[medusa.Model, list[tuple[int, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = timed

    def by_nodes(decoder: Decoder, expected: Mapping[int, float], *, budget_s: float) -> StepCosts:
        return StepCosts(seconds={1: {n: float(n) for n in expected}})

    monkeypatch.setattr(tree_policy, "measure_step_costs", by_nodes)
    several = model.generate(["hello", "words"], max_tokens=5, tree="auto")
    assert all(set(one.stats.nodes_per_step[1:]) == {1} for one in several)


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ("", {}, "prompt is empty"),
        ("  \n", {}, "prompt is empty"),
        ([[]], {}, "prompt is empty"),
        ("x " * 300, {}, "shorten the prompt"),
        ("hello", {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ("hello", {"max_tokens": 10_000}, "ask for max_tokens"),
        ("hello", {"acceptance": "hopeful"}, "unknown acceptance 'hopeful'"),
        ("hello", {"epsilon": 1.5}, r"epsilon must lie in \(0, 1\]"),
        ("hello", {"temperature": -1.0}, r"temperature must lie in \[0, 100000\]"),
        ("hello", {"tree": 8}, "1 to 7 nodes"),
        ("hello", {"tree": 0}, "at least 1 node"),
        ("hello", {"tree": "-1"}, "at least 1 node, got -1"),
        ("hello", {"tree": "dynamic:8"}, "of these heads has 1 to 7 nodes, got 8"),
        ("hello", {"tree": "dynamic:0"}, "got 0"),
        ("hello", {"tree": "dynamic:"}, 'number of nodes, "auto", "dynamic" or "dynamic:N"'),
        ("hello", {"tree": "auto", "max_tokens": 2}, '"auto" needs heads whose accuracy is known'),
        ("hello", {"tree": "static:4"}, "got 'static:4'"),
        ("hello", {"tree": [(0, 0)]}, "prefix-closed"),
        ("hello", {"tree": [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]}, "4 deep but there are 3"),
        ("hello", {"tree": [(300,)]}, "guesses among 300"),
        ("hello", {"stop": ""}, "stop string is empty"),
        ("hello", {"stop": 5}, "stop must be a text or several, got 5"),
        ([{"role": "user"}], {}, "message 0"),
        ([{"role": "user", "content": "a"}, "b"], {}, "message 1"),
        ([{"role": "wizard", "content": "a"}], {}, "message 0 has the role 'wizard', .* give one of system, user"),
        ("hello", {"temperature": 0.7, "acceptance": "greedy"}, r"'greedy' .* got temperature 0\.7; leave one"),
        ([5, 400], {"max_tokens": 2}, "token id 400"),
    ],
)
def test_bad_input_is_one_clear_error(model: medusa.Model, prompt: object, settings: dict, said: str) -> None:
    for call in (model.generate, lambda p, **s: list(model.stream(p[0] if p == [[]] else p, **s))):
        with pytest.raises((ValueError, medusa.MedusaError), match=said) as caught:
            call(prompt, **settings)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [None, 3, {"role": "user", "content": "hi"}, [None], [3.5], ["hello", 3]])
def test_what_is_no_prompt_is_named(model: medusa.Model, prompt: object) -> None:
    with pytest.raises(medusa.PromptError, match="a prompt is text"):
        model.generate(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_arrays_of_token_ids_are_prompts(model: medusa.Model, make: Callable) -> None:
    ids = model.encode("hello")
    want = model.generate("hello", max_tokens=4).token_ids
    assert model.generate(make(ids), max_tokens=4).token_ids == want
    assert [one.token_ids for one in model.generate(make([ids, ids]), max_tokens=4)] == [want, want]


@pytest.mark.parametrize("tree", [[0, 1], "x", 3.5])
def test_what_is_no_tree_is_named(model: medusa.Model, tree: object) -> None:
    with pytest.raises(ValueError, match="tree"):
        model.generate("hello", tree=tree)


def test_a_device_that_is_not_there_is_named(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown device 'tpus'"):
        medusa.load(tiny_folder, heads=None, device="tpus")
    with pytest.raises(medusa.BackboneError, match=r"no model folder at \./nope"):
        medusa.load("./nope", heads=None)


def test_no_prompts_give_no_answers(model: medusa.Model) -> None:
    assert model.generate([]) == []


def test_a_tree_without_heads_is_refused(plain: medusa.Model) -> None:
    with pytest.raises(ValueError, match="needs Medusa heads"):
        plain.generate("hello", tree=4)


@pytest.mark.parametrize("name", SUFFIXES)
def test_heads_that_do_not_come_with_the_package_are_named(tiny_folder: Path, name: str) -> None:
    with pytest.raises(medusa.CheckpointError, match=f"no heads come with this package .* under the name '{name}'"):
        medusa.load(tiny_folder, heads=name)


@pytest.mark.parametrize(
    ("name", "kind", "nodes"),
    [("default", "hydra", 10), ("hydra", "hydra", 10), ("plain", "medusa", 6), ("medusa2", "hydra", 10)],
)
def test_heads_that_come_with_the_package_are_whole(name: str, kind: str, nodes: int) -> None:
    shipped = load_checkpoint(heads_folder(name, DEFAULT_BACKBONE))
    assert (shipped.heads.config.kind, shipped.heads.num_heads) == (kind, 5)
    assert shipped.tree().num_nodes == nodes and shipped.tree(64).num_nodes == 64
    assert shipped.dynamic_tree().temperatures is not None
    assert shipped.backbone_fingerprint == load_checkpoint(pretrained_heads(DEFAULT_BACKBONE)).backbone_fingerprint


def test_an_answer_cut_inside_a_character_has_no_part_of_it(model: medusa.Model) -> None:
    """The first of the four bytes of an emoji is all that there is room for."""
    first_byte = model.backbone.tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    settings = dict(max_tokens=1, logit_bias={first_byte: 100.0})
    *_, last = model.stream("hello", **settings)
    for answer in (last.generation, model.generate("hello", **settings)):
        assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [first_byte], "length")
    assert last == ""
