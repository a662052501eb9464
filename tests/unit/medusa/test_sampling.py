"""The sampler draws from its distribution, and from nothing but its key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.acceptance import accept
from medusa.config import SamplingParams
from medusa.sampling import SamplingRows, draw, filter_logits, gumbel_noise
from medusa.tree import Tree

CPU = torch.device("cpu")


def rows_of(*params: SamplingParams) -> SamplingRows:
    return SamplingRows.of(list(params), CPU)


def many_draws(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """`count` draws at positions 0…count−1 of one request."""
    rows = rows_of(*[params] * count)
    return draw(logits.expand(count, -1), rows, torch.arange(count))


def test_draws_follow_the_distribution_by_a_chi_square_test() -> None:
    """Chi-square with 9 degrees of freedom over 20,000 draws, for five keys. The critical value 33.7 is that of
    p = 1e-4; the keys are fixed, so the test is deterministic: a correct sampler failed this choice with p < 5e-4."""
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005], dtype=torch.float64)
    for seed in range(5):
        params = SamplingParams(temperature=1.0, acceptance="rejection", seed=seed, choice=seed)
        counts = torch.bincount(many_draws(probs.log(), params, 20_000), minlength=10)
        expected = probs * 20_000
        assert ((counts - expected) ** 2 / expected).sum() < 33.7


def test_noise_of_neighbouring_keys_is_uncorrelated() -> None:
    zeros = torch.zeros(1, dtype=torch.long)
    base = gumbel_noise(zeros, zeros, zeros, 50_000)[0]
    for seed, choice, position in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        other = gumbel_noise(zeros + seed, zeros + choice, zeros + position, 50_000)[0]
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert correlation.abs() < 5 / 50_000**0.5, "five standard deviations"
    assert base.isfinite().all()
    assert base.mean().item() == pytest.approx(0.5772, abs=0.03)  # the mean of a standard Gumbel is Euler's constant


def test_noise_depends_on_the_key_alone() -> None:
    seed, choice, position = torch.tensor([5, 9]), torch.tensor([0, 2]), torch.tensor([11, 3])
    together = gumbel_noise(seed, choice, position, 40)
    for row in range(2):
        one = slice(row, row + 1)
        assert torch.equal(gumbel_noise(seed[one], choice[one], position[one], 40)[0], together[row])


def test_the_first_two_tokens_have_exactly_the_enumerated_law() -> None:
    """A table as language model over three tokens, a tree that holds some continuations: over 30,000 seeds the pairs
    (first, second) follow p(a)·p(b|a), enumerated, by chi-square with 8 degrees of freedom at p = 1e-4 (31.8); the seeds
    are fixed. And seed by seed they are the pairs of plain sampling."""
    first = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    second = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]], dtype=torch.float64)
    tree = Tree.from_paths([(0,), (1,), (0, 0)]).on(CPU)
    count = 30_000
    tokens = torch.tensor([[0, 1, 2, 0]]).expand(count, -1)  # below the root: 1, 2, and 0 after 1
    logits = torch.stack([first, second[1], second[2], first]).log().expand(count, -1, -1)
    seeds = [SamplingParams(temperature=1.0, acceptance="rejection", seed=seed) for seed in range(count)]
    rows = rows_of(*seeds)
    start = torch.zeros(count, dtype=torch.long)

    got = accept(tree.rows(count), tokens, logits, rows, start)
    depth_one = torch.where(tree.depths[got.node] == 2, 1, got.node)
    a = torch.where(got.num_accepted > 0, tokens[0][depth_one], got.next_root)
    later = draw(second[a].log(), rows, start + 2)  # where the first token was not in the tree, the next step's root
    b = torch.where(got.num_accepted == 2, 0, torch.where(got.num_accepted == 1, got.next_root, later))

    plain_a = draw(first.log().expand(count, -1), rows, start + 1)
    assert torch.equal(a, plain_a)
    assert torch.equal(b, draw(second[plain_a].log(), rows, start + 2))
    assert (got.num_accepted == 2).any()
    assert (got.num_accepted == 0).any()
    counts = torch.bincount(a * 3 + b, minlength=9)
    expected = (first[:, None] * second).flatten() * count
    assert ((counts - expected) ** 2 / expected).sum() < 31.8


def reference_filter(logits: list[float], top_k: int, top_p: float) -> set[int]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = torch.softmax(torch.tensor([logits[i] for i in order], dtype=torch.float64), 0).tolist()
    kept, mass = set(), 0.0
    for i, weight in zip(order, weights, strict=True):
        if top_p < 1 and mass >= top_p and kept:
            break
        kept.add(i)
        mass += weight
    return kept


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(-6, 6), min_size=2, max_size=12),
    st.integers(0, 14),
    st.sampled_from([1e-6, 0.13, 0.37, 0.5001, 0.77, 0.999, 1.0]),
)
def test_filters_keep_what_the_definition_keeps(values: list[int], top_k: int, top_p: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    out = filter_logits(logits, torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64))[0]
    kept = set(out.isfinite().nonzero().flatten().tolist())
    assert kept == reference_filter([float(v) for v in values], top_k, top_p)
    assert all(out[i] == logits[0, i] for i in kept)


def test_temperature_sharpens_and_zero_is_the_argmax() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5])
    cold = many_draws(logits, SamplingParams(temperature=0.05, acceptance="rejection"), 200)
    hot = many_draws(logits, SamplingParams(temperature=50.0, acceptance="rejection"), 3000)
    assert (cold == 1).all()
    assert torch.bincount(hot, minlength=3).min() > 850
    assert (many_draws(logits, SamplingParams(temperature=0.0, acceptance="rejection"), 5) == 1).all()


@pytest.mark.parametrize("scheme", [None, "typical", "rejection"])
@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e-6, 1e-5])
def test_a_temperature_next_to_zero_is_the_argmax_too(temperature: float, scheme: str | None) -> None:
    params = SamplingParams(temperature=temperature, acceptance=scheme, top_k=3)  # type: ignore[arg-type]
    assert draw(torch.tensor([[1.0, 3.0, 20.0, 5.0]]), rows_of(params), torch.tensor([4])).item() == 2


def test_of_equal_logits_the_lowest_id_wins() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]], dtype=torch.bfloat16)
    assert draw(logits, rows_of(SamplingParams()), torch.tensor([0])).item() == 1


def test_rows_keep_their_own_settings_in_a_mixed_batch() -> None:
    logits = torch.tensor([0.0, 1.0, 0.9, 0.8])
    mixed = [
        SamplingParams(),
        SamplingParams(temperature=1.0, acceptance="rejection", seed=4),
        SamplingParams(temperature=2.0, acceptance="rejection", seed=4, top_k=2),
        SamplingParams(temperature=1.0, acceptance="typical", root="greedy"),
    ]
    position = torch.tensor([7, 8, 9, 10])
    together = draw(logits.expand(4, -1), rows_of(*mixed), position)
    alone = [draw(logits[None], rows_of(p), position[i : i + 1]).item() for i, p in enumerate(mixed)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1),
        ("seed", -1), ("acceptance", "hopeful"), ("epsilon", 0.0), ("epsilon", 1.5), ("delta", 0.0), ("root", "none"),
        ("max_tokens", "8"), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", "hot"), ("seed", None), ("epsilon", "x"),
        ("tree_nodes", 0), ("tree_nodes", 2.5),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert str(value) in str(caught.value)
