"""The chunked loss equals the plain formula in float64, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medusa.heads import LogitTransform
from medusa.losses import IGNORE, head_targets, linear_cross_entropy, medusa1_loss
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
