"""Heads trained from a file of answers: those that read the path learn what only the path tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from benchmarks import pretrain
from medusa.backbone import load_backbone
from medusa.checkpoint import load_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from medusa.losses import IGNORE
from tests.unit.medusa.test_adapters import low_rank, saved
from tests.unit.medusa.tiny import tiny_backbone

NUM_KINDS = 8


def answer(row: int) -> list[int]:
    """Pairs of tokens: the first of a pair is drawn, and says what the second is."""
    drawn = torch.randint(NUM_KINDS, (24,), generator=torch.Generator().manual_seed(row)).tolist()
    return [token for kind in drawn for token in (20 + kind, 60 + kind)]


@pytest.fixture(params=["float32", "bfloat16"])
def trained(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> dict[str, list[float]]:
    """Kind of heads → top-1 accuracy of each head, equally trained on the same file."""
    monkeypatch.setattr(pretrain, "DEFAULT_BACKBONE", str(tiny_folder))
    rows = [{"id": str(n), "source": "x", "prompt_ids": [5, 6, 7], "response_ids": answer(n)} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "answers.parquet")
    found = {}
    for kind in ("medusa", "hydra"):
        pretrain.main(
            data=[tmp_path / "answers.parquet"], out=tmp_path / kind, steps=120, batch=64, num_heads=2, num_layers=1,
            start_from="none", lr=2e-2, warmup=5, source=None, limit=None, positions=tmp_path / "kept", threads=0,
            seed=0, kind=kind, dtype=request.param, lm_heads="shared",
            vocabulary=2 * NUM_KINDS,
        )  # fmt: skip
        checkpoint = load_checkpoint(tmp_path / kind)
        assert checkpoint.heads.config.kind == kind and checkpoint.accuracy is not None
        assert checkpoint.heads.vocabulary.tolist() == [first + kind for first in (20, 60) for kind in range(NUM_KINDS)]
        found[kind] = [row[0] for row in checkpoint.accuracy]
    return found


def test_only_heads_that_read_the_path_learn_what_it_alone_tells(trained: dict[str, list[float]]) -> None:
    """Half of the targets are drawn and half follow from the token before, which the hidden state does not know."""
    best = 0.5 + 0.5 / NUM_KINDS
    for head in range(2):
        assert trained["hydra"][head] > 0.8 * best
        assert trained["medusa"][head] < 0.5 * best


@pytest.mark.parametrize("lm_heads", ["shared", "own"])
def test_gradients_are_those_of_autograd_where_every_token_is_looked_at(lm_heads: str) -> None:
    backbone = tiny_backbone(vocab_size=300)
    lm_head = torch.randn(300, backbone.hidden_size)
    heads = MedusaHeads(
        HeadsConfig(num_heads=2, lm_heads=lm_heads), hidden_size=backbone.hidden_size, vocab_size=300  # type: ignore[arg-type]
    )  # fmt: skip
    features = torch.randn(7, 2, backbone.hidden_size, requires_grad=True)
    targets, weight = torch.randint(0, 300, (7, 2)), torch.tensor([0.8, 0.64])
    targets[3, 1] = IGNORE
    softmax = pretrain.SampledSoftmax(lm_head, targets)
    losses, gradient = pretrain.gradient_of(softmax, heads, features.detach(), targets, weight)
    used = [lm_head, lm_head] if lm_heads == "shared" else [head.lm_head.weight for head in heads.heads]
    logits = torch.stack([features[:, k] @ used[k].t() for k in range(2)], dim=1)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none").view(7, 2)
    torch.testing.assert_close(losses, want)
    wanted = torch.autograd.grad((want * weight).sum(), [features, *(used if lm_heads == "own" else [])])
    found = [gradient, *(weight.grad for weight in used if lm_heads == "own")]
    torch.testing.assert_close(tuple(found), wanted)


def test_own_lm_heads_look_at_all_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave --vocabulary out"):
        pretrain.main(data=[tmp_path / "none.parquet"], out=tmp_path / "out", lm_heads="own", vocabulary=9)


def test_kept_positions_are_those_of_the_same_prompts_answers_and_weights(tmp_path: Path) -> None:
    backbone, file = tiny_backbone(vocab_size=300), tmp_path / "kept" / "train.pt"
    row = {"id": "0", "source": "x", "prompt_ids": [5, 6, 7], "response_ids": answer(0)}
    made = pretrain.kept_positions(file, [row], backbone, 2)
    again = pretrain.kept_positions(file, [row], backbone, 2)
    assert all(torch.equal(one, other) for one, other in zip(vars(made).values(), vars(again).values(), strict=True))
    for change in ({"prompt_ids": [5, 6, 8]}, {"source": "gsm8k"}, {"response_ids": answer(1)}):
        with pytest.raises(ValueError, match="holds the positions of other rows"):
            pretrain.kept_positions(file, [{**row, **change}], backbone, 2)
    assert list(file.parent.iterdir()) == [file]


def test_heads_learn_on_behind_the_backbone_that_their_adapters_tune(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "DEFAULT_BACKBONE", str(tiny_folder))
    original = load_backbone(tiny_folder, dtype="float32", fused=False)
    adapters = low_rank(original.model)
    row = {"id": "0", "source": "x", "prompt_ids": [5, 6, 7], "response_ids": answer(0)}
    pq.write_table(pa.Table.from_pylist([row, row | {"id": "1"}]), tmp_path / "answers.parquet")
    pretrain.main(
        data=[tmp_path / "answers.parquet"], out=tmp_path / "further", steps=2, batch=8, lr=1e-3, warmup=1,
        start_from=str(saved(tmp_path, original, adapters)), source=None, limit=None, positions=tmp_path / "kept",
        threads=0, seed=0, kind="medusa", dtype="float32", lm_heads="shared", vocabulary=0, num_heads=9, num_layers=9,
    )  # fmt: skip
    written = load_checkpoint(tmp_path / "further")
    assert written.heads.num_heads == 3 and written.adapters is not None
    assert written.adapters.describe() == adapters.describe()
    for name, value in written.adapters.tensors.items():
        assert torch.equal(value, adapters.tensors[name].to(value.dtype))

    file, tuned = tmp_path / "kept" / "train.pt", load_backbone(tiny_folder, dtype="float32", fused=False)
    tuned.merge(adapters)
    rows = [r for r in (row, row | {"id": "1"}) if not pretrain.is_held_out(r["id"])]
    kept = pretrain.kept_positions(file, rows, tuned, 3, adapters)
    assert torch.equal(kept.hidden, pretrain.positions_of(rows, tuned, 3).hidden)
    for other in (None, replace(adapters, alpha=5.0)):
        with pytest.raises(ValueError, match="holds the positions of other rows, backbone"):
            pretrain.kept_positions(file, rows, tuned, 3, other)
