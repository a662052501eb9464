"""What a cluster can give, and whether that is enough: asked before a stage takes it, so that nothing hangs in silence."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.nodes import alive, refuse_local_settings

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Need:
    """`count` shares of `each` (Ray's resource names → amounts), held at once. `lower` says which settings to lower."""

    what: str
    count: int
    each: Mapping[str, float]
    lower: str
    strategy: str = "PACK"

    def __str__(self) -> str:
        return f"{self.count} × {self.share}"

    @property
    def share(self) -> str:
        return _told(self.each)


def require(config: Config, need: Need) -> None:
    """Return once the cluster has what a stage will ask for: nothing waits in silence for what cannot come.

    What its nodes can never give is refused (StageError names what to lower), with `ray.wait_s` only after an autoscaler
    had that long to add nodes. What is in use by others is waited for, and told.
    """
    if _room(need) < need.count:
        _wait_for_nodes(config, need)
        refuse_local_settings(config)  # of the new nodes too
    _wait_until_free(need)


def _room(need: Need) -> int:
    return room_for(need, [node["Resources"] for node in alive()])


def _wait_for_nodes(config: Config, need: Need) -> None:
    from ray.autoscaler.sdk import request_resources

    began = told = time.monotonic()
    if config.ray.wait_s:
        logger.info("%s need %s, there is room for %d: waiting for nodes", need.what, need, _room(need))
        request_resources(bundles=[dict(need.each)] * need.count)
    try:
        while (room := _room(need)) < need.count:
            now = time.monotonic()
            if now - began >= config.ray.wait_s:
                waited = f" after {config.ray.wait_s:g} s (ray.wait_s)" if config.ray.wait_s else ""
                raise StageError(f"{need.what} need {need}; Ray has room for {room}{waited}; {_mend(need)}")
            if now - told >= _TELL_EVERY_S:
                logger.info("still waiting for nodes: %s need %s, there is room for %d", need.what, need, room)
                told = now
            time.sleep(0.5)
    finally:
        if config.ray.wait_s:
            request_resources(bundles=[])


def room_for(need: Need, nodes: list[Mapping[str, float]]) -> int:
    """How many of the shares fit on nodes of these resources, were they empty. Pure."""
    fits = [_fitting(need.each, node) for node in nodes]
    if need.strategy == "STRICT_PACK":
        return max(fits, default=0)
    if need.strategy == "STRICT_SPREAD":
        return sum(fit > 0 for fit in fits)
    return sum(fits)


def _fitting(each: Mapping[str, float], node: Mapping[str, float]) -> int:
    shares = [int(node.get(name, 0) / amount + 1e-6) for name, amount in each.items() if amount > 0]
    return min(shares, default=2**31)


def _mend(need: Need) -> str:
    if need.each.get("GPU") and not any(node["Resources"].get("GPU") for node in alive()):
        return "it has no GPU: add a node with one, or set what asks for GPUs to none"
    return f"lower {need.lower}, or add nodes (in-process Ray: raise ray.num_cpus)"


def _wait_until_free(need: Need) -> None:
    """Tell while others hold what is needed. Ray itself places the shares; this only watches the sum."""
    import ray

    told = time.monotonic() - _TELL_EVERY_S + 5  # what a stage before has just given back takes a moment to show
    while True:
        free = ray.available_resources()
        short = {
            name: amount * need.count
            for name, amount in need.each.items()
            if free.get(name, 0) < amount * need.count - 1e-6
        }
        if not short:
            return
        if time.monotonic() - told >= _TELL_EVERY_S:
            others = {name: free.get(name, 0.0) for name in short}
            logger.info("%s wait for %s; free are %s, the rest is in use", need.what, _told(short), _told(others))
            told = time.monotonic()
        time.sleep(0.5)


def _told(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())
