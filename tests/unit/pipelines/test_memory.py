"""What a step needs is estimated from below, and what cannot fit is refused with what to lower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines import memory
from pipelines.config import TrainSection
from pipelines.dataset import collate
from pipelines.errors import StageError
from pipelines.learner import HeadsLearner, JointLearner, Learner, shape_of
from pipelines.memory import Shape, free_bytes, require_memory, step_bytes
from pipelines.positions import Lane, PositionsReader
from pipelines.records import Answer
from pipelines.tuning import make_tunable
from tests.unit.medusa.tiny import random_heads, tiny_backbone

SHAPE = Shape(
    trainable=10**6, num_heads=5, head_layers=1, hidden_size=512, vocab_size=32000, layers=12, inner=2048, longest=100
)
ROWS = [Answer(id=str(n), prompt_id=str(n), prompt_ids=[3, 4], response_ids=[5 + n] * 60) for n in range(4)]


def learner(method: str) -> tuple[Learner, TrainSection]:
    backbone = tiny_backbone(vocab_size=64)
    heads = random_heads(backbone)
    train = TrainSection.model_validate(
        {"method": method, "batch_positions": 128, "sequence_length": 124, "zero_stage": 0}
    )
    if method == "medusa2":
        make_tunable(backbone, train)
        return JointLearner(heads, backbone, train, {0: [tuple(ROWS[:2])]}), train
    backbone.model.requires_grad_(False)
    return HeadsLearner(
        heads, backbone, train, {0: Lane(PositionsReader(backbone=backbone, num_heads=3), [tuple(ROWS)], seed=0)}
    ), train


@pytest.mark.parametrize("method", ["medusa1", "medusa2"])
def test_the_estimate_is_at_most_what_a_step_really_holds(method: str) -> None:
    """Against the tensors that autograd keeps for the backward pass, the gradients and AdamW's state."""
    made, train = learner(method)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    data = collate([tuple(ROWS[:2])], 3) if method == "medusa2" else made.micro_batches(0)[0].data
    weights = {w.untyped_storage().data_ptr() for w in made.module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, *_ = made.module(data, 1.0, *made.weights(0))
    loss.backward()
    trained = [w for group in made.groups.values() for w in group]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = sum(v.nbytes for one in optimizer.state.values() for v in one.values() if v.dim())
    gradients = sum(w.grad.nbytes for w in trained if w.grad is not None)
    chunk = 2 * 4 * made.backbone.vocab_size * train.chunk_size
    held = state + gradients + sum(size for at, size in kept.items() if at not in weights) + chunk
    estimate = step_bytes(train, shape_of(made, ROWS), world=1)
    assert held / 4 < estimate <= held


@pytest.mark.parametrize(
    ("method", "name", "larger"),
    [
        ("medusa1", "batch_positions", 4096),
        ("medusa1", "chunk_size", 1024),
        ("medusa2", "sequence_length", 4096),
        ("medusa2", "sequences_at_once", 2),
    ],
)
def test_what_is_to_be_lowered_makes_a_step_smaller(method: str, name: str, larger: int) -> None:
    train = TrainSection.model_validate({"method": method})
    more = train.model_copy(update={name: larger})
    assert step_bytes(more, SHAPE, world=1) > step_bytes(train, SHAPE, world=1)
    with pytest.raises(StageError, match=rf"train\.{name} \({larger}\)"):
        require_memory(more, SHAPE, free=step_bytes(train, SHAPE, world=1), world=1, here=1)


def test_zero_and_more_workers_divide_what_each_holds() -> None:
    sizes = [step_bytes(TrainSection.model_validate({"zero_stage": stage}), SHAPE, world=2) for stage in (0, 1, 2)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    train = TrainSection()
    assert step_bytes(train, SHAPE, world=4) < step_bytes(train, SHAPE, world=1)


def test_the_workers_of_a_node_share_its_memory() -> None:
    train = TrainSection()
    need = step_bytes(train, SHAPE, world=2)
    require_memory(train, SHAPE, free=2 * need, world=2, here=2)
    require_memory(train, SHAPE, free=None, world=2, here=2)
    with pytest.raises(StageError, match=r"each of 2 training workers.*lower train\.batch_positions") as caught:
        require_memory(train, SHAPE, free=2 * need - 1, world=2, here=2)
    assert "\n" not in str(caught.value)


def test_a_longer_row_counts_for_a_pack() -> None:
    train = TrainSection.model_validate({"method": "medusa2", "sequence_length": 64})
    assert step_bytes(train, replace(SHAPE, longest=640), world=1) > step_bytes(train, SHAPE, world=1)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert free > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(torch.device("cpu")) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert (free_bytes(torch.device("cpu")) or 0) > 2**20
