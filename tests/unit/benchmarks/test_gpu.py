"""Answers and training on one device without Ray, on tiny models: answers are the engine's, losses the textbook ones, and
what is saved is what was trained."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import medusa
from benchmarks.gpu import learn, pool, train_default
from benchmarks.gpu.answers import answer, asked_prompts, open_turn, own_prompts
from benchmarks.gpu.learn import Row, Settings, batches, collate, medusa1, medusa2, soft_labels, train
from benchmarks.gpu.low_rank import adapt, exported
from benchmarks.gpu.pool import complete, plain_decoder
from medusa.backbone import load_backbone
from medusa.checkpoint import load_checkpoint
from medusa.config import SamplingParams
from medusa.decoder import Decoder
from medusa.losses import IGNORE, head_targets, medusa1_loss
from medusa.step_graphs import Capture
from tests.tiny_models import make_tiny_backbone_model
from tests.unit.medusa.recording import record
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


WORDS = ["Hello", "And then there was more to say", "x", "Why is that?", "One two three four five six seven", "No"]


def _decoder(folder: Path, **settings: Any) -> Decoder:
    return plain_decoder(load_backbone(folder, dtype="float32"), **({"batch": 4, "max_prompt": 100} | settings))


@pytest.mark.parametrize("graphs", [False, record])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "acceptance": "rejection", "seed": 3}])
def test_a_pool_says_what_the_engine_says(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool | Capture, sampling: dict[str, Any]
) -> None:
    """Through refills, moves and smaller batches, for answers of many lengths."""
    reference = medusa.load(tiny_folder, heads=None, dtype="float32")
    decoder = _decoder(tiny_folder, batch=6, max_tokens=20, graphs=graphs)
    for model in (reference.backbone, decoder.backbone):
        model.model.generation_config.eos_token_id = list(range(0, 300, 9))  # else a tiny model hardly ever ends
    prompts = [reference.encode(f"{words} {n}") for n in range(4) for words in WORDS]
    expected = [reference.generate(p, max_tokens=20, choice=n, **sampling).token_ids for n, p in enumerate(prompts)]
    assert len(set(map(len, expected))) > 3
    sizes, step, moves, move = Counter[int](), decoder.step, Counter[int](), decoder.move
    monkeypatch.setattr(pool, "PREFILL_TOKENS", 100)
    monkeypatch.setattr(decoder, "step", lambda rows, *a, **k: (sizes.update([rows]), step(rows, *a, **k))[1])
    monkeypatch.setattr(decoder, "move", lambda *slots: (moves.update(slots), move(*slots))[1])
    found = list(complete(decoder, prompts, SamplingParams(max_tokens=20, **sampling)))
    assert {said.number: said.token_ids for said in found} == dict(enumerate(expected))
    assert all(said.prompt_ids == prompts[said.number] for said in found)
    assert set(sizes) == {2, 4, 6} and moves


def test_a_prompt_that_cannot_fit_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="a prompt of 31 tokens is too long: 30 fit"):
        next(complete(_decoder(tiny_folder, max_prompt=30, max_tokens=8), [[1] * 31], SamplingParams(max_tokens=8)))


def test_progress_is_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TELL_EVERY_S", 0.0)
    entries: list[dict[str, float]] = []
    found = list(
        complete(_decoder(tiny_folder, max_tokens=5), [[1]] * 6, SamplingParams(max_tokens=5), tell=entries.append)
    )
    assert entries[-1]["tokens"] == sum(len(said.token_ids) for said in found)
    assert (entries[0]["finished"], entries[-1]["finished"]) == (0, 6)


def test_answers_are_written_and_none_in_part(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = medusa.load(tiny_folder, heads=None, dtype="float32")
    asked = [(f"{n}", "s", words) for n, words in enumerate([*WORDS, "long " * 100])]
    prompts = {name: reference.encode(words) for name, _, words in asked[:-1]}
    whole = {name: reference.generate(ids, max_tokens=10).token_ids for name, ids in prompts.items()}
    decoder = _decoder(tiny_folder, batch=2, max_tokens=10)
    limits = {"max_prompt": 100, "max_tokens": 10, "rows_a_file": 4}

    def written(folder: Path, until: float) -> dict[str, tuple[list[int], list[int]]]:
        total = answer(decoder, asked, folder, until=until, **limits)  # type: ignore[arg-type]
        rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
        assert total == sum(len(row["response_ids"]) for row in rows)
        return {row["id"]: (row["prompt_ids"], row["response_ids"]) for row in rows}

    everything = {name: (prompts[name], whole[name]) for name in whole}
    assert written(tmp_path / "all", math.inf) == everything
    assert len(list((tmp_path / "all").glob("*.parquet"))) == 2
    now = count()
    monkeypatch.setattr(pool.time, "monotonic", lambda: float(next(now)))
    some = written(tmp_path / "some", 16.0)
    assert 0 < len(some) < len(everything)
    assert some.items() <= everything.items()


def test_own_prompts_continue_the_open_user_turn_and_are_apart(tiny_folder: Path) -> None:
    decoder = _decoder(tiny_folder, batch=16, max_tokens=24)
    backbone = decoder.backbone
    assert backbone.tokenizer.decode(open_turn(backbone.tokenizer)) == "<|im_start|>user\n"
    backbone.model.generation_config.eos_token_id = list(range(0, 300, 9))  # a tiny model hardly ever ends a turn

    def found(seed: int) -> list[tuple[str, str]]:
        return list(islice(own_prompts(decoder, max_tokens=24, until=math.inf, seed=seed), 12))

    first = found(0)
    assert len({name for name, _ in first}) == len({text for _, text in first}) == 12
    assert all(len(text) >= 12 for _, text in first)
    assert found(0) == first
    assert not {text for _, text in first} & {text for _, text in found(1)}
    assert not list(own_prompts(decoder, max_tokens=24, until=-math.inf))


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
        "2",
        "--own-share",
        "0.01",
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
    tuned_start = run(
        train_default.app, [*learning, "--out", str(tmp_path / "x"), "--start-from", str(second), *common]
    )
    assert isinstance(tuned_start.exception, ValueError)
    assert "holds heads of a tuned backbone (MEDUSA-2)" in str(tuned_start.exception)
    empty = run(train_default.app, [*learning[:1], "--data", str(tmp_path / "none"), "--out", str(first), *common])
    assert isinstance(empty.exception, ValueError)
    assert "run `answer` first" in str(empty.exception)


def test_a_line_of_a_prompts_file_ends_at_its_newline_alone(tmp_path: Path) -> None:
    words = ["a\u2028b", "c\x85d", "e"]
    rows = [{"id": n, "messages": [{"role": "user", "content": text}]} for n, text in enumerate(words)]
    (tmp_path / "asked.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    assert asked_prompts(tmp_path / "asked.jsonl") == [(str(n), "asked", text) for n, text in enumerate(words)]
