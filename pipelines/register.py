"""An evaluated checkpoint becomes a version and the challenger. Knows folders and the registry; loads no model."""

from __future__ import annotations

from dataclasses import dataclass

from medusa.checkpoint import load_checkpoint
from pipelines.config import Config, dump_config
from pipelines.errors import StageError
from pipelines.registry import CHALLENGER, TAG_DIGEST, VERSION_FOLDER, folder_digest, open_registry
from pipelines.report import log_report, read_evaluation
from pipelines.stage import Progress, Step, ignore_progress, main

TAG_EVALUATION, TAG_BACKBONE = "medusa.evaluation", "medusa.backbone"


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
    """Register the working directory's checkpoint. The same checkpoint is never registered twice.

    Raises StageError where it was not evaluated as it is now, CheckpointError where it is damaged.
    """
    folder = config.layout.checkpoint
    if not folder.is_dir():
        raise StageError(f"no checkpoint at {folder}; run `train` first")
    checkpoint = load_checkpoint(folder)
    evaluation = read_evaluation(config.layout.evaluation)
    digest = folder_digest(folder)
    if evaluation.checkpoint_digest != digest:
        raise StageError(
            f"{folder} is not what was evaluated (digest {digest}, then {evaluation.checkpoint_digest}); run `evaluate`"
        )
    registry = open_registry(config)
    known = next((version for version in registry.versions() if version.tags.get(TAG_DIGEST) == digest), None)
    if known is not None:
        version = known
        registry.tag(known.number, {TAG_EVALUATION: evaluation.to_json()})
    else:
        run_id = registry.run_of(checkpoint.card, digest)
        source = registry.log_folder(run_id, folder, f"{VERSION_FOLDER}-{digest}")
        if config.layout.calibration.is_dir():
            registry.log_folder(run_id, config.layout.calibration, f"{config.layout.calibration.name}-{digest}")
        registry.log_text(run_id, dump_config(config), f"config-{digest}.yaml")
        tags = {
            TAG_DIGEST: digest,
            TAG_EVALUATION: evaluation.to_json(),
            TAG_BACKBONE: f"{checkpoint.backbone_name} {checkpoint.backbone_fingerprint}",
        }
        version = registry.add_version(run_id, source, tags)
    log_report(registry, version.run_id, config.layout.evaluation, evaluation)
    with registry.lock(config.promote.lock_timeout_s) as lease:
        lease.check()
        registry.set_alias(CHALLENGER, version.number)
    progress(Step(done=1, total=1, note=f"version {version.number}"))
    return RegisterResult(
        version=version.number, model_name=config.registry.model_name, run_id=version.run_id, created=known is None
    )


if __name__ == "__main__":
    main("register", run)
