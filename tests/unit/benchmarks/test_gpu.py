"""Training on one device without Ray, on tiny models: the losses are the textbook ones, and what is saved is what was trained."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import medusa
from benchmarks.gpu import learn, train_default
from benchmarks.gpu.answers import answer, complete, open_turn, own_prompts
from benchmarks.gpu.learn import Row, Settings, batches, collate, medusa1, medusa2, soft_labels, train
from benchmarks.gpu.low_rank import adapt, exported
from medusa.checkpoint import load_checkpoint
from medusa.losses import IGNORE, head_targets, medusa1_loss
from tests.tiny_models import make_tiny_backbone_model
from tests.unit.medusa.tiny import random_heads, tiny_backbone

ROWS: list[Row] = [([n % 11 + 1] * (1 + n % 3), [(n * 7 + i * 3) % 12 for i in range(2 + 3 * n)]) for n in range(5)]
CPU = torch.device("cpu")


def test_an_epoch_is_every_row_once_within_the_budget() -> None:
    seen = list(batches(ROWS, tokens=20, seed=3))
    assert Counter(json.dumps(row) for batch in seen for row in batch) == Counter(map(json.dumps, ROWS))
    for batch in seen:
        assert len(batch) == 1 or len(batch) * max(len(p) + len(a) for p, a in batch) <= 20
    assert seen != list(batches(ROWS, tokens=20, seed=4))


@pytest.mark.parametrize("lm_heads", ["shared", "own"])
def test_a_padded_batch_has_the_loss_of_its_rows_one_by_one(lm_heads: str) -> None:
    backbone = tiny_backbone(dtype=torch.float64)
    backbone.model.requires_grad_(False)
    heads = random_heads(backbone, lm_heads=lm_heads)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, said in ROWS:
        labels = torch.tensor([IGNORE] * len(prompt) + said)
        hidden = backbone.hidden_states(torch.tensor([prompt + said]))[0]
        targets = head_targets(labels, heads.num_heads)
        total += medusa1_loss(heads, hidden, targets, backbone.lm_head_weight, denominator=7.0).loss.detach()
    found = medusa1(heads, backbone, collate(ROWS, CPU), Settings(), 7.0)
    assert float(found.loss.detach()) == pytest.approx(float(total), rel=1e-9)


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_heads_learn_among_their_vocabulary_and_read_the_path(kind: str) -> None:
    """Against the cross-entropies written down row by row, from the logits with which the heads guess."""
    backbone = tiny_backbone(dtype=torch.float64)
    backbone.model.requires_grad_(False)
    vocabulary = torch.tensor([0, 2, 3, 5, 8, 9])
    heads = random_heads(backbone, kind=kind, vocabulary=vocabulary)
    total, outside = 0.0, 0
    for prompt, said in ROWS:
        ids = prompt + said
        hidden = backbone.hidden_states(torch.tensor([ids]))[0]
        for t in range(len(prompt) - 1, len(ids) - 1):
            path = torch.tensor([*ids[t + 1 :], 0, 0][: heads.num_heads])
            reader = backbone.lm_head_for(vocabulary)
            log_p = heads.logits(hidden[t], reader, path=path).detach().log_softmax(dim=-1)
            for k in range(1, heads.num_heads + 1):
                if t + k + 1 < len(ids):
                    place = (vocabulary == ids[t + k + 1]).nonzero().flatten().tolist()
                    total -= 0.8**k * sum(float(log_p[k - 1, p]) for p in place)
                    outside += not place
    found = medusa1(heads, backbone, collate(ROWS, CPU), Settings(), 7.0)
    assert outside > 3
    assert float(found.loss.detach()) == pytest.approx(total / 7.0, rel=1e-9)


def test_soft_labels_are_the_backbones_own_guesses_where_the_targets_stand() -> None:
    backbone, settings = tiny_backbone(dtype=torch.float64), Settings(soft_ranks=3)
    batch = collate(ROWS, CPU)
    hidden = backbone.hidden_states(batch.ids)
    found = soft_labels(backbone, hidden, batch.labels, 2, settings)
    row = 0
    for b, (prompt, said) in enumerate(ROWS):
        best = backbone.logits(hidden[b]).float().topk(3, dim=-1)
        for t in range(len(prompt) - 1, len(prompt) + len(said) - 1):
            for k in (1, 2):
                if t + k + 1 < len(prompt) + len(said):
                    assert found.tokens[row, k - 1].tolist() == best.indices[t + k].tolist()
                    torch.testing.assert_close(found.shares[row, k - 1], best.values[t + k].softmax(dim=-1))
                else:
                    assert not found.shares[row, k - 1].any()
            row += 1
    assert row == len(found.tokens)


def test_adapters_begin_as_nothing_and_are_saved_as_what_they_became() -> None:
    backbone, original = tiny_backbone(), tiny_backbone()
    heads = random_heads(backbone)
    layers = adapt(backbone.model, rank=2, alpha=4.0, dropout=0.0)
    batch = collate(ROWS, CPU)
    _, kl, _ = medusa2(heads, backbone, layers, batch, Settings(), 1.0)
    assert float(kl) == pytest.approx(0.0, abs=1e-4)
    settings = Settings(lr=0.02, tokens_at_once=30, tokens_a_step=60, epochs=4)
    log = train(heads, backbone, ROWS, settings, layers=layers, every=1)
    assert log.entries[-1]["head1"] < log.entries[0]["head1"]
    tuned = backbone.hidden_states(batch.ids)
    assert not torch.allclose(tuned, original.hidden_states(batch.ids), atol=1e-3)
    original.merge(exported(layers, rank=2, alpha=4.0))
    torch.testing.assert_close(original.hidden_states(batch.ids), tuned, atol=1e-4, rtol=1e-4)
    plain = make_tiny_backbone_model("llama", 0, torch.float32, vocab_size=12)
    for name, weight in plain.named_parameters():  # nothing but the adapters learned
        kept = dict(backbone.model.named_parameters())
        assert torch.equal(weight, kept.get(name, kept.get(name.replace(".weight", ".base.weight"), weight * 0)))


def test_training_ends_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    now = iter(range(1000))
    monkeypatch.setattr(learn.time, "monotonic", lambda: float(next(now)))
    log = train(random_heads(backbone), backbone, ROWS, Settings(limit_s=12, epochs=1e6, tokens_at_once=30))
    assert 1 < log.steps <= 12


def test_answers_of_a_padded_batch_are_those_of_the_engine(tiny_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    reference = medusa.load(tiny_folder, heads=None, dtype="float32")
    asked = [(str(n), "s", words) for n, words in enumerate(["Hello", "And then there was more to say", "x"])]
    prompts = [reference.encode(words) for _, _, words in asked]
    expected = [reference.generate(ids, max_tokens=10).token_ids for ids in prompts]
    assert complete(model, prompts, max_tokens=10) == expected
    far = learn.time.monotonic() + 1000
    assert answer(model, tokenizer, asked, tmp_path, batch=2, max_prompt=100, max_tokens=10, until=far) == sum(
        map(len, expected)
    )
    learnt, held = train_default.read_rows(tmp_path)
    pairs = zip(prompts, expected, strict=True)
    assert sorted([*learnt, *(row for row in held if row not in learnt)]) == sorted(
        (i, a) for i, a in pairs if len(a) > 1
    )


def test_own_prompts_continue_the_open_user_turn_and_are_apart(tiny_folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer.decode(open_turn(tokenizer)) == "<|im_start|>user\n"
    model.generation_config.eos_token_id = list(range(0, 300, 2))  # a tiny model hardly ever ends a turn by itself
    tokenizer.eos_token = tokenizer.decode([4])
    until = learn.time.monotonic() + 0.5
    found = list(own_prompts(model, tokenizer, batch=16, max_tokens=24, until=until))
    assert len({name for name, _ in found}) == len({text for _, text in found}) == len(found)
    assert all(len(text) >= 12 for _, text in found)


def test_from_prompts_to_heads_and_adapters_by_command(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "messages": [{"role": "user", "content": f"Tell me {n}"}]} for n in range(6)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    data, common = tmp_path / "data", ["--backbone", str(tiny_folder), "--device", "cpu"]
    run = CliRunner().invoke
    answered = [
        "answer",
        "--out",
        str(data),
        "--prompts",
        str(prompts),
        "--own",
        "0",
        "--batch",
        "4",
        "--max-tokens",
        "12",
    ]
    outcome = run(train_default.app, [*answered, *common])
    assert outcome.exit_code == 0, outcome.output
    first, second = tmp_path / "first", tmp_path / "second"
    learning = [
        "train",
        "--data",
        str(data),
        "--num-heads",
        "2",
        "--tokens-at-once",
        "64",
        "--tokens-a-step",
        "64",
        "--lr",
        "0.01",
    ]
    outcome = run(train_default.app, [*learning, "--out", str(first), "--soft", "2", "--vocabulary", "40", *common])
    assert outcome.exit_code == 0, outcome.output
    assert load_checkpoint(first).heads.num_choices == 40
    joint = ["--out", str(second), "--rank", "2", "--start-from", str(first)]
    outcome = run(train_default.app, [*learning, *joint, *common])
    assert outcome.exit_code == 0, outcome.output
    for folder, tuned in ((first, False), (second, True)):
        model = medusa.load(tiny_folder, heads=folder, dtype="float32")
        assert (load_checkpoint(folder).adapters is not None) is tuned
        plain = model.generate("Hello", tree=1, max_tokens=12).token_ids
        assert model.generate("Hello", max_tokens=12).token_ids == plain
        assert len(json.loads(folder.with_suffix(".json").read_text())["top"]["1"]) == 2
    empty = run(train_default.app, [*learning[:1], "--data", str(tmp_path / "none"), "--out", str(first), *common])
    assert isinstance(empty.exception, ValueError)
    assert "run `answer` first" in str(empty.exception)
