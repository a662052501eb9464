"""The fitted temperature of a head is the one that drew its tokens; what heads cannot say is not held against them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medusa.confidence import TEMPERATURES, fit_temperatures, surprise
from medusa.losses import IGNORE, head_targets
from tests.unit.medusa.tiny import NUM_HEADS, random_heads, tiny_backbone

SOME = torch.tensor([0, 2, 3, 5, 7, 8, 11])


def test_surprise_is_cross_entropy_at_each_temperature() -> None:
    logits = torch.randn(20, 3, 9, dtype=torch.float64)
    targets = torch.randint(-1, 9, (20, 3))
    got = surprise(logits, targets, (0.5, 2.0))
    for row, heat in zip(got, (0.5, 2.0), strict=True):
        for head in range(3):
            want = F.cross_entropy(logits[:, head] / heat, targets[:, head], ignore_index=-1, reduction="sum")
            torch.testing.assert_close(row[head], want)


@pytest.mark.parametrize("drawn", [0.5, 1.0, 2.0])
def test_the_temperature_that_drew_the_tokens_is_found(drawn: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20_000, 1, 12, generator=generator) * 2
    tokens = torch.multinomial(torch.softmax(logits[:, 0] / drawn, dim=-1), 1, generator=generator)
    best = TEMPERATURES[int(surprise(logits, tokens, TEMPERATURES).argmin())]
    assert abs(best / drawn - 1) < 0.1


@pytest.mark.parametrize("vocabulary", [None, SOME])
def test_heads_are_fitted_on_answers_alone_by_the_definition(vocabulary: torch.Tensor | None) -> None:
    backbone = tiny_backbone(dtype=torch.float64)
    heads = random_heads(backbone, vocabulary=vocabulary)
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (
            torch.randint(0, 12, (4,), generator=generator).tolist(),
            torch.randint(0, 12, (n,), generator=generator).tolist(),
        )
        for n in (30, 7)
    ]
    total = torch.zeros(len(TEMPERATURES), NUM_HEADS, dtype=torch.float64)
    with torch.inference_mode():
        for prompt, answer in pairs:
            hidden = backbone.hidden_states(torch.tensor([[*prompt, *answer]]))[0]
            labels = torch.tensor([IGNORE] * len(prompt) + answer)
            logits = heads.logits(hidden, backbone.lm_head_for(vocabulary))
            for (place, head), token in zip(
                (head_targets(labels, NUM_HEADS) != IGNORE).nonzero().tolist(),
                head_targets(labels, NUM_HEADS)[head_targets(labels, NUM_HEADS) != IGNORE].tolist(),
                strict=True,
            ):
                known = list(range(12)) if vocabulary is None else vocabulary.tolist()
                if token in known:
                    for index, heat in enumerate(TEMPERATURES):
                        log_p = torch.log_softmax(logits[place, head] / heat, dim=-1)
                        total[index, head] -= log_p[known.index(token)]
    want = tuple(TEMPERATURES[best] for best in total.argmin(dim=0).tolist())
    assert fit_temperatures(backbone, heads, pairs, rows=5) == want
