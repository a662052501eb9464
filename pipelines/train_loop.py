"""What one training worker does: MEDUSA-1 or MEDUSA-2 under DeepSpeed. Runs inside Ray Train.

Reports a checkpoint every few steps: DeepSpeed's state to resume from (each rank its own part) and, from rank 0,
`heads/`, a folder that `medusa.load_checkpoint` reads, and the metrics that have not reached MLflow yet.
"""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from medusa.adapters import Adapters
from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from medusa.pretrained import heads_folder
from medusa.tree import Path as TreePath
from medusa.tree import Tree
from medusa.tree_search import HitTable, grow_paths
from pipelines.config import Config
from pipelines.dataset import lane_rows, num_positions, pack_rows, split_rows
from pipelines.engine import StepReport, TrainEngine
from pipelines.errors import ConfigError, StageError
from pipelines.hidden_cache import GB, cache_key, kept_on_disk, make_room
from pipelines.learner import HeadsLearner, JointLearner, Learner, lane_seed, shape_of
from pipelines.memory import free_bytes, require_memory
from pipelines.models import heads_choice, use_threads
from pipelines.positions import Lane, PositionsReader
from pipelines.records import TRAIN, Answer, Answers, read_answers
from pipelines.tracking import JOURNAL, Journal, Sender, mlflow_sender
from pipelines.tuning import make_tunable, start_from
from pipelines.watch import Diverged, Watch

logger = logging.getLogger(__name__)

HEADS = "heads"  # the finished folder inside a reported checkpoint


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the driver tells each worker; plain values, so that Ray can carry it. `card` goes into the checkpoint.

    `data` is the fingerprint of the answers that the run is named after. `run_id` is empty where MLflow was out of reach.
    """

    config: str
    data: str
    run_id: str
    tracking_uri: str
    card: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train_loop(settings: dict[str, Any]) -> str | None:
    """The whole life of one worker. `settings` is an `Assignment` as a dictionary.

    Returns why the run cannot go on, where it diverged: raised, it would be tried again, to end the same.
    """
    import ray.train

    task = Assignment(**settings)
    config = Config.model_validate_json(task.config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    use_threads(config.train.threads, processes=world)

    answers = _answers(config, task)
    backbone = _load_backbone(config, answers)
    learn, held_out = split_rows(answers.rows, config.train.holdout_share)
    learner, paths = make_learner(config, backbone, learn, data=answers.fingerprint, rank=rank, world=world)
    here = context.get_local_world_size()
    require_memory(config.train, shape_of(learner, learn), free=free_bytes(backbone.device), world=world, here=here)
    engine = TrainEngine(learner, config.train)
    worker = Worker(config=config, task=task, engine=engine, paths=paths)
    try:
        for step in range(worker.resume(), config.train.steps):
            worker.step(step)
        worker.finish(engine.held_out_hits(held_out, config.calibrate.num_ranks))
    except Diverged as error:  # on every rank at the same step
        return str(error)
    finally:
        worker.close()
    return None


class Worker:
    """One rank's engine, what it watches and what it reports."""

    def __init__(self, *, config: Config, task: Assignment, engine: TrainEngine, paths: list[TreePath]) -> None:
        self.config, self.task, self.engine, self.paths = config, task, engine, paths
        self.watch = Watch(ratio=config.train.divergence_ratio)
        self.journal = Journal()
        self._sender: Sender | None = None

    def resume(self) -> int:
        """Go on from the run's latest checkpoint, if it has one; the number of steps already done."""
        import ray.train

        done = 0
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                state = self.engine.restore(Path(folder))
                self.journal = Journal.load(Path(folder) / JOURNAL)
            done = int(state["step"])
            self.watch.load(state["watch"])
        if self.engine.rank == 0 and self.task.run_id:
            send = mlflow_sender(self.task.tracking_uri, self.task.run_id)
            self._sender = Sender(self.journal, send, where=self.task.tracking_uri)
        return done

    def step(self, step: int) -> None:
        """One step, and what is due after it. Raises Diverged."""
        found = self.engine.step(step)
        done, train = step + 1, self.config.train
        last = done == train.steps
        if self.engine.rank == 0 and (done % train.log_every == 0 or last):
            self.journal.add(done, found.metrics)
        self.watch.see(done, _watched(found), found.broken_ranks)
        if done % train.checkpoint_every == 0 and not last:
            self.report(done, {"step": done, "loss": found.loss})

    def report(self, done: int, metrics: dict[str, Any], hits: HitTable | None = None) -> None:
        """Save and report a checkpoint; every rank takes part."""
        import ray.train

        with tempfile.TemporaryDirectory() as work:
            self.engine.save(Path(work), {"step": done, "watch": self.watch.state()})
            self._save_heads(Path(work) / HEADS, done, hits)
            if self.engine.rank == 0:
                self.journal.save(Path(work) / JOURNAL)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(work))

    def finish(self, hits: HitTable) -> None:
        """The last checkpoint, with the held-out accuracy and the tree that it gives."""
        steps = self.config.train.steps
        top = {f"top{n}_head{k + 1}": float(row[:n].sum()) for k, row in enumerate(hits.accuracy) for n in (1, 5)}
        if hits.counts.sum() and self.engine.rank == 0:
            self.journal.add(steps, top)
        self.close()
        metrics = {"finished": True, "step": steps, "held_out_positions": int(hits.counts[0]), **top}
        self.report(steps, metrics, hits)

    def close(self) -> None:
        if self._sender is not None:
            sender, self._sender = self._sender, None
            if left := sender.close():
                logger.warning("%d entries of metrics wait in the run's checkpoint for MLflow to come back", left)

    def _save_heads(self, folder: Path, done: int, hits: HitTable | None) -> None:
        learner = self.engine.learner
        measured = hits is not None and bool(hits.counts.sum())
        grown = grow_paths(hits.accuracy, self.config.calibrate.max_nodes) if hits is not None and measured else []
        with self.engine.whole():
            if self.engine.rank:
                return
            card = self.task.card | {"Training": {**self.task.card.get("Training", {}), "steps done": done}}
            save_checkpoint(
                folder,
                learner.heads,
                paths=grown or self.paths,
                backbone_name=learner.backbone.name,
                backbone_fingerprint=learner.backbone.fingerprint,
                accuracy=hits.accuracy if hits is not None and grown else None,  # of heads that were right at all
                adapters=learner.adapters(),
                card=card,
            )


def _watched(found: StepReport) -> dict[str, float]:
    heads = {"the heads' mean loss": sum(found.per_head) / len(found.per_head)}
    return heads if found.lm is None else heads | {"the backbone's loss": found.lm}


def make_learner(
    config: Config, backbone: Backbone, rows: list[Answer], *, data: str, rank: int, world: int
) -> tuple[Learner, list[TreePath]]:
    """What this worker trains, over its lanes of `rows`, and the tree's paths until one is measured."""
    train = config.train
    lanes = {lane: lane_rows(rows, lane, train.num_lanes) for lane in range(rank, train.num_lanes, world)}
    if any(not any(map(num_positions, mine)) for mine in lanes.values()):
        raise StageError(
            f"{len(rows)} training rows are too few for {train.num_lanes} shards; distil more or lower train.shards"
        )
    learner: Learner
    heads, paths, adapters = initial_heads(config, backbone)
    if train.method == "medusa2":
        make_tunable(backbone, train)
        if adapters is not None:
            start_from(backbone, adapters, train)
        packs = {
            lane: pack_rows([row for row in mine if row.response_ids], train.sequence_length)
            for lane, mine in lanes.items()
        }
        learner = JointLearner(heads, backbone, train, packs)
    else:
        reader = PositionsReader(backbone=backbone, num_heads=heads.num_heads, ranks=train.soft_labels)
        learner = HeadsLearner(
            heads, backbone, train, position_lanes(config, reader, rows, lanes, data=data, rank=rank)
        )
    return learner, paths


def position_lanes(
    config: Config,
    reader: PositionsReader,
    rows: list[Answer],
    lanes: dict[int, list[Answer]],
    *,
    data: str,
    rank: int,
) -> dict[int, Lane]:
    """The lanes of MEDUSA-1: all positions on disk where those of all rows fit the quota, else computed when needed."""
    train, root = config.train, config.layout.hidden
    packs = {
        lane: pack_rows([row for row in mine if num_positions(row)], train.sequence_length)
        for lane, mine in lanes.items()
    }
    num_bytes = sum(map(num_positions, rows)) * reader.bytes_per_position
    keep = num_bytes <= train.cache_quota_gb * GB
    key = cache_key(
        reader.backbone.fingerprint, data, reader.backbone.dtype, reader.num_heads, reader.ranks,
        train.holdout_share, train.sequence_length, train.num_lanes,
    )  # fmt: skip
    if rank == 0 and keep:
        make_room(root, key, num_bytes=num_bytes, quota_gb=train.cache_quota_gb)
    if rank == 0 and not keep:
        logger.info(
            "hidden states need %.2g GB, above train.cache_quota_gb %g: they are computed again each epoch",
            num_bytes / GB, train.cache_quota_gb,
        )  # fmt: skip
    found = {}
    for lane, mine in packs.items():
        kept = None
        if keep:
            stem = root / key / f"lane-{lane}-of-{train.num_lanes}"
            total = sum(num_positions(row) for pack in mine for row in pack)
            kept = kept_on_disk(stem, reader.read(mine), reader.empty(), total)
        found[lane] = Lane(reader, mine, seed=lane_seed(train, lane), kept=kept)
    return found


def initial_heads(config: Config, backbone: Backbone) -> tuple[MedusaHeads, list[TreePath], Adapters | None]:
    """The heads that training begins with, in the training dtype, the paths that serve until a tree is measured, and
    what was changed in the backbone with those heads: MEDUSA-2 goes on from it, MEDUSA-1 cannot."""
    dtype = getattr(torch, config.train.dtype)
    choice = heads_choice(config.train.init_from)
    if choice is not None:
        folder = heads_folder(choice, backbone.name)
        checkpoint = load_checkpoint(folder, backbone=backbone, dtype=dtype)
        if checkpoint.adapters is not None and config.train.method == "medusa1":
            raise ConfigError(
                f"{folder} holds heads of a tuned backbone (MEDUSA-2); train.method medusa1 needs heads of the original"
            )
        return checkpoint.heads.train(), list(checkpoint.paths), checkpoint.adapters
    shape = HeadsConfig(**config.heads.asked)
    heads = MedusaHeads(
        shape,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        lm_head_weight=backbone.lm_head_weight,
        dtype=dtype,
        device=backbone.device,
    )
    return heads, list(Tree.chain(shape.num_heads).paths[1:]), None


def _answers(config: Config, task: Assignment) -> Answers:
    answers = read_answers(config.layout.distilled, TRAIN)
    if answers.fingerprint != task.data:
        raise StageError(
            f"the answers in {config.layout.distilled} were {task.data} when this run began and are {answers.fingerprint}: "
            "`distill` changed them; run `train` again, which begins a run over what is there now"
        )
    return answers


def _load_backbone(config: Config, answers: Answers) -> Backbone:
    device = "cuda" if config.train.use_gpu else config.backbone.device
    backbone = load_backbone(config.backbone.name, dtype=config.train.dtype, device=device, fused=False)
    backbone.model.requires_grad_(False)
    if backbone.fingerprint != answers.backbone:
        raise StageError(
            f"the answers in {config.layout.distilled} were written by backbone {answers.backbone}, "
            f"{backbone.name} is {backbone.fingerprint}; distil again into another workdir"
        )
    return backbone


def describe(config: Config, answers: Answers) -> dict[str, Any]:
    """Card of the heads that this configuration makes: where they come from, in words and numbers."""
    learn, held_out = split_rows(answers.rows, config.train.holdout_share)
    method = {
        "medusa1": "MEDUSA-1 (arXiv 2401.10774), backbone frozen",
        "medusa2": f"MEDUSA-2 (arXiv 2401.10774), backbone tuned by {config.train.tune}",
    }
    return {
        "Origin": {"started from": config.train.init_from, "method": method[config.train.method]},
        "Data": {
            "written by": f"{config.backbone.name} ({answers.backbone})",
            "sampling": json.loads(answers.sampling),
            "fingerprint": answers.fingerprint,
            "rows": len(learn),
            "held-out rows": len(held_out),
            "tokens": answers.num_tokens,
        },
        "Training": {name: value for name, value in config.train.model_dump().items() if name != "init_from"},
    }
