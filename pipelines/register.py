"""An evaluated checkpoint becomes a version and the challenger. Knows folders and the registry; loads no model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from medusa.checkpoint import load_checkpoint
from pipelines import calibrate
from pipelines.config import Config, dump_config
from pipelines.credentials import without_credentials
from pipelines.errors import StageError
from pipelines.models import trained_heads
from pipelines.registry import CHALLENGER, VERSION_FOLDER, Registry, Version, folder_digest, open_registry
from pipelines.report import log_report, read_evaluation
from pipelines.stage import Progress, Step, ignore_progress, main
from pipelines.version_tags import TAG_BACKBONE, TAG_DIGEST, TAG_EVALUATION

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RegisterResult:
    """The version that the checkpoint is; `created` False where it had been registered before."""

    version: int
    model_name: str
    run_id: str
    created: bool

    @property
    def summary(self) -> str:
        how = "is" if self.created else "was already there and is"
        return f"version {self.version} of {self.model_name} {how} {CHALLENGER}"


def run(config: Config, progress: Progress = ignore_progress) -> RegisterResult:
    """Register the working directory's checkpoint. The same checkpoint is never registered twice, nor by two at once.

    Where it is a version already, what is stored of it is stored again if it was damaged there. Raises StageError where the
    checkpoint was not evaluated as it is now, CheckpointError where it is damaged.
    """
    folder = trained_heads(config)
    checkpoint = load_checkpoint(folder)
    evaluation = read_evaluation(config.layout.evaluation)
    digest = folder_digest(folder)
    if evaluation.checkpoint_digest != digest:
        raise StageError(
            f"{folder} is not what was evaluated (digest {digest}, then {evaluation.checkpoint_digest}); run `evaluate`"
        )
    registry = open_registry(config)
    known = _known(registry, digest)
    run_id = known.run_id if known else registry.run_of(checkpoint.card, digest)
    source = known.source if known else _upload(config, registry, run_id, digest)
    if known is not None:
        _mend(config, registry, known, digest)
    log_report(registry, run_id, config.layout.evaluation, evaluation)
    tags = {
        TAG_DIGEST: digest,
        TAG_EVALUATION: evaluation.to_json(),
        TAG_BACKBONE: f"{checkpoint.backbone_name} {checkpoint.backbone_fingerprint}",
    }
    with registry.lock(config.promote.lock_timeout_s) as lease:
        known = _known(registry, digest)  # somebody else may have registered it while we uploaded
        lease.check()
        if known is not None:
            registry.tag(known.number, {TAG_EVALUATION: tags[TAG_EVALUATION]})
        version = known or registry.add_version(run_id, source, tags)
        lease.check()
        registry.set_alias(CHALLENGER, version.number)
    progress(Step(done=1, total=1, note=f"version {version.number}"))
    return RegisterResult(
        version=version.number, model_name=config.registry.model_name, run_id=version.run_id, created=known is None
    )


def _known(registry: Registry, digest: str) -> Version | None:
    """The version that a checkpoint was registered as."""
    return next((version for version in registry.versions() if version.tags.get(TAG_DIGEST) == digest), None)


def _mend(config: Config, registry: Registry, version: Version, digest: str) -> None:
    """Store a version's checkpoint again where what is stored is not what was registered. StageError where that is in vain."""
    if registry.is_stored(version):
        return
    _upload(config, registry, version.run_id, digest)
    if not registry.is_stored(version):
        raise StageError(
            f"version {version.number} is damaged at {without_credentials(version.source)} and stays so when it is stored "
            "again; delete it there, then run `register` again"
        )
    logger.info("version %d was damaged where it is stored, and is stored again", version.number)


def _upload(config: Config, registry: Registry, run_id: str, digest: str) -> str:
    """Store the checkpoint, its calibration if there is one and the configuration with the run; the checkpoint's URI."""
    source = registry.log_folder(run_id, config.layout.checkpoint, f"{VERSION_FOLDER}-{digest}")
    if calibrate.is_current(config.layout):
        registry.log_folder(run_id, config.layout.calibration, f"{config.layout.calibration.name}-{digest}")
    registry.log_text(run_id, dump_config(config), f"config-{digest}.yaml")
    return source


if __name__ == "__main__":
    main("register", run)
