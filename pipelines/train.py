"""MEDUSA-1 and MEDUSA-2 on Ray Train with DeepSpeed: the driver. Knows workers, runs and folders; `train_loop` knows tensors.

The run is named after what determines it (backbone, heads, data, settings). Started again with the same configuration
it goes on from its last checkpoint, or returns at once what it had finished; with another, it is another run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medusa.checkpoint import load_checkpoint
from medusa.config import HeadsConfig
from medusa.errors import CheckpointError, MedusaError
from medusa.folders import whole_folder
from medusa.pretrained import NAMES, SUFFIXES, heads_folder
from pipelines.capacity import Need, require
from pipelines.cluster import ray_session
from pipelines.config import Config, TrainSection
from pipelines.credentials import one_line, without_credentials
from pipelines.errors import ConfigError, StageError
from pipelines.failures import meaning
from pipelines.folder_lock import alone_in, settled
from pipelines.inputs import weights_digest
from pipelines.memory import lower
from pipelines.records import TRAIN, Answers, read_answers
from pipelines.registry import Registry, folder_digest, open_registry, tracking_uri
from pipelines.stage import Progress, Step, ignore_progress, main, polled
from pipelines.tracking import JOURNAL, Journal, git_revision, mlflow_sender, within_reach
from pipelines.tuning import check_tuning
from pipelines.version_tags import TAG_DIGEST

logger = logging.getLogger(__name__)

TAG_CHECKPOINT = "medusa.checkpoint"  # of a run: the folder of its last checkpoint's heads

_SHAPES_THE_RUN = {
    "method", "init_from", "steps", "warmup_steps", "final_lr_share", "weight_decay", "max_grad_norm", "loss_decay", "dtype",
    "num_workers", "shards", "zero_stage", "holdout_share", "seed", "sequence_length",
}  # fmt: skip
_SHAPES_MEDUSA1 = {"batch_positions", "lr_heads", "soft_labels", "soft_weight"}
_SHAPES_MEDUSA2 = {
    "tune", "lora_rank", "lora_alpha", "lora_dropout", "batch_sequences", "sequences_at_once", "lr_backbone", "lr_ratio",
    "lambda0", "lambda0_schedule",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The checkpoint that a run made, and how good it is. `top1` is each head's held-out accuracy; empty: none held out."""

    checkpoint: Path
    run_name: str
    run_id: str
    steps: int
    top1: tuple[float, ...]
    top5: tuple[float, ...]

    @property
    def summary(self) -> str:
        accuracy = ", ".join(f"{value:.3f}" for value in self.top1) or "not measured"
        return f"{self.checkpoint} after {self.steps} steps; held-out top-1 of the heads: {accuracy}"


def run(config: Config, progress: Progress = ignore_progress) -> TrainResult:
    """Train the heads, or go on training them; one run at a time in a workdir. StageError, ConfigError, CheckpointError.

    Nothing is distilled into the workdir meanwhile: a worker that is started again reads the answers again.
    """
    check(config)
    _warn_of_emulation(config.train)
    shape = initial_shape(config)
    with settled(config.layout.distilled):
        return _run(config, read_answers(config.layout.distilled, TRAIN), shape, progress)


def _run(config: Config, answers: Answers, shape: HeadsConfig, progress: Progress) -> TrainResult:
    from pipelines.train_loop import HEADS, Assignment, describe, train_loop

    name = run_name(config, answers)
    with alone_in(config.layout.training), ray_session(config):
        tracked = _track(config, name, answers, shape)
        run_id = tracked[1] if tracked else ""
        task = Assignment(
            config=config.model_dump_json(),
            data=answers.fingerprint,
            run_id=run_id,
            tracking_uri=tracking_uri(config),
            card=describe(config, answers) | {"Run": {"name": name, "mlflow": run_id}},
        )

        def seen() -> Step:
            history = tracked[0].history(run_id, "loss") if tracked else []
            step, loss = history[-1] if history else (0, float("nan"))
            return Step(done=step, total=config.train.steps, note=f"steps, loss {loss:.3f}" if history else "steps")

        result = _finished(config, name)
        try:
            if result is None:
                with polled(seen, progress):
                    result = _fit(config, name, train_loop, task.as_dict())
                _check_ended(result)
            with result.checkpoint.as_directory() as folder:
                heads = Path(folder) / HEADS
                digest = folder_digest(heads)
                _put(heads, config.layout.checkpoint)
                _send_rest(Path(folder) / JOURNAL, config, tracked)
        except BaseException:
            _end(config, tracked, failed=True)
            raise
        _end(config, tracked, tags={TAG_CHECKPOINT: f"{result.checkpoint.path}/{HEADS}", TAG_DIGEST: digest})
    progress(Step(done=config.train.steps, total=config.train.steps, note="steps"))
    metrics = result.metrics
    num_heads = sum(key.startswith("top1_") for key in metrics) if metrics["held_out_positions"] else 0
    return TrainResult(
        checkpoint=config.layout.checkpoint,
        run_name=name,
        run_id=run_id,
        steps=metrics["step"],
        top1=tuple(metrics[f"top1_head{k}"] for k in range(1, num_heads + 1)),
        top5=tuple(metrics[f"top5_head{k}"] for k in range(1, num_heads + 1)),
    )


def check(config: Config) -> None:
    """ConfigError for settings that contradict each other, before anything is started."""
    _check_elastic(config)
    train = config.train
    if train.num_lanes % train.num_workers:
        raise ConfigError(f"train.shards {train.num_lanes} must be a multiple of train.num_workers {train.num_workers}")
    batch = "batch_positions" if train.method == "medusa1" else "batch_sequences"
    if getattr(train, batch) % train.num_lanes:
        raise ConfigError(f"train.{batch} {getattr(train, batch)} must be a multiple of train.shards {train.num_lanes}")
    if train.warmup_steps >= train.steps:
        raise ConfigError(
            f"train.warmup_steps {train.warmup_steps} must be less than train.steps {train.steps}; lower it, or take more steps"
        )
    if train.method == "medusa2" and train.soft_labels:
        raise ConfigError("train.soft_labels is for MEDUSA-1: set it to 0, or train.method to medusa1")
    if train.init_from not in (*SUFFIXES, "none"):
        start = Path(train.init_from)
        if not start.is_dir():
            raise ConfigError(f"train.init_from: no heads folder at {start}; give a checkpoint's folder, none, {NAMES}")
        if start.resolve() == config.layout.checkpoint.resolve():
            raise ConfigError(
                f"train.init_from {start} is where this run puts its own heads; copy the folder, or use another workdir"
            )
    check_tuning(train)


def _warn_of_emulation(train: TrainSection) -> None:
    from medusa.linear import multiplies_bfloat16

    if train.dtype == "bfloat16" and not train.use_gpu and not multiplies_bfloat16():
        logger.warning(
            "train.dtype is bfloat16, which this machine's processor has no arithmetic for: it is emulated, many times "
            "slower than train.dtype=float32"
        )


def initial_shape(config: Config) -> HeadsConfig:
    """The shape of the heads that training begins with. ConfigError where there are none, or where `heads` contradicts
    those that it goes on from."""
    init_from, asked = config.train.init_from, config.heads.asked
    if init_from == "none":
        return HeadsConfig(**asked)
    try:
        folder = heads_folder(init_from, config.backbone.name)
    except CheckpointError as error:
        raise ConfigError(f"{error}; to train fresh ones, set train.init_from=none") from None
    shape = load_checkpoint(folder).heads.config
    for name, value in asked.items():
        if value != (has := getattr(shape, name)):
            raise ConfigError(
                f"heads.{name} {value} is for fresh heads, those of train.init_from {init_from} have {has}: leave it out, or "
                "set train.init_from=none"
            )
    return shape


def run_name(config: Config, answers: Answers) -> str:
    """A name that two configurations share exactly when they describe the same run over the same data."""
    train = config.train
    shaping = _SHAPES_THE_RUN | (_SHAPES_MEDUSA1 if train.method == "medusa1" else _SHAPES_MEDUSA2)
    settings: dict[str, Any] = train.model_dump(mode="json", include=shaping)
    settings["shards"] = train.num_lanes
    if train.init_from == "none":
        settings["heads"] = asdict(HeadsConfig(**config.heads.asked))
    else:
        settings["init_from"] = folder_digest(heads_folder(train.init_from, config.backbone.name))
    described = json.dumps([config.backbone.name, answers.backbone, answers.fingerprint, settings], sort_keys=True)
    return f"heads-{hashlib.sha256(described.encode()).hexdigest()[:10]}"


def _track(config: Config, name: str, answers: Answers, shape: HeadsConfig) -> tuple[Registry, str] | None:
    """(registry, id of the run's one MLflow run); None, with a warning, where the server is out of reach."""
    settings = {
        "data": answers.fingerprint,
        "backbone": config.backbone.name,
        "backbone_fingerprint": answers.backbone,
        "git_revision": git_revision(),
        **{f"heads.{key}": value for key, value in asdict(shape).items()},
        **config.train.model_dump(mode="json"),
    }

    def begin() -> tuple[Registry, str]:
        registry = open_registry(config)
        return registry, registry.run_for(name, settings)

    return within_reach(begin, tracking_uri(config))


def _put(heads: Path, checkpoint: Path) -> None:
    """Make `checkpoint` these heads. Where it is whole and holds their weights it stays as it is: calibration may have given
    it a tree."""
    if weights_digest(checkpoint) == weights_digest(heads):
        try:
            load_checkpoint(checkpoint)
        except CheckpointError as error:
            logger.warning("the run's own checkpoint takes the place of a damaged one: %s", error)
        else:
            return
    with whole_folder(checkpoint) as made:
        shutil.copytree(heads, made, dirs_exist_ok=True)


def _send_rest(journal: Path, config: Config, tracked: tuple[Registry, str] | None) -> None:
    """Metrics that a worker could not send: now, or with the same command another day."""
    waiting = Journal.load(journal).waiting
    if not waiting:
        return

    def send(registry: Registry, run_id: str) -> bool:
        mlflow_sender(registry.tracking_uri, run_id)(waiting)
        return True

    if tracked and within_reach(lambda: send(*tracked), tracking_uri(config)):
        journal.unlink()
        logger.info("%d entries of metrics, kept while MLflow was away, are sent", len(waiting))
    else:
        logger.warning(
            "%d entries of metrics wait in %s; the same command sends them when MLflow at %s is back",
            len(waiting), journal, without_credentials(tracking_uri(config)),
        )  # fmt: skip


def _end(
    config: Config, tracked: tuple[Registry, str] | None, *, tags: Mapping[str, str] | None = None, failed: bool = False
) -> None:
    """Tell MLflow how the run ended. Never raises: that would undo a finished training, or hide why one failed."""
    from mlflow.exceptions import MlflowException

    if tracked is None:
        return
    registry, run_id = tracked

    def tell() -> None:
        registry.tag_run(run_id, tags or {})
        registry.end_run(run_id, failed=failed)

    try:
        within_reach(tell, tracking_uri(config))
    except (MlflowException, MedusaError, OSError) as error:
        logger.warning("run %s is not logged as ended: %s", run_id, one_line(error))


def _check_ended(result: Any) -> None:
    """StageError where the run diverged: why it stopped, and where it was last well."""
    why, checkpoint = result.return_value, result.checkpoint
    if not why:
        return
    if checkpoint is None:
        raise StageError(f"{why}; there is no earlier checkpoint")
    step = (result.metrics or {}).get("step")
    raise StageError(f"{why}; the last good checkpoint is that of step {step}: {checkpoint.path}")


def _finished(config: Config, name: str) -> Any | None:
    """Ray Train's result of a run that had reached its last step; None where there is work left."""
    from ray.train import Result

    try:
        result = Result.from_path(str(config.layout.training / name))
    except RuntimeError:  # no such run, or none that got as far as a checkpoint
        return None
    done = result.checkpoint is not None and (result.metrics or {}).get("finished")
    return result if done else None


def _fit(config: Config, name: str, loop: Any, task: dict[str, Any]) -> Any:
    """Run Ray Train to its end. It runs in a thread, since on the main one it would take Ctrl-C for itself for good."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    require(config, _workers(config))
    train, ray = config.train, config.ray
    # As dictionaries, since Ray shows type checkers the older classes, which lack half of these.
    scaling: dict[str, Any] = {
        "num_workers": train.num_workers if ray.min_workers is None else (ray.min_workers, train.num_workers),
        "use_gpu": train.use_gpu,
        "resources_per_worker": _resources(config),
        "placement_strategy": ray.placement,
        "elastic_resize_monitor_interval_s": ray.resize_every_s,
    }
    failures: dict[str, Any] = {
        "max_failures": train.max_failures,
        "max_preemption_failures": -1 if ray.max_preemptions is None else ray.max_preemptions,
    }
    trainer = TorchTrainer(
        loop,
        train_loop_config=task,
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=name,
            storage_path=str(config.layout.training),
            failure_config=FailureConfig(**failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except Exception as error:  # noqa: BLE001  raised again on the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if (error := outcome.get("error")) is not None:
        raise _told(error, train) from error
    return outcome["result"]


def _resources(config: Config) -> dict[str, float]:
    resources = {"CPU": config.train.cpus_per_worker}
    return resources | {"GPU": 1.0} if config.train.use_gpu else resources


def _check_elastic(config: Config) -> None:
    """ConfigError where some count of workers could not share the work."""
    train, fewest = config.train, config.ray.min_workers
    if fewest is None:
        return
    if fewest > train.num_workers:
        raise ConfigError(f"ray.min_workers {fewest} must not be more than train.num_workers {train.num_workers}")
    together = math.lcm(*range(fewest, train.num_workers + 1))
    if train.shards is None or train.shards % together:
        raise ConfigError(
            f"with ray.min_workers {fewest}, train.shards must be a multiple of {together}, so that any number of "
            f"workers up to {train.num_workers} shares them evenly; got {train.shards}"
        )
    if train.zero_stage:
        raise ConfigError(
            f"with ray.min_workers set, train.zero_stage must be 0, got {train.zero_stage}: DeepSpeed cannot load an "
            "optimizer's state that was split among another number of workers"
        )


def _workers(config: Config) -> Need:
    """What training holds of the cluster, at least."""
    return Need(
        what="training workers",
        count=config.ray.min_workers or config.train.num_workers,
        each=_resources(config),
        lower="train.num_workers or train.cpus_per_worker",
        strategy=config.ray.placement,
    )


def _told(error: Exception, train: TrainSection) -> Exception:
    """A worker's own complaint, if it was one that the user can mend; else the failure in one line."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            for told in (cause, getattr(cause, "cause", None)):
                if isinstance(told, MedusaError):
                    return StageError(str(told))
            cause = cause.__cause__
    text = "\n".join(map(str, failures or [error]))
    if (known := meaning(text, lower=f"{lower(train)}, or train.num_workers ({train.num_workers})")) is not None:
        return StageError(f"training failed: {known}; the same command goes on from the last checkpoint")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return StageError(
        f"training failed: {lines[-1] if lines else type(error).__name__} (the workers' logs are in Ray's session folder)"
    )


if __name__ == "__main__":
    main("train", run)
