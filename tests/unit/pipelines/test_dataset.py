from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa.backbone import Backbone, load_backbone
from medusa.losses import IGNORE
from pipelines.dataset import batch_indices, labels_of, lane_rows, positions_of, split_rows
from pipelines.records import Answer
from tests.tiny_models import EOS_ID, PAD_ID

ROWS = [
    Answer(id="a", prompt_id="a", prompt_ids=[5, 6, 7], response_ids=[8, 9, 10, EOS_ID]),
    Answer(id="b", prompt_id="b", prompt_ids=[11], response_ids=[12]),
    Answer(id="c", prompt_id="c", prompt_ids=[5, PAD_ID, 7, 6], response_ids=[PAD_ID, 13, 14, 15, 16, 17]),
]


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, dtype="float32")


def test_labels_are_the_answers_tokens_and_the_end_of_sequence_alone() -> None:
    assert labels_of(ROWS[0]) == [IGNORE, IGNORE, IGNORE, 8, 9, 10, EOS_ID]


def test_padding_token_inside_an_answer_is_a_label() -> None:
    assert labels_of(ROWS[2])[4:] == [PAD_ID, 13, 14, 15, 16, 17]


def test_positions_match_an_oracle_that_takes_one_row_and_one_position_at_a_time(backbone: Backbone) -> None:
    num_heads = 3
    expected: list[tuple[torch.Tensor, list[int]]] = []
    for row in ROWS:
        tokens = row.prompt_ids + row.response_ids
        states = backbone.hidden_states(torch.tensor([tokens]))[0]
        first = len(row.prompt_ids) - 1  # the last prompt token is the first that predicts one of the answer
        for t in range(first, len(tokens)):
            wanted = [tokens[t + k + 1] if t + k + 1 < len(tokens) else IGNORE for k in range(1, num_heads + 1)]
            if wanted[0] != IGNORE:
                expected.append((states[t], wanted))
    found = positions_of(backbone, ROWS, num_heads)
    assert len(found) == len(expected)
    by_target = {tuple(targets): hidden for hidden, targets in expected}
    for hidden, targets in zip(found.hidden, found.targets.tolist(), strict=True):
        torch.testing.assert_close(hidden, by_target[tuple(targets)], rtol=1e-4, atol=1e-5)


def test_a_row_without_targets_gives_no_position(backbone: Backbone) -> None:
    assert len(positions_of(backbone, [ROWS[1]], 2)) == 0
    assert len(positions_of(backbone, [], 2)) == 0


@given(size=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_each_position_comes_once_an_epoch(size: int, batch: int, seed: int) -> None:
    steps = size  # so that the stream ends where an epoch ends
    stream = torch.cat([batch_indices(size, batch, step, seed=seed) for step in range(steps)])
    assert stream.shape == (size * batch,)
    for epoch in stream.split(size):
        assert sorted(epoch.tolist()) == list(range(size))


def test_batches_depend_on_step_and_seed_alone() -> None:
    assert batch_indices(50, 8, 11, seed=1).tolist() == batch_indices(50, 8, 11, seed=1).tolist()
    assert batch_indices(50, 8, 11, seed=1).tolist() != batch_indices(50, 8, 11, seed=2).tolist()


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
