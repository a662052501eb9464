"""Follows an alias of the registry while serving: what bears it now is adopted beside what is served, off its threads.

Knows the registry and when to look; what adopting means is its owner's. A registry out of reach, or a version that does
not load, changes nothing but `problem`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from medusa.errors import MedusaError
from pipelines.config import Config
from pipelines.credentials import without_credentials
from pipelines.registry import CHAMPION, Registry, Version, has_registry, open_registry

logger = logging.getLogger(__name__)

MAX_PAUSE_S = 300.0


class Source(Protocol):
    """Where versions come from. Where the registry cannot be reached both raise MedusaError or OSError, or whatever a
    client of an object store raises."""

    def bearer(self) -> Version | None: ...

    def fetch(self, version: Version) -> Version: ...


class RegistrySource:
    """The version that bears `alias` in the registry of a configuration. A registry that is not there yet is empty."""

    def __init__(self, config: Config, alias: str) -> None:
        self._config = config
        self._alias = alias
        self._registry: Registry | None = None

    def bearer(self) -> Version | None:
        if not has_registry(self._config):
            return None
        self._registry = self._registry or open_registry(self._config)
        return self._registry.aliased(self._alias)

    def earlier(self) -> list[int]:
        """Numbers of those that bore the alias before its bearer, the latest first. Only champions are remembered."""
        if self._alias != CHAMPION or self._registry is None:
            return []
        *before, present = self._registry.champions() or [0]
        return [number for number in dict.fromkeys(reversed(before)) if number != present]

    def version(self, number: int) -> Version:
        assert self._registry is not None
        return self._registry.version(number)

    def fetch(self, version: Version) -> Version:
        assert self._registry is not None
        return self._registry.fetch(version)


class Follower:
    """Looks every `every_s` seconds, in a thread of its own, whether another version bears the alias; adopts it.

    `adopt` takes a fetched version; whatever it raises is logged with the version, which is then left alone until the
    alias names another. `serving` is the version that is served as the alias's; None where another's is, or none. While the
    registry is out of reach the pauses grow, to five minutes at most; it is told once.
    """

    def __init__(
        self, source: Source, adopt: Callable[[Version], None], *, serving: int | None, every_s: float
    ) -> None:
        self._source = source
        self._adopt = adopt
        self._every_s = every_s
        self._serving = serving
        self._refused: int | None = None
        self._refusal: str | None = None
        self._unreachable: str | None = None
        self.vacant = False  # no version bore the alias at the last look
        self._failures = 0
        self._looking = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="medusa-champion", daemon=True)

    def start(self) -> Follower:
        """Begin to look; with `every_s` 0, `look` is only ever called by others."""
        if self._every_s > 0:
            self._thread.start()
        return self

    def stop(self) -> None:
        """No look begins after this; one under way is not waited for."""
        self._stopped.set()

    @property
    def problem(self) -> str | None:
        """Why what is served may not be what bears the alias."""
        return self._refusal or self._unreachable

    @property
    def pause_s(self) -> float:
        """Until the next look."""
        return max(self._every_s, min(self._every_s * 2**self._failures, MAX_PAUSE_S))

    def look(self) -> None:
        """Look once, and adopt what is new. Never raises."""
        with self._looking:
            try:
                version = self._source.bearer()
                wanted = version is not None and version.number not in (self._serving, self._refused)
                fetched = self._source.fetch(version) if version is not None and wanted else None
            except Exception as error:  # noqa: BLE001 (it is told)
                self._out_of_reach(error)
                return
            self._in_reach(version)
            if fetched is not None and not self._stopped.is_set():
                self._take(fetched)

    def _take(self, version: Version) -> None:
        try:
            self._adopt(version)
        except Exception as error:
            logger.exception("version %d cannot be served; %s stays", version.number, self._serving or "what is served")
            said = without_credentials(str(error))
            self._refused, self._refusal = version.number, f"version {version.number} cannot be served: {said}"
        else:
            self._serving, self._refused, self._refusal = version.number, None, None

    def _out_of_reach(self, error: Exception) -> None:
        told = isinstance(error, (MedusaError, OSError))  # by a message that says what it is
        said = without_credentials(str(error) if told else f"{type(error).__name__}: {error}")
        if not self._failures:
            logger.warning("the registry cannot be followed; what is served stays: %s", said)
        self._failures += 1
        self._unreachable = f"the registry cannot be followed: {said}"

    def _in_reach(self, version: Version | None) -> None:
        if self._failures:
            logger.info("the registry is in reach again")
        self._failures, self._unreachable, self.vacant = 0, None, version is None
        if version is None or version.number != self._refused:
            self._refused = self._refusal = None  # the alias has left the version that could not be served

    def _run(self) -> None:
        while not self._stopped.wait(self.pause_s):
            self.look()
