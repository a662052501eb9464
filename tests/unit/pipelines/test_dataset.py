from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa.losses import IGNORE, head_targets
from pipelines.dataset import (
    BLOCK,
    PADDING,
    Order,
    collate,
    labels_of,
    lane_rows,
    length_of,
    num_positions,
    pack_rows,
    split_rows,
)
from pipelines.records import Answer
from tests.tiny_models import EOS_ID, PAD_ID

ROWS = [
    Answer(id="a", prompt_id="a", prompt_ids=[5, 6, 7], response_ids=[8, 9, 10, EOS_ID]),
    Answer(id="b", prompt_id="b", prompt_ids=[11], response_ids=[12]),
    Answer(id="c", prompt_id="c", prompt_ids=[5, PAD_ID, 7, 6], response_ids=[PAD_ID, 13, 14, 15, 16, 17]),
]


def test_labels_are_the_answers_tokens_and_the_end_of_sequence_alone() -> None:
    assert labels_of(ROWS[0]) == [IGNORE, IGNORE, IGNORE, 8, 9, 10, EOS_ID]


def test_padding_token_inside_an_answer_is_a_label() -> None:
    assert labels_of(ROWS[2])[4:] == [PAD_ID, 13, 14, 15, 16, 17]


@given(lengths=st.lists(st.integers(2, 40), max_size=30), capacity=st.integers(8, 60))
def test_packing_keeps_each_row_once_and_within_the_capacity(lengths: list[int], capacity: int) -> None:
    rows = [
        Answer(id=str(i), prompt_id=str(i), prompt_ids=[1], response_ids=[2] * (length - 1))
        for i, length in enumerate(lengths)
    ]
    packs = pack_rows(rows, capacity)
    assert sorted(row.id for pack in packs for row in pack) == sorted(row.id for row in rows)
    for pack in packs:
        assert sum(map(length_of, pack)) <= capacity or len(pack) == 1
    assert packs == pack_rows(list(reversed(rows)), capacity), "a function of the rows, not of their order"
    half_empty = [pack for pack in packs if sum(map(length_of, pack)) <= capacity // 2]
    assert len(half_empty) <= 1


def test_labels_of_a_pack_are_those_of_its_rows_and_never_reach_into_the_next() -> None:
    """Row b's prompt is shorter than the heads look ahead."""
    batch = collate([(ROWS[0], ROWS[1], ROWS[2]), (ROWS[1],)], num_heads=3)
    assert batch.ids.shape == (2, 19)
    start = 0
    for number, row in enumerate(ROWS):
        here = slice(start, start := start + length_of(row))
        alone = collate([(row,)], num_heads=3)
        assert torch.equal(batch.ids[0, here], alone.ids[0])
        assert torch.equal(batch.own[0, here], alone.own[0])
        assert torch.equal(batch.targets[0, here], alone.targets[0])
        assert batch.documents[0, here].eq(number).all()
        labels = torch.tensor(labels_of(row))
        assert alone.own[0].tolist() == [*labels[1:].tolist(), IGNORE]
        assert torch.equal(alone.targets[0], head_targets(labels, 3))
        assert int((alone.targets[0, :, 0] != IGNORE).sum()) == num_positions(row)
    assert batch.documents[1].tolist() == [0] * 2 + [PADDING] * 17
    assert batch.own[1, 2:].eq(IGNORE).all() and batch.targets[1, 1:].eq(IGNORE).all()


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=200), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_each_item_comes_once_an_epoch(sizes: list[int], batch: int, seed: int) -> None:
    order = Order(sizes=sizes, seed=seed)
    size = sum(sizes)
    steps = size  # so that the stream ends where an epoch ends
    stream = torch.cat([order.batch(step, batch) for step in range(steps)])
    assert stream.shape == (size * batch,)
    epochs = stream.split(size)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(size))
        packs = order.pack_of(epoch).tolist()
        assert [packs.count(pack) for pack in range(len(sizes))] == sizes
    if len(sizes) > 60 and len(epochs) > 1:
        assert not torch.equal(epochs[0], epochs[1])


def test_a_step_needs_few_packs() -> None:
    order = Order(sizes=[5] * 1000, seed=0)
    assert all(len(order.pack_of(order.batch(step, 50)).unique()) <= 2 * BLOCK for step in range(100))


def test_batches_depend_on_step_and_seed_alone() -> None:
    order = Order(sizes=[10] * 5, seed=1)
    assert Order(sizes=[10] * 5, seed=1).batch(11, 8).tolist() == order.batch(11, 8).tolist()
    order.batch(40, 8)
    assert Order(sizes=[10] * 5, seed=1).batch(2, 8).tolist() == order.batch(2, 8).tolist()
    assert Order(sizes=[10] * 5, seed=2).batch(11, 8).tolist() != order.batch(11, 8).tolist()


@given(num_rows=st.integers(0, 30), lanes=st.integers(1, 5))
def test_lanes_part_the_rows(num_rows: int, lanes: int) -> None:
    rows = [Answer(id=str(i), prompt_id=str(i), prompt_ids=[1], response_ids=[2]) for i in range(num_rows)]
    parts = [lane_rows(rows, lane, lanes) for lane in range(lanes)]
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(share=st.floats(0, 0.9), num_prompts=st.integers(1, 40))
def test_the_split_keeps_a_prompts_turns_together_and_holds_out_one_at_least(share: float, num_prompts: int) -> None:
    rows = [
        Answer(id=f"{p}/{turn}", prompt_id=str(p), prompt_ids=[1], response_ids=[2])
        for p in range(num_prompts)
        for turn in (1, 2)
    ]
    learn, held_out = split_rows(rows, share)
    assert {row.prompt_id for row in learn}.isdisjoint(row.prompt_id for row in held_out)
    assert len(learn) + len(held_out) == len(rows)
    assert bool(held_out) == (share > 0)
    assert split_rows(list(reversed(rows)), share)[1] == list(reversed(held_out))
