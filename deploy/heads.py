"""Which heads a replica serves: those of the alias, or what stands in for them. Knows the registry; no engine, no HTTP."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import medusa
from deploy.champion import RegistrySource
from medusa.checkpoint import load_checkpoint
from medusa.errors import BackboneError, CheckpointError
from medusa.generate import Model
from medusa.pretrained import pretrained_heads
from pipelines.config import BackboneSection, Config
from pipelines.credentials import without_credentials
from pipelines.registry import Version, tracking_uri

logger = logging.getLogger(__name__)

DEFAULT, PLAIN = "default", "plain"
STAND_INS = {DEFAULT: "the heads that come with the backbone", PLAIN: "the backbone without heads"}  # label → in words


@dataclass(frozen=True, kw_only=True)
class HeadsOrigin:
    """Where the heads that are served are from; `label` is the word for it that clients see in `system_fingerprint`.

    `version` is their number in the registry and `alias` what it was found by, None for heads that are not from there.
    `stands_in`: another version bears the alias and could not be served.
    """

    label: str
    version: int | None = None
    alias: str | None = None
    stands_in: bool = False

    @classmethod
    def of(cls, version: Version, alias: str, *, stands_in: bool = False) -> HeadsOrigin:
        return cls(label=f"{alias}-v{version.number}", version=version.number, alias=alias, stands_in=stands_in)


def first_model(config: Config) -> tuple[HeadsOrigin, Model]:
    """What a new replica begins with: the version that bears `serve.alias`; without one, the backbone's default.

    A version that is damaged, foreign or gone must not keep replicas from starting: then the latest earlier champion that
    loads is served, and where there is none, the default. A registry out of reach is an error, as is a backbone that
    cannot be loaded: MedusaError, ValueError.
    """
    source = RegistrySource(config, config.serve.alias)
    bearer = source.bearer()
    if bearer is None:
        said = "no version is %r in %s: the default heads are served until one is"
        logger.warning(said, config.serve.alias, without_credentials(tracking_uri(config)))
        return _default(config.backbone)
    try:
        version = source.fetch(bearer)
        assert version.folder is not None
        return HeadsOrigin.of(version, config.serve.alias), load_model(config.backbone, version.folder)
    except BackboneError:
        raise
    except Exception:
        logger.exception("version %d cannot be served; something else stands in for it", bearer.number)
    return _stand_in(source, config)


def _stand_in(source: RegistrySource, config: Config) -> tuple[HeadsOrigin, Model]:
    plain = load_model(config.backbone, None)
    for number in source.earlier():
        try:
            version = source.fetch(source.version(number))
            assert version.folder is not None
            model = successor(plain, config.backbone, version.folder)
        except Exception:
            logger.exception("version %d, a champion before it, cannot be served either", number)
        else:
            return HeadsOrigin.of(version, config.serve.alias, stands_in=True), model
    return _default(config.backbone, plain, stands_in=True)


def _default(
    backbone: BackboneSection, plain: Model | None = None, *, stands_in: bool = False
) -> tuple[HeadsOrigin, Model]:
    """The heads that come with a backbone; without those, or where its weights are not those they are for, none.

    `plain` is the backbone, if it is loaded.
    """
    try:
        heads = pretrained_heads(backbone.name)
        model = load_model(backbone, heads) if plain is None else successor(plain, backbone, heads)
    except CheckpointError as error:
        logger.warning("%s; answers are decoded plainly", error)
        return HeadsOrigin(label=PLAIN, stands_in=stands_in), plain or load_model(backbone, None)
    return HeadsOrigin(label=DEFAULT, stands_in=stands_in), model


def load_model(backbone: BackboneSection, heads: Path | None) -> Model:
    """Raises BackboneError, CheckpointError, ValueError."""
    return medusa.load(backbone.name, heads=heads, dtype=backbone.dtype, device=backbone.device)


def successor(model: Model, backbone: BackboneSection, heads: Path) -> Model:
    """The model with other heads, made while `model` goes on serving; it shares `model`'s backbone where that is the same.

    A tuned backbone (MEDUSA-2), before or after, means a second one in memory until the first has answered its last.
    Raises CheckpointError where the heads do not fit the backbone.
    """
    checkpoint = load_checkpoint(heads, backbone=model.backbone)
    tuned = model.checkpoint is not None and model.checkpoint.adapters is not None
    if tuned or checkpoint.adapters is not None:
        return load_model(backbone, heads)
    return Model(model.backbone, checkpoint.heads, checkpoint)
