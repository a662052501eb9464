"""One served model as the routes see it. Knows its name, its model and its loop; knows no HTTP but the 404 for another name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deploy.api.errors import ApiError
from deploy.api.protocol import ModelCard
from deploy.engine_loop import EngineLoop, Lane
from medusa.generate import Model


@dataclass(frozen=True, kw_only=True)
class Service:
    """One served model: the name clients ask for, the model that writes the prompt, the loop that answers it.

    `fingerprint` tells clients which weights answered (OpenAI's `system_fingerprint`). `lane` is the loop's engine for
    this very model, None for its newest. `status` is what `/health` tells beside "ok".
    """

    name: str
    model: Model
    loop: EngineLoop
    fingerprint: str
    lane: Lane | None = None
    status: Callable[[], dict[str, str]] = dict
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context_length(self) -> int:
        """Of the engine that answers, which need not be the loop's newest."""
        return self.loop.context_length if self.lane is None else self.lane.engine.context_length

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.context_length)

    def check_name(self, name: str) -> None:
        """ApiError for another model's name."""
        if name != self.name:
            said = f"no model {name!r} here; this server has {self.name!r}"
            raise ApiError(404, said, param="model", code="model_not_found")
