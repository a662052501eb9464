"""What a replica serves: the champion's heads on the configured backbone, an engine loop over them. Knows no Ray, no HTTP."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import medusa
from deploy.engine_loop import EngineLoop
from deploy.service import Service
from medusa.engine import Engine
from medusa.errors import CheckpointError
from medusa.generate import Model
from medusa.pretrained import pretrained_heads
from pipelines.config import Config
from pipelines.errors import NoSuchAlias
from pipelines.models import use_threads
from pipelines.registry import resolve

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HeadsOrigin:
    """Which heads are served: what `medusa.load` takes, and a word for it that clients see in `system_fingerprint`."""

    heads: str | None
    label: str


def choose_heads(config: Config) -> HeadsOrigin:
    """The version that bears `serve.alias`; without one, the heads that come with the backbone; without those, none.

    A registry or a version that is there but out of reach is an error, not a reason to serve something else.
    """
    if config.registry.tracking_uri is not None or config.layout.tracking_db.is_file():
        try:
            version = resolve(config)
        except NoSuchAlias as error:
            logger.warning("%s; until then the default heads are served", error)
        else:
            return HeadsOrigin(heads=str(version.folder), label=f"{config.serve.alias}-v{version.number}")
    else:
        logger.warning("no registry at %s: the default heads are served", config.layout.tracking_db)
    try:
        pretrained_heads(config.backbone.name)
    except CheckpointError as error:
        logger.warning("%s; answers are decoded plainly", error)
        return HeadsOrigin(heads=None, label="plain")
    return HeadsOrigin(heads="default", label="default")


def load_service(config: Config) -> Service:
    """A service whose loop has not been started. Raises BackboneError, CheckpointError, ValueError; registry errors."""
    use_threads(len(os.sched_getaffinity(0)), processes=1)
    origin = choose_heads(config)
    backbone = config.backbone
    model = medusa.load(backbone.name, heads=origin.heads, dtype=backbone.dtype, device=backbone.device)
    logger.info("serving %s with heads %s, a tree of %d nodes", backbone.name, origin.label, model.tree.num_nodes)
    return service_of(
        model,
        name=Path(backbone.name).name,
        label=origin.label,
        max_batch_size=config.serve.max_batch_size,
        context_length=min(config.serve.context_length, model.backbone.max_context),
    )


def service_of(model: Model, *, name: str, label: str, max_batch_size: int, context_length: int) -> Service:
    """The service over a loaded model."""

    def make_engine() -> Engine:
        return Engine(
            model.backbone, model.heads, tree=model.tree, max_batch_size=max_batch_size, context_length=context_length
        )

    loop = EngineLoop(make_engine, model.backbone.tokenizer)
    return Service(name=name, model=model, loop=loop, fingerprint=f"fp_{model.backbone.fingerprint}_{label}")
