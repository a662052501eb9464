from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import medusa
from medusa.backbone import Backbone
from medusa.checkpoint import WEIGHTS, save_checkpoint
from medusa.errors import CheckpointError, MedusaError
from pipelines import evaluate, promote, register
from pipelines.config import Config, EvaluateSection, PromoteSection
from pipelines.errors import ConfigError, StageError
from pipelines.evaluate import ask, compare, depth_reached, differing, figures, logit_margin
from pipelines.prompts import Prompt
from pipelines.quality import compare_backbones, heldout_paragraphs
from pipelines.registry import folder_digest
from pipelines.report import RECORD, Details, Difference, write_report
from pipelines.timing import Trace
from tests.tiny_models import make_tiny_backbone_model, save_tiny_folder
from tests.unit.medusa.tiny import random_heads

PATHS = [(0,), (1,), (0, 0), (2,), (0, 1)]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> medusa.Model:
    return medusa.load(tiny_folder, heads=None, dtype="float32")


@pytest.fixture(scope="module")
def config(model: medusa.Model, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A checkpoint of random heads and MT-Bench's shape of prompts, in two categories."""
    root = tmp_path_factory.mktemp("evaluate")
    prompts = root / "prompts.jsonl"
    rows = [
        {"question_id": i, "category": category, "turns": [f"Hello {i}", "And then?"]}
        for i, category in enumerate(["maths", "prose", "maths"])
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    made = Config.model_validate(
        {
            "workdir": root,
            "backbone": {"name": str(tiny_folder), "dtype": "float32"},
            "evaluate": {
                "path": prompts, "max_tokens": 12, "nodes": [3], "schemes": ["typical@0.8", "rejection@0.8"],
                "identity_prompts": 2,
            },
            "promote": {"min_speedup": 0.01},  # a tiny model's tree is slower than its plain decoding
        }
    )  # fmt: skip
    save_checkpoint(
        made.layout.checkpoint,
        random_heads(model.backbone),
        paths=PATHS,
        backbone_name=model.backbone.name,
        backbone_fingerprint=model.backbone.fingerprint,
    )
    return made


@pytest.fixture(scope="module")
def result(config: Config) -> Iterator[evaluate.EvaluateResult]:
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "_log", lambda *_: None)  # the registry has tests of its own
    yield evaluate.run(config)
    patch.undo()


def test_every_scheme_is_measured_with_every_size(result: evaluate.EvaluateResult) -> None:
    cases = {(case.scheme, case.num_nodes): case for case in result.details.cases}
    assert set(cases) == {(s, n) for s in ("greedy", "typical@0.8", "rejection@0.8") for n in (6, 3)}
    for (scheme, _), case in cases.items():
        assert set(case.by_category) == {"maths", "prose"}
        assert case.overall.num_answers == 6  # three prompts of two turns
        assert sum(one.num_tokens for one in case.by_category.values()) == case.overall.num_tokens
        assert sum(one.num_steps for one in case.by_category.values()) == case.overall.num_steps
        # Greedy and rejection acceptance are lossless, seeds included; typical acceptance promises nothing.
        assert case.num_differing == (None if scheme.startswith("typical") else 0)
        assert list(case.depth_reached) == sorted(case.depth_reached, reverse=True)
        expected = (case.overall.num_tokens - case.overall.num_answers) / case.overall.num_steps
        assert case.overall.acceleration_rate == pytest.approx(expected)
        assert case.overall.acceleration_rate == pytest.approx(1 + sum(case.depth_reached), abs=1e-9)
    headline = result.evaluation
    assert (headline.num_nodes, headline.num_prompts, headline.identity_checked) == (6, 6, 4)
    assert headline.acceleration_rate == cases["greedy", 6].overall.acceleration_rate
    assert (headline.identity_differing, headline.tuned, headline.quality) == (0, False, None)


class Measured(Exception):
    """Evaluation loads the model, to measure."""


def test_a_report_of_the_same_inputs_stands_and_of_others_does_not(
    config: Config, result: evaluate.EvaluateResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise Measured

    monkeypatch.setattr(evaluate, "load_model", load)
    assert evaluate.run(config) == replace(result, measured_before=True)
    for changes in ({"again": True}, {"max_tokens": 11}, {"num_prompts": 2}):
        settings = config.evaluate.model_copy(update=changes)
        with pytest.raises(Measured):
            evaluate.run(config.model_copy(update={"evaluate": settings}))
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "machine", lambda: "another GPU")
        with pytest.raises(Measured):
            evaluate.run(config)
    with_card = config.layout.checkpoint / "README.md"
    before = with_card.read_bytes()
    with_card.write_bytes(before + b"changed")
    with pytest.raises(Measured):
        evaluate.run(config)
    with_card.write_bytes(before)
    page = config.layout.evaluation / "report.json"
    whole = page.read_text()
    page.write_text(whole[:-40])
    with pytest.raises(Measured):  # cut off while it was written
        evaluate.run(config)
    page.write_text(whole)


def test_a_report_is_of_the_checkpoint_that_was_measured_or_there_is_none(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.evaluate.model_copy(update={"num_prompts": 1, "schemes": (), "nodes": ()})
    here = config.model_copy(update={"workdir": tmp_path, "evaluate": settings})
    shutil.copytree(config.layout.checkpoint, here.layout.checkpoint)
    check_identity = evaluate._check_identity

    def while_a_training_ends(*args: Any) -> tuple[int, list[Difference]]:
        found = check_identity(*args)
        (here.layout.checkpoint / "README.md").write_text("of other heads")
        return found

    monkeypatch.setattr(evaluate, "_check_identity", while_a_training_ends)
    with pytest.raises(StageError, match="checkpoint changed while it was measured"):
        evaluate.run(here)
    assert not here.layout.evaluation.exists()


def test_a_text_that_is_not_there_is_named_before_anything_is_measured(config: Config, tmp_path: Path) -> None:
    settings = config.evaluate.model_copy(update={"text": tmp_path / "none.txt"})
    with pytest.raises(ConfigError, match=r"evaluate\.text: cannot read .*none\.txt"):
        evaluate.run(config.model_copy(update={"evaluate": settings}))


def test_a_second_turn_stands_behind_the_models_own_first_answer(model: medusa.Model) -> None:
    first, second = ask(model, [Prompt(id="p", source="s", turns=("Hello", "More"))], 8, lambda _: None)
    answer = model.generate("Hello", max_tokens=8).token_ids
    said = model.backbone.tokenizer.decode(answer, skip_special_tokens=True)
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": text} for role, text in zip(roles, ("Hello", said, "More"), strict=True)]
    assert (first.name, second.name) == ("p", "p/2")
    assert second.ids == model.encode(chat)


def test_answers_are_told_apart_by_category_and_where_there_is_none_by_source(model: medusa.Model) -> None:
    prompts = [
        Prompt(id="p", source="mt_bench", category="writing", turns=("Hello",)),
        Prompt(id="q", source="mt_bench", category="math", turns=("Hello",)),
        Prompt(id="r", source="own", turns=("Hello",)),
    ]
    assert [question.category for question in ask(model, prompts, 8, lambda _: None)] == ["writing", "math", "own"]


def test_a_turn_that_outgrows_the_context_is_left_out_with_those_behind_it(model: medusa.Model) -> None:
    prompts = [
        Prompt(id="p", source="s", turns=("Hello", "x " * 200, "Bye")),
        Prompt(id="q", source="s", turns=("Hi",)),
    ]
    assert [question.name for question in ask(model, prompts, 8, lambda _: None)] == ["p", "q"]


def test_a_version_measured_beside_itself_is_as_good(config: Config) -> None:
    folder = config.layout.checkpoint
    found = compare(config, challenger=folder, champion=folder)
    assert replace(found.challenger, tree_step_s=0, tree_tokens_per_s=0) == replace(
        found.champion, tree_step_s=0, tree_tokens_per_s=0
    )
    assert (found.num_differing, found.dtype, found.challenger.num_answers) == (0, "float32", 6)


def test_a_challenger_is_fetched_and_measured_beside_the_champion(
    config: Config, result: evaluate.EvaluateResult, model: medusa.Model, tmp_path: Path
) -> None:
    register.run(config)
    assert promote.run(config).comparison is None  # no champion: nothing to measure beside

    # Another machine, the same registry: the same heads with a smaller tree.
    shared = config.registry.model_copy(update={"tracking_uri": f"sqlite:///{config.layout.tracking_db}"})
    gate = PromoteSection(acceleration_margin=0.9, speedup_margin=0.9, min_acceleration=0.5, min_speedup=0.01)
    there = config.model_copy(update={"workdir": tmp_path, "registry": shared, "promote": gate})
    save_checkpoint(
        there.layout.checkpoint,
        random_heads(model.backbone),
        paths=PATHS,
        default_nodes=3,
        backbone_name=model.backbone.name,
        backbone_fingerprint=model.backbone.fingerprint,
    )
    evaluation = replace(result.evaluation, checkpoint_digest=folder_digest(there.layout.checkpoint))
    write_report(there.layout.evaluation, evaluation, [[1]])
    registered = register.run(there)
    promoted = promote.run(there)
    assert (promoted.champion, promoted.previous, promoted.overruled) == (registered.version, 1, ())
    assert promoted.comparison is not None
    cases = {case.num_nodes: case.overall for case in result.details.cases if case.scheme == "greedy"}
    assert promoted.comparison.challenger.num_steps == cases[3].num_steps
    assert promoted.comparison.champion.num_steps == cases[6].num_steps
    assert promote.rollback(config).champion == 1


def test_a_champion_that_does_not_load_is_no_fault_of_the_challenger(config: Config, tmp_path: Path) -> None:
    folder = config.layout.checkpoint
    other = save_tiny_folder(tmp_path / "other", "llama", seed=5)
    foreign = config.model_copy(update={"backbone": config.backbone.model_copy(update={"name": str(other)})})
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / WEIGHTS).write_bytes(b"torn")
    for settings, champion in ((foreign, folder), (config, damaged)):
        with pytest.raises(StageError, match=r"the champion does not load with backbone\.name=") as caught:
            compare(settings, challenger=folder, champion=champion)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        compare(config, challenger=damaged, champion=folder)


def test_a_checkpoint_of_another_backbone_is_named(config: Config, tmp_path: Path) -> None:
    other = save_tiny_folder(tmp_path / "other", "llama", seed=5)
    foreign = config.model_copy(update={"backbone": config.backbone.model_copy(update={"name": str(other)})})
    with pytest.raises(CheckpointError, match="trained on backbone") as caught:
        evaluate.run(foreign)
    assert "\n" not in str(caught.value)


def test_a_difference_is_found_where_it_begins_with_its_margin(model: medusa.Model) -> None:
    (question,) = ask(model, [Prompt(id="p", source="s", turns=("Hello",))], 8, lambda _: None)
    plain = model.generate(question.ids, max_tokens=8).token_ids
    wrong = [*plain[:5], (plain[5] + 1) % 300, *plain[6:]]
    traces = [Trace(token_ids=ids, tokens_per_step=[1], step_s=[], total_s=1.0) for ids in (plain, wrong, plain[:3])]
    assert differing(model, [question], traces[:1], traces[:1]) == []
    (parted,) = differing(model, [question], traces[:1], traces[1:2])
    assert (parted.position, parted.plain_token, parted.tree_token) == (5, plain[5], wrong[5])
    with torch.inference_mode():
        oracle = make_tiny_backbone_model("llama", seed=0)
        logits = oracle(torch.tensor([[*question.ids, *plain[:5]]]), use_cache=False).logits[0, -1]
    best = logits.double().topk(2).values
    assert parted.margin == pytest.approx(float(best[0] - best[1]), rel=1e-3)
    assert int(logits.argmax()) == plain[5]
    (short,) = differing(model, [question], traces[:1], traces[2:])
    assert (short.position, short.plain_token, short.tree_token) == (3, plain[3], None)
    assert logit_margin(model, question.ids) > 0


def test_depths_and_figures_are_those_of_the_steps() -> None:
    traces = [
        Trace(token_ids=[0] * 7, tokens_per_step=[1, 3, 1, 2], step_s=[1.0, 2.0, 3.0], total_s=7.0),
        Trace(token_ids=[0] * 2, tokens_per_step=[1, 1], step_s=[10.0], total_s=2.0),
    ]
    assert depth_reached(traces, 3) == (0.5, 0.25, 0.0)
    found = figures(traces, traces)
    assert (found.num_steps, found.num_tokens, found.acceleration_rate) == (4, 9, 7 / 4)
    assert (found.tree_step_s, found.tree_tokens_per_s, found.speedup) == (2.5, 1.0, 1.0)


def test_answers_of_one_token_have_nothing_to_measure(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "eos_token_ids", frozenset(range(300)))  # whatever comes first ends the answer
    again = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"again": True})})
    folder = config.layout.checkpoint
    for measured in (lambda: evaluate.run(again), lambda: compare(config, challenger=folder, champion=folder)):
        with pytest.raises(StageError, match=r"all 6 answers end at their first token, .* \(evaluate\.path\)"):
            measured()


def test_a_category_whose_answers_have_one_token_has_no_figures(
    result: evaluate.EvaluateResult, tmp_path: Path
) -> None:
    short = [Trace(token_ids=[7], tokens_per_step=[1], step_s=[], total_s=0.5)] * 2
    case = replace(result.details.cases[0], by_category={"yes or no": figures(short, short)})
    page, _ = write_report(tmp_path, result.evaluation, [[1]], Details(cases=(case,)))
    assert "| yes or no | 2 | – | – | – | 2.0 |" in page.read_text()
    text = (tmp_path / RECORD).read_text()
    assert "NaN" not in text, "which JSON has not"
    (read,) = Details.from_record(json.loads(text)["details"]).cases
    assert math.isnan(read.by_category["yes or no"].plain_step_s)
    assert read.overall == case.overall


def test_an_untouched_backbone_keeps_its_quality_and_a_broken_one_does_not(model: medusa.Model, tmp_path: Path) -> None:
    other = medusa.load(save_tiny_folder(tmp_path / "other", "llama", seed=3), heads=None, dtype="float32").backbone
    question = model.encode("Hello")
    answer = model.generate(question, max_tokens=12).token_ids
    texts = [model.backbone.tokenizer(text)["input_ids"] for text in heldout_paragraphs(None)[:2]]
    same = compare_backbones(model.backbone, model.backbone, answers=[(question, answer)], texts=texts)
    assert (same.answers.rise, same.text.mean_kl) == (0, 0)
    assert same.answers.num_tokens == len(answer)
    broken = compare_backbones(other, model.backbone, answers=[(question, answer)], texts=texts)
    assert broken.answers.rise > 1
    assert broken.answers.mean_kl > 0.1

    ids = torch.tensor([[*question, *answer]])
    with torch.inference_mode():
        ours, theirs = (
            make_tiny_backbone_model("llama", seed=seed)(ids, use_cache=False)
            .logits[0, len(question) - 1 : -1]
            .double()
            .log_softmax(-1)
            for seed in (3, 0)
        )
    wanted = ids[0, len(question) :, None]
    assert broken.answers.tuned_perplexity == pytest.approx(math.exp(-ours.gather(1, wanted).mean()), rel=1e-4)
    assert broken.answers.original_perplexity == pytest.approx(math.exp(-theirs.gather(1, wanted).mean()), rel=1e-4)
    assert broken.answers.mean_kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)


def test_text_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\n\n  Two. \n")
    assert heldout_paragraphs(file) == ["One.", "Two."]
    file.write_text("\n \n")
    for path in (file, tmp_path / "nowhere.txt"):
        with pytest.raises(ConfigError, match=r"evaluate\.text"):
            heldout_paragraphs(path)


@pytest.mark.parametrize("scheme", ["typical", "typical@0", "lucky@1", "rejection@warm", "greedy@1", "rejection@nan"])
def test_a_scheme_that_is_none_is_refused(scheme: str) -> None:
    with pytest.raises(ValueError, match="rejection@T"):
        EvaluateSection(schemes=(scheme,))


def test_a_tree_that_the_heads_do_not_have_is_refused(config: Config) -> None:
    many = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"nodes": (99,)})})
    with pytest.raises((MedusaError, ValueError), match="got 99"):
        evaluate.run(many)
