"""Whether what is asked for fits, on clusters that are only described."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.capacity import Need, room_for
from pipelines.config import load_config
from pipelines.distill import actors_needed
from pipelines.errors import ConfigError
from pipelines.train import _workers, check


def _need(each: dict[str, float], strategy: str = "PACK", count: int = 1) -> Need:
    return Need(what="workers", count=count, each=each, lower="x", strategy=strategy)


def _fits(count: int, each: dict[str, float], nodes: list[dict[str, float]], strategy: str) -> bool:
    """The oracle: try every way of dealing `count` shares to the nodes."""
    for places in itertools.product(range(len(nodes)), repeat=count):
        loads = [places.count(place) for place in range(len(nodes))]
        if strategy == "STRICT_SPREAD" and max(loads) > 1:
            continue
        if strategy == "STRICT_PACK" and sum(load > 0 for load in loads) > 1:
            continue
        if all(
            load * each[name] <= node.get(name, 0) for load, node in zip(loads, nodes, strict=True) for name in each
        ):
            return True
    return False


@given(
    each=st.fixed_dictionaries({"CPU": st.sampled_from([0.5, 1.0, 2.0])}, optional={"GPU": st.just(1.0)}),
    nodes=st.lists(
        st.fixed_dictionaries({"CPU": st.sampled_from([0.0, 1.0, 2.5])}, optional={"GPU": st.sampled_from([1.0, 2.0])}),
        min_size=1, max_size=3,
    ),
    strategy=st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]),
)  # fmt: skip
def test_there_is_room_for_just_as_many_as_can_be_dealt_out(
    each: dict[str, float], nodes: list[dict[str, float]], strategy: str
) -> None:
    room = room_for(_need(each, strategy), list(nodes))
    for count in range(1, 5):
        assert (count <= room) == _fits(count, each, nodes, strategy)


def test_thirds_of_a_gpu_are_three() -> None:
    assert room_for(_need({"GPU": 1 / 3}), [{"GPU": 1.0}]) == 3
    assert room_for(_need({"GPU": 0.1}), [{"GPU": 1.0}]) == 10


def test_training_asks_for_its_workers_and_no_more_than_it_must() -> None:
    need = _workers(load_config(None, ["train.num_workers=4", "train.cpus_per_worker=2", "ray.placement=SPREAD"]))
    assert (need.count, need.each, need.strategy) == (4, {"CPU": 2}, "SPREAD")
    need = _workers(load_config(None, ["train.num_workers=2", "train.use_gpu=true"]))
    assert need.each == {"CPU": 1, "GPU": 1}
    elastic = ["train.num_workers=4", "ray.min_workers=2", "train.shards=12", "train.zero_stage=0"]
    assert _workers(load_config(None, elastic)).count == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["ray.min_workers=5"], r"ray.min_workers 5 must not be more than train.num_workers 4"),
        ([], r"train.shards must be a multiple of 12, .* got None"),
        (["train.shards=8"], r"train.shards must be a multiple of 12, .* got 8"),
        (["train.shards=12"], r"train.zero_stage must be 0, got 2"),
    ],
)
def test_workers_that_could_not_share_the_work_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(load_config(None, ["train.num_workers=4", "ray.min_workers=2", *overrides]))


def test_distillation_asks_for_no_more_actors_than_it_has_work_for() -> None:
    config = load_config(None, ["distill.num_actors=4"])
    assert [actors_needed(config, rows).count for rows in (1, 3, 4, 1000)] == [1, 3, 4, 4]
    assert actors_needed(config, 1).each == {"CPU": 0.5}
    assert actors_needed(load_config(None, ["distill.gpus_per_actor=0.5"]), 1).each == {"GPU": 0.5}
