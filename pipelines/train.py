"""MEDUSA-1 on Ray Train with DeepSpeed: the driver. Knows workers, runs and folders; `train_loop` knows tensors.

The run is named after what determines it (backbone, heads, data, settings). Started again with the same configuration
it goes on from its last checkpoint, or returns at once what it had finished; with another, it is another run.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.errors import MedusaError
from pipelines.capacity import Need, require
from pipelines.cluster import ray_session
from pipelines.config import Config
from pipelines.errors import ConfigError, StageError
from pipelines.records import TRAIN, Answers, read_answers
from pipelines.registry import folder_digest, open_registry, replace_folder
from pipelines.stage import Progress, Step, ignore_progress, main, polled

_SHAPES_THE_RUN = {
    "init_from", "steps", "batch_positions", "lr_heads", "warmup_steps", "final_lr_share", "weight_decay", "max_grad_norm",
    "loss_decay", "dtype", "num_workers", "shards", "zero_stage", "holdout_share", "seed",
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
    """Train the heads, or go on training them. Raises StageError, ConfigError, CheckpointError."""
    from pipelines.train_loop import HEADS, Assignment, describe, train_loop

    check(config)
    answers = read_answers(config.layout.distilled, TRAIN)
    name = run_name(config, answers)
    with ray_session(config):
        registry = open_registry(config)
        run_id = registry.run_for(name, {"data": answers.fingerprint, **config.train.model_dump(mode="json")})
        task = Assignment(
            config=config.model_dump_json(),
            run_id=run_id,
            tracking_uri=registry.tracking_uri,
            card=describe(config, answers) | {"Run": {"name": name, "mlflow": run_id}},
        )

        def seen() -> Step:
            history = registry.history(run_id, "loss")
            step, loss = history[-1] if history else (0, float("nan"))
            return Step(done=step, total=config.train.steps, note=f"steps, loss {loss:.3f}" if history else "steps")

        result = _finished(config, name)
        try:
            if result is None:
                with polled(seen, progress):
                    result = _fit(config, name, train_loop, task.as_dict())
        except BaseException:
            registry.end_run(run_id, failed=True)
            raise
        with result.checkpoint.as_directory() as folder:
            replace_folder(Path(folder) / HEADS, config.layout.checkpoint)
        registry.end_run(run_id)
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
    train = config.train
    shards = train.shards or train.num_workers
    if shards % train.num_workers:
        raise ConfigError(f"train.shards {shards} must be a multiple of train.num_workers {train.num_workers}")
    if train.batch_positions % shards:
        raise ConfigError(f"train.batch_positions {train.batch_positions} must be a multiple of train.shards {shards}")
    if train.warmup_steps >= train.steps:
        raise ConfigError(f"train.warmup_steps {train.warmup_steps} must be less than train.steps {train.steps}")
    if train.init_from not in ("default", "none") and not Path(train.init_from).is_dir():
        raise ConfigError(f'train.init_from: no heads folder at {train.init_from}; give a folder, "default" or "none"')


def run_name(config: Config, answers: Answers) -> str:
    """A name that two configurations share exactly when they describe the same run over the same data."""
    settings: dict[str, Any] = config.train.model_dump(mode="json", include=_SHAPES_THE_RUN)
    settings["shards"] = settings["shards"] or settings["num_workers"]
    if config.train.init_from == "none":
        settings["heads"] = config.heads.model_dump(mode="json")
    elif config.train.init_from != "default":
        settings["init_from"] = folder_digest(Path(config.train.init_from))
    described = json.dumps([config.backbone.name, answers.backbone, answers.fingerprint, settings], sort_keys=True)
    return f"heads-{hashlib.sha256(described.encode()).hexdigest()[:10]}"


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
        raise _told(error) from error
    return outcome["result"]


def _resources(config: Config) -> dict[str, float]:
    resources = {"CPU": config.train.cpus_per_worker}
    return resources | {"GPU": 1.0} if config.train.use_gpu else resources


def _workers(config: Config) -> Need:
    """What training holds of the cluster, at least. Raises ConfigError where a count of workers could not share the work."""
    train, fewest = config.train, config.ray.min_workers
    if fewest is not None:
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
    return Need(
        what="training workers",
        count=fewest or train.num_workers,
        each=_resources(config),
        lower="train.num_workers or train.cpus_per_worker",
        strategy=config.ray.placement,
    )


def _told(error: Exception) -> Exception:
    """A worker's own complaint, if it was one that the user can mend; else the failure in one line."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            for told in (cause, getattr(cause, "cause", None)):
                if isinstance(told, MedusaError):
                    return StageError(str(told))
            cause = cause.__cause__
    lines = [line.strip() for failure in failures or [error] for line in str(failure).splitlines() if line.strip()]
    return StageError(
        f"training failed: {lines[-1] if lines else type(error).__name__} (the workers' logs are in Ray's session folder)"
    )


if __name__ == "__main__":
    main("train", run)
