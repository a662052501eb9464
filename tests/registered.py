"""What serving would take from a registry."""

from __future__ import annotations

from pipelines.config import Config
from pipelines.registry import CHAMPION, Version, open_registry


def champion_of(config: Config) -> Version | None:
    """The champion, if there is one, with its folder on this machine."""
    registry = open_registry(config)
    bearer = registry.aliased(CHAMPION)
    return None if bearer is None else registry.fetch(bearer)
