"""The measuring commands on a tiny model: every contender says the same, and the files tell what was measured."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import medusa
from benchmarks import (
    acceptance,
    bench,
    command,
    distillation,
    interleaved,
    our_engines,
    quality,
    replay,
    roofline,
    training,
)
from benchmarks.peers.engines import LLAMA, VLLM, VLLM_HEADS, Environments
from benchmarks.peers.process import Launch
from medusa.adapters import Adapters
from medusa.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.generate import Model
from medusa.heads import MedusaHeads
from medusa.native.build import library
from medusa.tree_policy import fit_policy

NUM_TOKENS = 12


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands set torch's threads, as a program may; a test gives them back. Memory's speed is not its business."""
    monkeypatch.setattr(roofline, "READ_BYTES", 2**16)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bench_compares_like_with_like(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    bench.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1, prompt_lookup=3,
        max_tokens=NUM_TOKENS, tree=["2", "5"], repeats=2, limit=2, output=out,
    )  # fmt: skip
    (page,), (record,) = out.glob("*.md"), out.glob("*.json")
    figures = json.loads(record.read_text())["figures"]["batch 1"]
    others = {"generate", "generate with prompt lookup"}
    assert {ours: set(speedups) for ours, speedups in figures["speedups"].items()} == {
        "plain": others, "tree of 2": others | {"plain"}, "tree of 5": others | {"plain"}
    }  # fmt: skip
    for agreement in figures["agreements"].values():
        assert agreement == {"num_identical": 2, "num_prompts": 2, "first_difference": None}
    assert set(figures["acceleration_rates"]) == set(figures["overheads"]) == {"tree of 2", "tree of 5"}
    for tree, overhead in figures["overheads"].items():
        assert 1 <= figures["acceleration_rates"][tree] <= 3
        assert 0 < overhead["min"] <= overhead["median"] <= overhead["max"]
    assert figures["roofline"]["limit_s"] > 0 and figures["roofline"]["bandwidth"] > 0
    text = page.read_text()
    assert "python -m benchmarks.bench" in text
    assert "| tree of 2 / vLLM | 1 | 1.80 | 3.00 | not measured |" in text


def test_bench_takes_several_together_with_whoever_can(
    tiny_folder: Path, heads_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers stand in: one that takes a batch and drafts as vLLM does, one that takes a prompt at a time."""
    engine = tmp_path / "engine.py"
    engine.write_text(
        "class Engine:\n"
        "    version = 'stand-in 1'\n"
        "    def answer(self, prompts, num_tokens):\n"
        "        return [[7] * num_tokens for _ in prompts], len(prompts) * (num_tokens - 1)\n"
    )

    def launches(*_: object, max_batch_size: int, **__: object) -> list[Launch]:
        sizes = {VLLM_HEADS: max_batch_size, LLAMA: 1}
        return [
            Launch(name=name, python=Path(sys.executable), engine=engine, settings={}, max_batch_size=size)
            for name, size in sizes.items()
        ]

    monkeypatch.setattr(bench, "peer_launches", launches)
    monkeypatch.setattr(our_engines, "fit_policy", partial(fit_policy, budget_s=0.0))
    bench.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1, batch=[1, 2],
        max_tokens=NUM_TOKENS, tree=["adaptive", "chain"], repeats=1, limit=3, output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("*.json")
    content = json.loads(record.read_text())
    assert content["settings"]["beside"] == "stand-in 1"
    one, two = content["figures"]["batch 1"], content["figures"]["batch 2"]
    ours = {"plain", "adaptive tree of 3", "our chain"}
    assert set(one["tokens_per_s"]) == ours | {"generate", VLLM_HEADS, LLAMA}
    assert set(two["tokens_per_s"]) == ours | {VLLM_HEADS}
    assert one["acceleration_rates"][VLLM_HEADS] == two["acceleration_rates"][VLLM_HEADS] == 1
    assert one["agreements"]["our chain"]["num_prompts"] == one["agreements"]["our chain"]["num_identical"] == 3
    assert two["agreements"]["our chain"]["num_prompts"] == two["agreements"]["our chain"]["num_identical"] == 4
    assert one["agreements"][VLLM_HEADS]["num_identical"] == 0
    assert one["chain"] == {"num_turns": 0, "steps": 0, "their_steps": 0}
    assert two["roofline"]["cache_bytes"] == 2 * one["roofline"]["cache_bytes"] > 0


@pytest.mark.skipif(library() is None, reason="no C compiler here")
def test_int8_stands_beside_the_others_in_the_same_run(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    bench.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1, int8=True,
        max_tokens=NUM_TOKENS, tree=["3", "2"], repeats=1, limit=1, output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("*.json")
    figures = json.loads(record.read_text())["figures"]["batch 1"]
    assert list(figures["overheads"]) == ["tree of 3", "tree of 2", "int8 plain", "int8 tree of 3"]
    assert figures["acceleration_rates"]["int8 plain"] == 1


def test_another_set_of_heads_stands_beside_the_first(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(heads_folder, other)
    bench.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1,
        also_heads=[str(other)], max_tokens=NUM_TOKENS, tree=["3", "2"], repeats=1, limit=1, output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("*.json")
    figures = json.loads(record.read_text())["figures"]["batch 1"]
    assert list(figures["overheads"]) == ["tree of 3", "tree of 2", "other: tree of 3"]
    rates = figures["acceleration_rates"]
    assert rates["other: tree of 3"] == rates["tree of 3"]


def test_each_place_of_a_batch_gives_an_answer_a_round(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    run = partial(
        bench.main, backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1,
        rounds=3, max_tokens=NUM_TOKENS, tree=["3"], repeats=1, limit=1, output=tmp_path,
    )  # fmt: skip
    run(batch=[1, 2])
    (record,) = tmp_path.glob("*.json")
    figures = json.loads(record.read_text())["figures"]
    answers = [figures[f"batch {size}"]["agreements"]["tree of 3"] for size in (1, 2)]
    assert [each["num_prompts"] for each in answers] == [each["num_identical"] for each in answers] == [1, 6]
    with pytest.raises(ValueError, match="one --batch above 1 at a time"):
        run(batch=[2, 3], vllm=Path(sys.executable))


def test_groups_hold_every_prompt_and_are_full() -> None:
    assert interleaved.in_groups([[1], [2], [3]], 2) == [[[1], [2]], [[3], [1]]]
    assert interleaved.in_groups([[1], [2]], 5) == [[[1], [2], [1], [2], [1]]]


def test_a_chain_beside_vllm_guesses_among_all_tokens(tiny_folder: Path) -> None:
    backbone = medusa.load(tiny_folder, heads=None, dtype="float32").backbone
    few = MedusaHeads(
        HeadsConfig(num_heads=3), hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, vocabulary=torch.arange(9)
    )  # fmt: skip
    with torch.no_grad():
        for weight in few.parameters():
            weight.normal_()
    plain, chain = our_engines.our_engines(Model(backbone, few), ["chain"], max_batch_size=1, context_length=32)
    heads = chain.engine.decoder.heads
    assert plain.engine.tree.num_nodes == 1 and chain.engine.tree.paths == ((), (0,), (0, 0), (0, 0, 0))
    assert heads is not None and heads.num_choices == backbone.vocab_size
    assert all(torch.equal(one, other) for one, other in zip(few.parameters(), heads.parameters(), strict=True))
    with pytest.raises(ValueError, match="accuracy"):
        our_engines.our_engines(Model(backbone, few), ["adaptive"], max_batch_size=1, context_length=32)


def test_without_sizes_the_models_own_tree_is_measured(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    acceptance.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1,
        max_tokens=NUM_TOKENS, output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("acceptance-*.json")
    ((name, by_category),) = json.loads(record.read_text())["figures"]["acceleration_rate"].items()
    assert name == "tree of 3"
    assert set(by_category) == {*(prompt.category for prompt in bench.built_in()), "all"}
    assert min(by_category.values()) <= by_category["all"] <= max(by_category.values())


def test_dynamic_trees_stand_beside_static_ones(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    acceptance.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1, limit=2,
        max_tokens=NUM_TOKENS, tree=["5", "dynamic:5", "dynamic:3"], output=tmp_path,
    )  # fmt: skip
    (record,) = tmp_path.glob("acceptance-*.json")
    rates = json.loads(record.read_text())["figures"]["acceleration_rate"]
    assert list(rates) == ["tree of 5", "dynamic tree of 5", "dynamic tree of 3"]
    assert rates["dynamic tree of 5"] == rates["tree of 5"], "its superset has no more nodes"


def test_replay_counts_what_the_engine_counts_and_keeps_the_tree_it_grew(
    tiny_folder: Path, heads_folder: Path, tmp_path: Path
) -> None:
    common = dict(backbone=str(tiny_folder), dtype="float32", device="cpu", threads=1, max_tokens=NUM_TOKENS, limit=4)
    others = tmp_path / "others.jsonl"
    others.write_text("\n".join(json.dumps({"prompt": f"Say {n}"}) for n in range(3)))
    acceptance.main(heads=str(heads_folder), tree=["3", "dynamic:3"], output=tmp_path, **common)  # type: ignore[arg-type]
    kept = tmp_path / "kept"
    replay.main(
        heads=[str(heads_folder)], tree=["3", "5", "dynamic:3"], calibration=others, batch=3, kept=kept,
        output=tmp_path, **common,  # type: ignore[arg-type]
    )  # fmt: skip
    (decoded,), (counted,) = tmp_path.glob("acceptance-*.json"), tmp_path.glob("replay-*.json")
    rates = json.loads(counted.read_text())["figures"]["rates"]
    sizes = ("3", "5", "dynamic:3")
    assert set(rates) == {f"heads, {how}, {size}" for how in (replay.STORED, replay.GROWN) for size in sizes}
    engine = json.loads(decoded.read_text())["figures"]["acceleration_rate"]
    assert rates[f"heads, {replay.STORED}, 3"] == pytest.approx(engine["tree of 3"])
    assert rates[f"heads, {replay.STORED}, dynamic:3"] == pytest.approx(engine["dynamic tree of 3"])
    before, after = load_checkpoint(heads_folder), load_checkpoint(kept)
    assert after.paths != before.paths and after.temperatures is not None
    pairs = zip(before.heads.parameters(), after.heads.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match="--calibration"):
        replay.main(kept=kept)


def test_kept_heads_are_those_stored_with_a_default_that_the_new_tree_has(heads_folder: Path, tmp_path: Path) -> None:
    old = load_checkpoint(heads_folder)
    told = dict(paths=old.paths, backbone_name="b", backbone_fingerprint="f", default_nodes=5, temperatures=(0.5, 2.0))
    wide = save_checkpoint(tmp_path / "wide", old.heads, dtype=torch.float32, **told)  # type: ignore[arg-type]
    grown = replace(
        load_checkpoint(wide, dtype=torch.bfloat16),
        paths=[(0,), (1,)], accuracy=[[0.6, 0.2], [0.0, 0.0]], temperatures=(0.7, 1.5),
    )  # fmt: skip
    replay.keep(Model(None, old.heads, grown), tmp_path / "kept")  # type: ignore[arg-type]
    kept = load_checkpoint(tmp_path / "kept")
    assert (kept.paths, kept.default_nodes, kept.temperatures) == ([(0,), (1,)], 3, (0.7, 1.5))
    assert kept.accuracy == [[0.6, 0.2], [0.0, 0.0]]
    assert (tmp_path / "kept" / WEIGHTS).read_bytes() == (wide / WEIGHTS).read_bytes()


def test_heads_of_one_name_are_told_apart_by_their_paths() -> None:
    found = command.labelled(["w1/checkpoint", "w2/checkpoint", "x/tuned", "x/tuned", "default"])
    assert found == {"w1/checkpoint": "w1/checkpoint", "w2/checkpoint": "w2/checkpoint", "tuned": "x/tuned",
                     "default": "default"}  # fmt: skip


def test_contenders_of_one_name_are_refused_before_they_begin() -> None:
    one = SimpleNamespace(name="tree of 6", max_batch_size=1, answer=lambda *_: pytest.fail("it began"))
    with pytest.raises(ValueError, match="several contenders are called tree of 6"):
        interleaved.run_interleaved([one, one], [[[1]]], num_tokens=1, num_repeats=1)


def test_distillation_writes_every_row_to_its_length_at_every_batch_size(
    tiny_folder: Path, heads_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(our_engines, "fit_policy", partial(fit_policy, budget_s=0.0))
    distillation.main(
        backbone=str(tiny_folder), heads=str(heads_folder), dtype="float32", device="cpu", threads=1,
        batch=[2, 3], tree=[1, 3], follow_load=True, max_tokens=NUM_TOKENS, rows=5, repeats=2, output=tmp_path,
    )  # fmt: skip
    (page,), (record,) = tmp_path.glob("*.md"), tmp_path.glob("distillation-*.json")
    figures = json.loads(record.read_text())["figures"]
    assert figures.keys() == {"batch 2", "batch 3"}
    trees = {"tree of 3", "adaptive tree of 3"}
    for one in figures.values():
        assert one["tokens_per_s"].keys() == {"plain", *trees}
        assert one["agreements"].keys() == trees
        assert all(a["num_identical"] == a["num_prompts"] == 5 for a in one["agreements"].values())
    assert "| plain | 3 |" in page.read_text()

    model = medusa.load(tiny_folder, heads=heads_folder, dtype="float32")
    rows = [[5, 6, 7], [8] * 9, [9]]
    plain, tree = distillation.choose_engines(model, ["3"], batch=2, context_length=32)
    for engine in (plain, tree):
        turn = engine.answer(rows, NUM_TOKENS)
        assert [len(ids) for ids in turn.token_ids] == [NUM_TOKENS] * 3
        assert turn.num_steps is not None and turn.num_steps <= 3 * (NUM_TOKENS - 1)
        assert (turn.num_steps == 3 * (NUM_TOKENS - 1)) or engine is tree


def test_distillation_asks_vllm_for_the_same_rows_no_more_at_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that gives our own plain answers, but for one token of the last."""
    model = medusa.load(tiny_folder, heads=None, dtype="float32")
    asked = [model.encode(list(row.messages)) for row in distillation.make_rows(distillation._built_in(), 5)]
    (plain,) = distillation.choose_engines(model, [], batch=2, context_length=max(map(len, asked)) + NUM_TOKENS)
    answers = [list(ids) for ids in plain.answer(asked, NUM_TOKENS).token_ids]
    answers[-1][3] += 1
    engine = tmp_path / "engine.py"
    engine.write_text(
        "class Engine:\n"
        "    version = 'stand-in 1'\n"
        "    def __init__(self, *, asked, answers):\n"
        "        self.asked, self.answers_ = asked, answers\n"
        "    def answer(self, prompts, num_tokens):\n"
        "        assert prompts == self.asked\n"
        "        return [ids[:num_tokens] for ids in self.answers_], None\n"
    )
    told: list[tuple[Environments, int]] = []

    def launches(environments: Environments, *_: object, max_batch_size: int, **__: object) -> list[Launch]:
        told.append((environments, max_batch_size))
        settings = {"asked": asked, "answers": answers}
        return [Launch(name=VLLM, python=Path(sys.executable), engine=engine, settings=settings)]

    monkeypatch.setattr(distillation, "peer_launches", launches)
    distillation.main(
        backbone=str(tiny_folder), heads="none", dtype="float32", device="cpu", threads=1, batch=[2, 4],
        vllm=Path("v"), vllm_options='{"enforce_eager": true}', max_tokens=NUM_TOKENS, rows=5, repeats=2, output=tmp_path,
    )  # fmt: skip
    environments = Environments(vllm=Path("v"), vllm_options={"enforce_eager": True})
    assert told == [(environments, 2), (environments, 4)]
    (page,), (record,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    content = json.loads(record.read_text())
    assert content["settings"]["beside"] == "stand-in 1"
    for one in content["figures"].values():
        assert one["tokens_per_s"].keys() == {"plain", VLLM}
        ratio = one["speedups"]["plain"][VLLM]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert one["agreements"] == {VLLM: {"num_identical": 4, "num_prompts": 5, "first_difference": 3}}
    assert "| vLLM and plain | 4 of 5 | at token 4 |" in page.read_text()


def test_a_tree_that_the_heads_cannot_fill_is_refused(tiny_folder: Path, heads_folder: Path) -> None:
    model = medusa.load(tiny_folder, heads=heads_folder, dtype="float32")
    with pytest.raises(ValueError, match="1 to 5 nodes"):
        command.choose_trees(model, [6])


def test_errors_take_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("tree [0] is too small")

    monkeypatch.setattr("sys.argv", ["bench"])
    with pytest.raises(SystemExit) as exit_info:
        command.run_command(fail)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.strip() == "error: tree [0] is too small"


def test_the_loss_in_chunks_is_measured_beside_the_plain_one(tmp_path: Path) -> None:
    """Enough logits that the plain formula's memory stands out: 256 x 3 x 20,000 floats are 59 MiB."""
    training.main(
        positions=[256], num_heads=3, hidden_size=8, vocab_size=20_000, chunk=16, threads=1, repeats=1, output=tmp_path
    )
    (record,) = tmp_path.glob("training-*.json")
    figures = json.loads(record.read_text())["figures"]
    naive, chunked = figures["naive 256"], figures["chunked 256"]
    assert naive["loss"] == pytest.approx(chunked["loss"], rel=1e-4)
    assert naive["peak_mib"] > 50
    assert chunked["peak_mib"] < naive["peak_mib"] / 3
    assert min(naive["positions_per_s"], chunked["positions_per_s"]) > 0


def test_quality_tells_what_a_smaller_type_costs(tiny_folder: Path, heads_folder: Path, tmp_path: Path) -> None:
    """float32 beside itself loses nothing; bfloat16, and a tuned backbone, lose what the pages say."""
    heads = load_checkpoint(heads_folder)
    generator = torch.Generator().manual_seed(0)
    model = medusa.load(tiny_folder, heads=None, dtype="float32").backbone.model
    tuned = {
        name.removesuffix(".weight"): weight.shape
        for name, weight in model.named_parameters()
        if name.endswith("q_proj.weight")
    }
    tensors = {
        name + end: torch.randn(shape, generator=generator)
        for name, (outputs, inputs) in tuned.items()
        for end, shape in ((".lora_A.weight", (2, inputs)), (".lora_B.weight", (outputs, 2)))
    }
    folder = save_checkpoint(
        tmp_path / "tuned", heads.heads, paths=[(0,)], backbone_name=heads.backbone_name,
        backbone_fingerprint=heads.backbone_fingerprint,
        adapters=Adapters(kind="lora", tensors=tensors, rank=2, alpha=2.0),
    )  # fmt: skip
    out = tmp_path / "results"
    quality.main(
        backbone=str(tiny_folder), dtype=["float32", "bfloat16"], heads=[str(folder)], device="cpu", threads=1,
        max_tokens=NUM_TOKENS, batch=2, limit=3, output=out,
    )  # fmt: skip
    (page,), (record,) = out.glob("*.md"), out.glob("*.json")
    found = json.loads(record.read_text())["figures"]
    assert set(found) == {"float32", "bfloat16", "tuned"}
    assert found["float32"]["agreement"] == {"num_answers": 3, "equal": 3, "shared_prefix": 1.0}
    for part in ("answers", "text"):
        assert found["float32"][part]["mean_kl"] == pytest.approx(0, abs=1e-9)
        assert 0 < found["bfloat16"][part]["mean_kl"] < found["tuned"][part]["mean_kl"]
        assert found["float32"][part]["tuned_perplexity"] == found["tuned"][part]["original_perplexity"]
    assert "| tuned |" in page.read_text()


def test_agreement_counts_up_to_the_first_token_that_differs() -> None:
    theirs = {"a": [1, 2, 3, 4], "b": [1, 2], "c": [7, 8]}
    ours = {"a": [1, 2, 9, 4], "b": [1, 2], "c": [7], "d": [5]}
    assert quality.agreement(ours, theirs) == quality.Agreement(num_answers=3, equal=1, shared_prefix=2 / 3)
