"""Serving's engine keeps prefixes and shrinks its tree under load; step times are measured once and handed on."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deploy import engines
from deploy.engines import EngineMaker
from medusa import Model, SamplingParams
from medusa.checkpoint import Checkpoint
from medusa.engine import Engine, Request
from medusa.errors import PromptError
from medusa.grammar import Grammar, GrammarVocabulary
from medusa.tree_policy import StepCosts
from pipelines.config import ServeSection

SETTINGS = ServeSection(max_batch_size=4, context_length=256, prefix_cache_tokens=128)
ACCURACY = [[0.9, 0.05], [0.8, 0.05], [0.7, 0.05]]


@pytest.fixture(scope="session")
def measured(model: Model) -> Model:
    """Heads whose accuracy is known: by it, a chain is worth its while at small batches."""
    assert model.heads is not None
    checkpoint = Checkpoint(
        heads=model.heads,
        paths=[(0,), (0, 0), (0, 0, 0)],
        backbone_name=model.backbone.name,
        backbone_fingerprint=model.backbone.fingerprint,
        accuracy=ACCURACY,
    )
    return Model(model.backbone, model.heads, checkpoint)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a measurement, which gives times that double with the nodes from 4 running requests on."""
    calls: list[int] = []

    def measure(decoder: object, expected: dict[int, float]) -> StepCosts:
        calls.append(len(expected))
        return StepCosts(
            seconds={batch: {n: 1.0 + (n - 1) * (1.0 if batch == 4 else 0.1) for n in expected} for batch in (1, 2, 4)}
        )

    monkeypatch.setattr(engines, "measure_step_costs", measure)
    return calls


def test_the_tree_gives_way_to_load(measured: Model, count: list[int]) -> None:
    engine = EngineMaker(measured, SETTINGS)()
    assert engine.policy is not None
    assert engine.policy.choose(1) == 4
    assert engine.policy.choose(4) == 1
    assert count == [3]


def test_the_tree_is_the_one_set_and_a_dynamic_one_gives_way_too(measured: Model, count: list[int]) -> None:
    assert EngineMaker(measured, SETTINGS.model_copy(update={"tree": 2}))().tree.num_nodes == 2
    engine = EngineMaker(measured, SETTINGS.model_copy(update={"tree": "dynamic:4"}))()
    assert str(engine.tree) == "dynamic tree of 4"
    assert engine.policy is not None
    assert (engine.policy.choose(1), engine.policy.choose(4)) == (4, 1)
    request = Request(prompt_ids=measured.encode("Hello"), params=SamplingParams(max_tokens=9))
    plain = EngineMaker(Model(measured.backbone, None), SETTINGS)()
    assert next(engine.run([request])).token_ids == next(plain.run([request])).token_ids


def test_a_remade_engine_and_the_next_version_are_not_measured_again(measured: Model, count: list[int]) -> None:
    maker = EngineMaker(measured, SETTINGS)
    first, again = maker(), maker()
    assert again.policy is first.policy
    assert EngineMaker(measured, SETTINGS, costs=maker.costs)().policy is not None
    assert len(count) == 1


def test_what_was_not_measured_is(measured: Model, count: list[int]) -> None:
    maker = EngineMaker(measured, SETTINGS)
    maker()
    EngineMaker(measured, SETTINGS.model_copy(update={"max_batch_size": 8}), costs=maker.costs)()
    assert len(count) == 2


@pytest.mark.parametrize("why", ["switched off", "unmeasured heads", "no heads"])
def test_without_reason_to_shrink_nothing_is_measured(measured: Model, count: list[int], why: str) -> None:
    settings, model = SETTINGS, measured
    if why == "switched off":
        settings = settings.model_copy(update={"adaptive_tree": False})
    elif why == "unmeasured heads":
        assert measured.checkpoint is not None
        model = Model(measured.backbone, measured.heads, replace(measured.checkpoint, accuracy=None))
    else:
        model = Model(measured.backbone, None)
    assert EngineMaker(model, settings)().policy is None
    assert count == []


def test_prefixes_are_kept(measured: Model, count: list[int]) -> None:
    prompt = measured.encode("A system prompt that is shared by all of these requests, long enough for a block or two.")
    engine = EngineMaker(measured, SETTINGS)()
    asked = [Request(prompt_ids=prompt, params=SamplingParams(max_tokens=4), request_id=str(i)) for i in range(2)]
    stats = [next(iter(engine.run([each]))).stats for each in asked]
    assert stats[0].cached_tokens == 0
    assert stats[1].cached_tokens > 0


def test_graphs_are_replayed_unless_switched_off(measured: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def make(*args: object, graphs: bool, **options: object) -> Engine:
        asked.append(graphs)
        return Engine(*args, graphs=graphs, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engines, "Engine", make)
    settings = SETTINGS.model_copy(update={"adaptive_tree": False})
    for changed in (settings, settings.model_copy(update={"cuda_graphs": False})):
        EngineMaker(measured, changed)()
    assert asked == [True, False]


GRAMMAR = Grammar.json_schema({"enum": ["good", "bad"]})


def with_grammar(model: Model) -> Request:
    return Request(prompt_ids=model.encode("Hello"), params=SamplingParams(max_tokens=20, grammar=GRAMMAR))


def test_no_request_waits_for_the_vocabulary_that_grammars_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Model(replace(model.backbone), None)
    engine = EngineMaker(fresh, SETTINGS)()
    monkeypatch.setattr(GrammarVocabulary, "of", None)  # whoever would make it now fails
    (answer,) = engine.run([with_grammar(fresh)])
    assert json.loads(fresh.backbone.tokenizer.decode(answer.token_ids, skip_special_tokens=True)) in ("good", "bad")


def test_a_tokenizer_that_grammars_cannot_read_serves_all_else(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    class Slow:
        """Not one of the tokenizers that llguidance can read."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model.backbone.tokenizer, name)

    unreadable = Model(replace(model.backbone, tokenizer=Slow()), None)
    engine = EngineMaker(unreadable, SETTINGS)()
    assert "no answer can be held to a grammar: grammars cannot read this backbone's tokenizer" in caplog.text
    with pytest.raises(PromptError, match="grammars cannot read"):
        engine.submit(with_grammar(unreadable))
    request = Request(prompt_ids=model.encode("Hello"), params=SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(next(engine.run([request])).token_ids) == 4
