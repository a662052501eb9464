"""What a replica holds: a model behind an engine loop, and the app in front of it. Knows no Ray.

A version is served through an app of its own. So a request that has begun keeps everything of its version to the end:
the tokenizer that wrote its prompt, the engine that answers it, the fingerprint that its client is told.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.api_keys import KeyRing
from deploy.champion import Follower, RegistrySource
from deploy.engine_loop import EngineLoop, Lane
from deploy.engines import EngineMaker
from deploy.heads import HeadsOrigin, first_model, successor
from deploy.metrics import Metrics
from deploy.outlets import Outlet
from deploy.service import Service
from pipelines.config import Config, ServeSection, reason_of
from pipelines.errors import ConfigError
from pipelines.models import use_threads
from pipelines.registry import Version

logger = logging.getLogger(__name__)

MakeApp = Callable[[Service, ServeSection, KeyRing], ASGIApp]
_FIXED = {
    "host": "the proxy listens, set it in http_options",
    "port": "the proxy listens, set it in http_options",
    "drain_s": "Ray Serve waits for answers, set the deployment's graceful_shutdown_timeout_s",
}
_OF_THE_ENGINE = ("max_batch_size", "context_length", "prefix_cache_tokens", "tree", "adaptive_tree", "cuda_graphs")
_OF_THE_KEYS = ("api_keys", "api_keys_file")


class ModelHost:
    """One model, its loop and its app; follows `serve.alias`. The methods may be called from any thread."""

    def __init__(self, config: Config, make_app: MakeApp, *, outlets: Sequence[Outlet] = ()) -> None:
        """Load and start. `outlets` get the metrics beside `/metrics`. Raises BackboneError, CheckpointError, KeyFileError,
        ValueError; registry errors."""
        use_threads(None, processes=1)
        self._config = config
        self._settings = config.serve
        self._keys = KeyRing.of(config.serve)
        self._make_app = make_app
        self._name = Path(config.backbone.name).name
        self._metrics = Metrics(self._name, outlets=outlets)
        self._maker: EngineMaker | None = None
        self._changing = threading.Lock()
        self._origin, self._model = first_model(config)
        self.loop = EngineLoop(
            self._new_maker(),
            self._model.backbone.tokenizer,
            metrics=self._metrics,
        )
        self.app = NewestApp(self._front(self.loop.lane))
        self._set_limits()
        self._follower = self._follow()
        self.loop.start()
        if self._origin.stands_in:
            self._follower.look()  # tries once more, and tells what is wrong as if it had come up now

    @property
    def version(self) -> str:
        """What new requests are answered with."""
        return self._origin.label

    def status(self) -> dict[str, str]:
        """What `/health` says beside that all is well: the version, and why it is not the one that it should be."""
        problem = self._follower.problem
        if problem is None and self._follower.vacant and self._origin.version is not None:
            problem = f"no version is {self._settings.alias!r}: {self.version} stays"
        return {"version": self.version} | ({"champion_error": problem} if problem else {})

    def adopt(self, version: Version, *, alias: str | None = None) -> None:
        """Serve a fetched version to new requests; those that run end on the one that they began with.

        Nothing happens where `alias`, by which it was found, is no longer the one that is followed. The version that is
        served already is only called by the alias that it now has.
        """
        assert version.folder is not None
        with self._changing:
            model, served = self._model, self._origin.version
        if version.number != served:
            model = successor(model, self._config.backbone, version.folder)
        with self._change():
            if alias not in (None, self._settings.alias):
                return
            stays = model is self._model
            self._model, self._origin = model, HeadsOrigin.of(version, self._settings.alias)
            self._serve(self.loop.lane if stays else self._new_lane())

    def reconfigure(self, given: Mapping[str, Any]) -> None:
        """Lay `given`, keys of the section `serve`, over the configuration; what they do not change goes on as it is.

        Another alias has been looked up when this returns. Raises ConfigError for keys or values that cannot be,
        KeyFileError.
        """
        settings, before = overlaid(self._config.serve, given), self._settings
        if settings == before:
            return
        with self._change():
            self._settings = settings
            if _differ(before, settings, _OF_THE_KEYS):  # else the keys stay, also while their file is bad
                self._keys = KeyRing.of(settings)
            self._serve(self._new_lane() if _differ(before, settings, _OF_THE_ENGINE) else self.loop.lane)
        if (before.alias, before.follow_s) != (settings.alias, settings.follow_s):
            self._follower.stop()
            self._follower = self._follow()
        if before.alias != settings.alias:
            self._follower.look()

    def stop(self) -> None:
        self._follower.stop()
        self.loop.stop()

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """One change at a time, whole or not at all."""
        with self._changing:
            before = self._settings, self._keys, self._model, self._origin, self._maker
            try:
                yield
            except BaseException:
                self._settings, self._keys, self._model, self._origin, self._maker = before
                raise

    def _new_maker(self) -> EngineMaker:
        """Of engines for the model and the settings as they are now."""
        costs = None if self._maker is None else self._maker.costs
        self._maker = EngineMaker(self._model, self._settings, costs=costs, on_step=self._metrics.step)
        return self._maker

    def _new_lane(self) -> Lane:
        return Lane(make_engine=self._new_maker(), tokenizer=self._model.backbone.tokenizer)

    def _serve(self, lane: Lane) -> None:
        """New requests get the model and the settings as they are now, from `lane`. The app, which can fail, comes first."""
        app = self._front(lane)
        self.loop.switch(lane)
        self._set_limits()
        self.app.newest = app

    def _set_limits(self) -> None:
        settings, admission = self._settings, self.loop.admission
        admission.max_waiting, admission.max_wait_s = settings.max_waiting, settings.max_wait_s
        self.loop.stall_after_s = settings.stall_after_s

    def _front(self, lane: Lane) -> ASGIApp:
        """An app over the model as it is now, answered by `lane`."""
        service = Service(
            name=self._name,
            model=self._model,
            loop=self.loop,
            lane=lane,
            fingerprint=f"fp_{self._model.backbone.fingerprint}_{self._origin.label}",
            status=self.status,
        )
        app = self._make_app(service, self._settings, self._keys)
        self._metrics.serving(self.version)
        logger.info(
            "serving %s with heads %s, a tree of %d nodes", service.name, self.version, self._model.tree.num_nodes
        )
        return app

    def _follow(self) -> Follower:
        alias, every_s = self._settings.alias, self._settings.follow_s
        adopt = functools.partial(self.adopt, alias=alias)
        serving = self._origin.version if self._origin.alias == alias else None
        return Follower(RegistrySource(self._config, alias), adopt, serving=serving, every_s=every_s).start()


class NewestApp:
    """ASGI: each request goes to the newest app, and stays with it."""

    def __init__(self, app: ASGIApp) -> None:
        self.newest = app

    @property
    def routes(self) -> Any:
        """Where Ray Serve reads the names of routes for its metrics."""
        return getattr(self.newest, "routes", [])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.newest(scope, receive, send)


def _differ(one: ServeSection, other: ServeSection, names: Sequence[str]) -> bool:
    return any(getattr(one, name) != getattr(other, name) for name in names)


def overlaid(section: ServeSection, given: Mapping[str, Any]) -> ServeSection:
    """`section` with some of its keys set anew. ConfigError names what cannot be set, or not in a running replica."""
    fixed = sorted(given.keys() & _FIXED.keys())
    if fixed:
        raise ConfigError(f"user_config cannot set serve.{fixed[0]}: {_FIXED[fixed[0]]}")
    try:
        return ServeSection.model_validate(section.model_dump() | dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"user_config: serve.{where}: {reason_of(first)}") from None
