"""The number of replicas is a function of the load: enough, not too many, and still where the load is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from deploy import serve
from deploy.autoscaling import RUNNING, SLOTS, WAITING, ReplicaLoad, SlotUsePolicy, wanted_replicas

SLOTS_EACH = 8


def wanted(requests: list[int], *, queued: float = 0, present: int | None = None) -> int:
    """Requests on each replica of 8 slots; what exceeds its slots waits."""
    loads = [
        ReplicaLoad(running=min(n, SLOTS_EACH), waiting=max(n - SLOTS_EACH, 0), slots=SLOTS_EACH) for n in requests
    ]
    return wanted_replicas(
        loads, queued=queued, present=len(requests) if present is None else present, target_use=0.75, low_use=0.5
    )


@pytest.mark.parametrize(
    ("requests", "replicas"),
    [
        ([0], 1),
        ([6], 1),  # three quarters of 8 slots: as wished
        ([7], 2),
        ([8 + 64], 12),  # what waits counts as what runs
        ([6, 6, 6], 3),
        ([5, 5, 5], 3),  # two could hold 15 of 16, but would have to grow again at once
        ([2, 3, 3], 2),
        ([0, 0, 0], 1),
    ],
)
def test_replicas_for_a_load(requests: list[int], replicas: int) -> None:
    assert wanted(requests) == replicas


def test_what_has_reached_no_replica_counts_too() -> None:
    assert wanted([6], queued=6) == 2


def test_replicas_that_are_starting_are_not_asked_for_again() -> None:
    assert wanted([18], present=3) == 3


def test_nothing_moves_before_the_first_report() -> None:
    assert wanted([], present=3) == 3


@given(st.lists(st.integers(0, 80), min_size=1, max_size=12))
def test_a_steady_load_settles_in_one_move(requests: list[int]) -> None:
    """Spread over the replicas that were asked for, the same load asks for no other number."""
    first = wanted(requests)
    share, rest = divmod(sum(requests), first)
    spread = [share + (replica < rest) for replica in range(first)]
    assert wanted(spread) == first


@given(st.lists(st.integers(0, 80), min_size=1, max_size=12), st.integers(0, 11))
def test_more_load_never_asks_for_fewer(requests: list[int], where: int) -> None:
    more = [n + (i == where % len(requests)) for i, n in enumerate(requests)]
    assert wanted(more) >= wanted(requests)


def context(reports: dict[str, dict[str, list[float]]], *, present: int, queued: float = 0) -> Any:
    """What Serve hands in: a series of points for each metric and replica, the newest last."""
    raw = {
        name: {
            replica: [SimpleNamespace(timestamp=i, value=v) for i, v in enumerate(points)]
            for replica, points in by.items()
        }
        for name, by in reports.items()
    }
    return SimpleNamespace(
        raw_metrics=raw,
        running_replicas=["a", "b"],
        target_num_replicas=present,
        total_queued_requests=queued,
    )


def test_the_policy_reads_each_replicas_newest_report() -> None:
    reports = {
        RUNNING: {"a": [0.0, 8.0], "b": [8.0, 4.0], "gone": [8.0]},
        WAITING: {"a": [0.0, 6.0], "b": [9.0, 0.0], "gone": [99.0]},
        SLOTS: {"a": [8.0, 8.0], "b": [8.0, 8.0], "gone": [8.0]},
    }
    assert SlotUsePolicy()(context(reports, present=2)) == (3, {})


def test_the_policy_waits_for_reports_and_skips_replicas_without() -> None:
    assert SlotUsePolicy()(context({}, present=2)) == (2, {})
    new = {RUNNING: {"a": [1.0]}, WAITING: {"a": [0.0]}, SLOTS: {"a": [8.0]}}
    assert SlotUsePolicy()(context(new, present=2)) == (1, {})


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low_use 0\.9"):
        SlotUsePolicy(target_use=0.5, low_use=0.9)


def test_ray_serve_can_build_the_policy_from_the_configuration() -> None:
    policy = AutoscalingConfig(**serve.AUTOSCALING).policy
    assert isinstance(policy, AutoscalingPolicy)
    assert policy.get_policy().__name__ == "SlotUsePolicy"
    assert policy.get_policy()(**policy.policy_kwargs)(context({}, present=2)) == (2, {})
