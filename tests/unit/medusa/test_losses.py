"""The chunked loss equals the plain formula in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medusa.heads import LogitTransform
from medusa.linear_loss import Objective, SparseTarget, TeacherTarget, linear_loss
from medusa.losses import IGNORE, SoftLabels, hard_target, head_targets, linear_cross_entropy, medusa1_loss, next_tokens
from tests.unit.medusa.tiny import random_heads, tiny_backbone


def test_targets_name_the_token_each_head_must_guess() -> None:
    labels = torch.tensor([IGNORE, IGNORE, 7, 8, 9])
    want = [
        [IGNORE, IGNORE],  # its own next token is prompt: no label position
        [8, 9],
        [9, IGNORE],
        [IGNORE, IGNORE],
        [IGNORE, IGNORE],
    ]
    assert head_targets(labels, 2).tolist() == want


def test_a_prompt_between_two_answers_is_never_a_target() -> None:
    labels = torch.tensor([IGNORE, 5, 6, IGNORE, IGNORE, 7, 8])
    targets = head_targets(labels, 3)
    assert targets[0].tolist() == [6, IGNORE, IGNORE]
    assert targets[2].tolist() == [IGNORE] * 3 and targets[3].tolist() == [IGNORE] * 3
    assert targets[4].tolist() == [8, IGNORE, IGNORE]


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=2.0)])
def test_chunked_cross_entropy_equals_the_plain_one(chunk_size: int, transform: LogitTransform) -> None:
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 3, IGNORE, 10, 3, IGNORE, 1])
    ours = linear_cross_entropy(x, w, y, transform=transform, chunk_size=chunk_size)
    ours_grads = torch.autograd.grad(ours * 3, (x, w))
    plain = F.cross_entropy(transform(x @ w.t()), y, ignore_index=IGNORE, reduction="sum")
    plain_grads = torch.autograd.grad(plain * 3, (x, w))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(ours_grads, plain_grads)


def plain_loss(objective: Objective, logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """The textbook formula, over all positions at once, for autograd to differentiate."""
    log_p = logits.log_softmax(dim=-1)
    if isinstance(objective, SparseTarget):
        return -(objective.shares * log_p.gather(1, objective.tokens)).sum()
    assert isinstance(objective, TeacherTarget)
    wanted = transform(objective.hidden @ objective.weight.t())
    return F.kl_div(log_p, wanted.log_softmax(dim=-1), log_target=True, reduction="sum")


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=2.0)])
@pytest.mark.parametrize("kind", ["hard", "soft", "teacher"])
def test_every_objective_equals_autograd_on_the_plain_formula(
    chunk_size: int, transform: LogitTransform, kind: str
) -> None:
    """With a low-rank term beside the lm_head, as an adapted one has, and gradients for all four tensors."""
    x, z = (torch.randn(7, size, dtype=torch.float64, requires_grad=True) for size in (5, 2))
    w, up = (torch.randn(11, size, dtype=torch.float64, requires_grad=True) for size in (5, 2))
    objective: Objective = hard_target(torch.tensor([0, 3, IGNORE, 10, 3, IGNORE, 1]))
    if kind == "soft":
        shares = torch.rand(7, 3, dtype=torch.float64)
        shares[2] = 0
        objective = SparseTarget(tokens=torch.randint(0, 11, (7, 3)), shares=shares)
    elif kind == "teacher":
        hidden, weight = torch.randn(7, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
        objective = TeacherTarget(hidden=hidden, weight=weight, transform=transform)
    ours = linear_loss([(x, w), (z, up)], objective, transform=transform, chunk_size=chunk_size)
    plain = plain_loss(objective, transform(x @ w.t() + z @ up.t()), transform)
    torch.testing.assert_close(ours, plain)
    inputs = (x, w, z, up)
    torch.testing.assert_close(torch.autograd.grad(ours * 3, inputs), torch.autograd.grad(plain * 3, inputs))


def test_a_model_does_not_differ_from_itself() -> None:
    x, w = torch.randn(4, 5), torch.randn(11, 5)
    same = TeacherTarget(hidden=x, weight=w, transform=LogitTransform())
    assert float(linear_loss([(x, w)], same)) == pytest.approx(0, abs=1e-6)


def test_the_backbones_own_target_is_the_next_token() -> None:
    assert next_tokens(torch.tensor([IGNORE, 5, 6])).tolist() == [5, 6, IGNORE]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_soft_labels_mix_the_token_with_the_backbones_distribution(weight: float) -> None:
    backbone = tiny_backbone(dtype=torch.float64)
    heads = random_heads(backbone)
    hidden = torch.randn(6, backbone.hidden_size, dtype=torch.float64)
    targets = torch.randint(0, backbone.vocab_size, (6, 3))
    targets[5, 1:] = IGNORE
    shares = torch.rand(6, 3, 2, dtype=torch.float64)
    shares /= shares.sum(-1, keepdim=True)
    soft = SoftLabels(tokens=torch.randint(0, backbone.vocab_size, (6, 3, 2)), shares=shares, weight=weight)
    lm_head = backbone.lm_head_weight.detach()
    report = medusa1_loss(heads, hidden, targets, lm_head, soft=soft, chunk_size=4)

    log_p = heads.logits(hidden, backbone).log_softmax(dim=-1)
    want = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        for p in range(6):
            if targets[p, k] == IGNORE:
                continue
            wanted = torch.zeros(backbone.vocab_size, dtype=torch.float64)
            wanted[targets[p, k]] += 1 - weight
            wanted.index_add_(0, soft.tokens[p, k], weight * shares[p, k])
            want = want - 0.8 ** (k + 1) * (wanted * log_p[p, k]).sum() / 6
    torch.testing.assert_close(report.loss, want)
    parameters = tuple(heads.parameters())
    torch.testing.assert_close(torch.autograd.grad(report.loss, parameters), torch.autograd.grad(want, parameters))


@pytest.mark.parametrize("lm_heads", ["shared", "own"])
def test_the_heads_loss_is_the_weighted_sum_over_all_heads(lm_heads: str) -> None:
    backbone = tiny_backbone(dtype=torch.float64)
    heads = random_heads(backbone, num_layers=2, lm_heads=lm_heads)
    hidden = torch.randn(9, backbone.hidden_size, dtype=torch.float64)
    targets = torch.randint(0, backbone.vocab_size, (9, 3))
    targets[4, 1:] = targets[8, 0:] = IGNORE
    report = medusa1_loss(heads, hidden, targets, backbone.lm_head_weight.detach(), chunk_size=2)
    grads = torch.autograd.grad(report.loss, tuple(heads.parameters()))

    logits = heads.logits(hidden, backbone)
    sums = [F.cross_entropy(logits[:, k], targets[:, k], ignore_index=IGNORE, reduction="sum") for k in range(3)]
    want = sum(0.8 ** (k + 1) * s for k, s in enumerate(sums)) / 8
    torch.testing.assert_close(report.loss, want)
    torch.testing.assert_close(grads, torch.autograd.grad(want, tuple(heads.parameters())))
    assert report.counts.tolist() == [8, 7, 7]
    torch.testing.assert_close(report.per_head, torch.stack(sums).detach() / report.counts)
    assert all(grad.abs().sum() > 0 for grad in grads), "no head is left out of the loss"


def test_shares_of_workers_add_up_with_a_common_denominator() -> None:
    backbone = tiny_backbone(dtype=torch.float64)
    heads = random_heads(backbone)
    hidden = torch.randn(6, backbone.hidden_size, dtype=torch.float64)
    targets = torch.randint(0, backbone.vocab_size, (6, 3))
    weight = backbone.lm_head_weight.detach()
    whole = medusa1_loss(heads, hidden, targets, weight).loss
    parts = [medusa1_loss(heads, hidden[s], targets[s], weight, denominator=6).loss for s in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(sum(parts), whole)


def test_mis_shaped_targets_are_refused() -> None:
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match=r"targets must be \[4, 3\]"):
        medusa1_loss(random_heads(backbone), torch.zeros(4, 32), torch.zeros(4, 2).long(), backbone.lm_head_weight)
