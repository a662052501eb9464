"""What DeepSpeed is given equals the textbook loss in float64, gradients included; packing changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medusa.adapters import Adapters
from medusa.backbone import Backbone
from medusa.config import HeadKind
from medusa.heads import MedusaHeads
from medusa.losses import IGNORE, true_path
from pipelines.config import TrainSection
from pipelines.dataset import Packed, collate, labels_of
from pipelines.modules import HeadsModule, JointModule
from pipelines.positions import PositionsReader
from pipelines.records import Answer
from pipelines.tuning import adapted_layers, exported, linear_layers, make_tunable
from tests.unit.medusa.tiny import random_heads, tiny_backbone

ROWS = tuple(
    Answer(
        id=str(n), prompt_id=str(n), prompt_ids=[n % 11 + 1] * (1 + n % 3),
        response_ids=[(n * 7 + i * 3) % 12 for i in range(4 + 2 * n)],
    )
    for n in range(4)
)  # fmt: skip
LAMBDA0 = 0.3


def tuned(
    family: str = "llama",
    *,
    tune: str = "lora",
    tied: bool = False,
    lm_heads: str = "shared",
    kind: HeadKind = "medusa",
) -> tuple[JointModule, Backbone]:
    """A backbone whose adapters already differ from zero, with random heads, in float64."""
    backbone = tiny_backbone(family, dtype=torch.float64, tie_word_embeddings=tied)
    train = TrainSection.model_validate(
        {"method": "medusa2", "tune": tune, "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0, "chunk_size": 3}
    )
    heads = random_heads(backbone, lm_heads=lm_heads, kind=kind)
    make_tunable(backbone, train)
    with torch.no_grad():
        for layer in adapted_layers(backbone.model).values() if tune == "lora" else ():
            layer.lora_B["default"].weight.normal_(std=0.1)
    return JointModule(heads, backbone, train), backbone


def trained(module: JointModule) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def textbook(
    module: JointModule, student: Backbone, teacher: Backbone | None, heads: MedusaHeads, rows: tuple[Answer, ...]
) -> Tensor:
    """L_LM + λ0 · Σ 0.8^k · CE_k over the label positions of rows taken one by one, by plain formulas."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        labels = labels_of(row)
        hidden = student.hidden_states(ids)[0]
        own = student.logits(hidden).log_softmax(-1)
        original = teacher.logits(teacher.hidden_states(ids)[0]).log_softmax(-1).detach() if teacher else None
        guesses = heads.logits(hidden, student, path=true_path(ids[0], heads.num_heads)).log_softmax(-1)
        for t in range(ids.shape[1] - 1):
            if labels[t + 1] == IGNORE:
                continue
            count += 1
            if original is None:
                total = total - own[t, labels[t + 1]]
            else:
                total = total + (original[t].exp() * (original[t] - own[t])).sum()
            for k in range(1, heads.num_heads + 1):
                if t + k + 1 < ids.shape[1] and labels[t + k + 1] != IGNORE:
                    total = total - LAMBDA0 * 0.8**k * guesses[t, k - 1, labels[t + k + 1]]
    return total / count


def loss_of(module: JointModule, batch: Packed) -> tuple[Tensor, Tensor, Tensor]:
    return module(batch, float((batch.own != IGNORE).sum()), LAMBDA0)


@pytest.mark.parametrize(("lm_heads", "kind"), [("shared", "medusa"), ("own", "medusa"), ("shared", "hydra")])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_equals_the_textbook_loss_of_the_merged_backbone(
    family: str, tied: bool, lm_heads: str, kind: HeadKind
) -> None:
    """The oracle knows no adapters: its student is another model with W + α/r·B·A, made through the checkpoint's merge.

    Its gradient by B is then α/r · ∂L/∂W · Aᵀ.
    """
    module, backbone = tuned(family, tied=tied, lm_heads=lm_heads, kind=kind)
    batch = collate([ROWS], 3)
    loss, sums, counts = loss_of(module, batch)
    loss.backward()

    student = tiny_backbone(family, dtype=torch.float64, tie_word_embeddings=tied)
    teacher = tiny_backbone(family, dtype=torch.float64, tie_word_embeddings=tied)
    adapters: Adapters = exported(backbone, module._train)
    adapters.merge_into(student.model)
    heads = copy.deepcopy(module.heads)
    heads.zero_grad()
    want = textbook(module, student, teacher, heads, ROWS)
    want.backward()

    torch.testing.assert_close(loss, want)
    for name, weight in heads.named_parameters():
        torch.testing.assert_close(module.heads.get_parameter(name).grad, weight.grad, msg=name)
    assert adapters.modules == sorted(linear_layers(student.model))
    assert ("lm_head" in adapters.modules) is not tied
    for name in adapters.modules:
        by_weight = student.model.get_submodule(name).weight.grad
        layer = module.model.get_submodule(name)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[union-attr,index]
        torch.testing.assert_close(up.grad, 2 * by_weight @ down.t(), msg=f"{name} B")
        torch.testing.assert_close(down.grad, 2 * up.t() @ by_weight, msg=f"{name} A")
    others = [name for name, p in module.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not others, "the original weights get no gradient"
    assert counts.tolist() == [sum(len(row.response_ids) for row in ROWS), *counts[1:].tolist()]
    assert float(sums[0]) > 0


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_heads_alone_equal_the_textbook_loss_over_packed_positions(kind: HeadKind) -> None:
    backbone = tiny_backbone(dtype=torch.float64)
    backbone.model.requires_grad_(False)
    heads = random_heads(backbone, kind=kind)
    module = HeadsModule(heads, backbone, TrainSection(chunk_size=3))
    positions = PositionsReader(backbone=backbone, num_heads=3).read_all(ROWS, 24)
    loss, sums, counts = module(positions, float(len(positions)))
    want, found = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        ids, labels = torch.tensor(row.prompt_ids + row.response_ids), labels_of(row)
        hidden = backbone.hidden_states(ids[None])[0]
        guesses = heads.logits(hidden, backbone, path=true_path(ids, 3)).log_softmax(-1)
        for t, k in ((t, k) for t in range(len(ids)) for k in (1, 2, 3)):
            if t + k + 1 < len(ids) and labels[t + 1] != IGNORE:
                want = want - 0.8**k * guesses[t, k - 1, labels[t + k + 1]] / len(positions)
                found += 1
    torch.testing.assert_close(loss, want)
    assert counts.sum() == found and sums[0] == 0
    parameters = tuple(heads.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters))


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_equals_the_textbook_loss_with_labels(tied: bool) -> None:
    module, _ = tuned(tune="full", tied=tied)
    loss, *_ = loss_of(module, collate([ROWS], 3))
    loss.backward()
    student = tiny_backbone(dtype=torch.float64, tie_word_embeddings=tied)
    heads = copy.deepcopy(module.heads)
    heads.zero_grad()
    want = textbook(module, student, None, heads, ROWS)
    want.backward()
    torch.testing.assert_close(loss, want)
    for name, weight in student.model.named_parameters():
        torch.testing.assert_close(module.model.get_parameter(name).grad, weight.grad, msg=name)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_packed_batch_gives_the_loss_and_gradients_of_its_rows_one_by_one(family: str) -> None:
    """Windows of sliding layers are shorter than a row here."""
    long = Answer(id="l", prompt_id="l", prompt_ids=[3, 4], response_ids=[(5 * i) % 12 for i in range(20)])
    module, _ = tuned(family)
    rows = (*ROWS[:2], long, ROWS[3])
    packed, *_ = loss_of(module, collate([rows[:3], rows[3:]], 3))
    together = torch.autograd.grad(packed, tuple(trained(module).values()))
    total = sum(len(row.response_ids) for row in rows)
    losses = [module(collate([(row,)], 3), float(total), LAMBDA0)[0] for row in rows]
    alone = torch.autograd.grad(sum(losses), tuple(trained(module).values()))  # type: ignore[arg-type]
    torch.testing.assert_close(packed, sum(losses))
    torch.testing.assert_close(together, alone)


def test_fresh_adapters_leave_the_backbone_as_it_is() -> None:
    backbone = tiny_backbone(dtype=torch.float64)
    before = backbone.fingerprint
    train = TrainSection(method="medusa2")
    heads = random_heads(backbone)
    make_tunable(backbone, train)
    module = JointModule(heads, backbone, train)
    _, sums, _ = loss_of(module, collate([ROWS], 3))
    assert float(sums[0]) == pytest.approx(0, abs=1e-9)
    assert backbone.fingerprint == before
    assert F.mse_loss(backbone.lm_head_weight, tiny_backbone(dtype=torch.float64).lm_head_weight) == 0
