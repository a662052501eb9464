"""Fresh heads are the backbone's own head; blocks share nothing."""

from __future__ import annotations

import pytest
import torch

from medusa.config import HeadsConfig
from medusa.heads import LogitTransform, MedusaHeads
from tests.unit.medusa.tiny import random_heads, tiny_backbone


@pytest.mark.parametrize("lm_heads", ["shared", "own"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_fresh_heads_are_exactly_the_backbones_own_head(family: str, lm_heads: str) -> None:
    backbone = tiny_backbone(family)
    heads = MedusaHeads(
        HeadsConfig(num_heads=4, num_layers=2, lm_heads=lm_heads),  # type: ignore[arg-type]
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        lm_head_weight=backbone.lm_head_weight,
    )
    hidden = torch.randn(5, backbone.hidden_size)
    assert torch.equal(heads(hidden), hidden[:, None].expand(-1, 4, -1))
    logits = heads.logits(hidden, backbone)
    assert logits.shape == (5, 4, backbone.vocab_size)
    # Not bit for bit: matrix products of 20 rows and of 5 may sum in another order.
    torch.testing.assert_close(logits, backbone.logits(hidden)[:, None].expand(-1, 4, -1), rtol=1e-6, atol=1e-6)


def test_stacked_layers_are_modules_of_their_own() -> None:
    heads = random_heads(tiny_backbone(), num_layers=3, lm_heads="own")
    pointers = [weight.data_ptr() for weight in heads.parameters()]
    assert len(set(pointers)) == len(pointers) == 3 * (3 * 2 + 1)
    head = heads.heads[0]
    hidden = torch.randn(32)
    want = hidden
    for block in head.blocks:  # type: ignore[union-attr]
        want = want + torch.nn.functional.silu(block.weight @ want + block.bias)
    torch.testing.assert_close(head(hidden), want)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_stacked_for_decoding_heads_give_the_same_features_and_keep_nothing_twice(leading: tuple[int, ...]) -> None:
    heads = random_heads(tiny_backbone(), num_layers=2, lm_heads="shared")
    hidden = torch.randn(*leading, 32)
    want = heads.features(hidden)
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    heads.stack()
    for num_heads in (None, 2):
        found = heads.features(hidden, num_heads)
        assert found.shape == want[..., :num_heads, :].shape
        torch.testing.assert_close(found, want[..., :num_heads, :])
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())
    storages = {weight.untyped_storage().data_ptr() for weight in heads.parameters()}
    assert len(storages) == 2 * 2, "weights and biases of a layer lie in one piece"


def test_stacked_heads_learn_are_cast_and_read_paths_as_others() -> None:
    hidden, backbone = torch.randn(3, 32), tiny_backbone()
    heads = random_heads(backbone, lm_heads="own")
    want = heads.logits(hidden, backbone)
    heads.stack()
    torch.testing.assert_close(heads.logits(hidden, backbone), want)
    heads.train()
    heads.features(hidden).sum().backward()
    assert all(block.weight.grad is not None for head in heads.heads for block in head.blocks)  # type: ignore[union-attr]
    with torch.no_grad():
        for weight in heads.eval().double().parameters():
            weight.zero_()
    assert torch.equal(heads.features(hidden.double())[:, 0], hidden.double())
    hydra = MedusaHeads(HeadsConfig(num_heads=2, kind="hydra"), hidden_size=32, vocab_size=40)
    path = torch.randn(3, 2, 32)
    want = hydra.features(hidden, path=path)
    hydra.stack()
    assert torch.equal(hydra.features(hidden, path=path), want)


def test_the_first_heads_alone_give_the_same_logits() -> None:
    backbone = tiny_backbone()
    for lm_heads in ("shared", "own"):
        heads = random_heads(backbone, lm_heads=lm_heads)
        hidden = torch.randn(2, backbone.hidden_size)
        torch.testing.assert_close(heads.logits(hidden, backbone, 2), heads.logits(hidden, backbone)[:, :2])


def test_the_slope_of_a_transform_is_its_derivative() -> None:
    raw = torch.randn(50, dtype=torch.float64, requires_grad=True)
    transform = LogitTransform(scale=0.7, softcap=3.0)
    out = transform(raw)
    out.sum().backward()
    torch.testing.assert_close(raw.grad, transform.slope(out.detach()))


def test_impossible_shapes_are_refused() -> None:
    for bad in ({"num_heads": 0}, {"num_layers": 0}, {"lm_heads": "borrowed"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HeadsConfig(**bad)  # type: ignore[arg-type]
