"""How many replicas the load wants. Knows counts of requests and slots; of Ray Serve only the shape of what it hands in.

Serve calls the policy in its controller several times a second, and scales when the answer has stood for its delays.
Each replica reports what its engine holds: a stream counts from its submission to its last token, and no longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RUNNING, WAITING, SLOTS = "running", "waiting", "slots"


@dataclass(frozen=True, kw_only=True)
class ReplicaLoad:
    """What one replica reported: requests with and without a slot, and its slots."""

    running: float
    waiting: float
    slots: float


def wanted_replicas(
    loads: Sequence[ReplicaLoad], *, queued: float, present: int, target_use: float, low_use: float
) -> int:
    """Replicas for these loads and `queued` requests that have reached none yet; `present` are decided on already.

    More, so that `target_use` of the slots are taken, where that is more than are present; fewer only when those that
    stay would use no more than `low_use` of theirs. Between the two nothing moves, so a steady load never flaps.
    """
    if not loads:
        return present
    slots = sum(load.slots for load in loads) / len(loads)
    requests = queued + sum(load.running + load.waiting for load in loads)
    up, down = (math.ceil(requests / (slots * use)) for use in (target_use, low_use))
    return max(up, min(down, present), 1)


class SlotUsePolicy:
    """`AutoscalingPolicy(policy_function="deploy.autoscaling:SlotUsePolicy", policy_kwargs={…})`.

    A replica that has not reported yet, since it is new, counts as empty and as large as the others.
    """

    def __init__(self, *, target_use: float = 0.75, low_use: float = 0.5) -> None:
        if not 0 < low_use <= target_use <= 1:
            raise ValueError(
                f"0 < low_use <= target_use <= 1 must hold, got low_use {low_use}, target_use {target_use}"
            )
        self._target_use = target_use
        self._low_use = low_use

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """ray.serve's AutoscalingContext → replicas and no state; bounds, factors and delays are applied by Serve."""
        wanted = wanted_replicas(
            _loads(context),
            queued=context.total_queued_requests or 0.0,
            present=context.target_num_replicas,
            target_use=self._target_use,
            low_use=self._low_use,
        )
        return wanted, {}


def _loads(context: Any) -> list[ReplicaLoad]:
    """The newest report of each replica that runs. Serve's own averages lag by their window; its delays suffice."""
    reports = context.raw_metrics or {}
    series = [reports.get(name, {}) for name in (RUNNING, WAITING, SLOTS)]
    newest = [
        [each[replica][-1].value for each in series]
        for replica in context.running_replicas
        if all(each.get(replica) for each in series)
    ]
    return [ReplicaLoad(running=running, waiting=waiting, slots=slots) for running, waiting, slots in newest]
