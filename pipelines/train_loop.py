"""What one training worker does: MEDUSA-1 under DeepSpeed, the heads alone in the engine. Runs inside Ray Train.

    P positions of a step on this worker, K heads, D hidden
Reports a checkpoint every few steps: DeepSpeed's state to resume from (each rank its own part) and, from rank 0,
`heads/`, a folder that `medusa.load_checkpoint` reads.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from medusa.losses import medusa1_loss
from medusa.pretrained import pretrained_heads
from medusa.tree import Path as TreePath
from medusa.tree import Tree
from medusa.tree_search import HitTable, count_hits, grow_paths
from pipelines.config import Config
from pipelines.dataset import Positions, batch_indices, lane_rows, positions_of, split_rows
from pipelines.errors import ConfigError, StageError
from pipelines.models import heads_choice, use_threads
from pipelines.records import TRAIN, Answers, read_answers
from pipelines.registry import RunLog
from pipelines.zero import learning_rate, zero_config

logger = logging.getLogger(__name__)

HEADS = "heads"  # the finished folder inside a reported checkpoint
_HELD_OUT_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the driver tells each worker; plain values, so that Ray can carry it. `card` goes into the checkpoint."""

    config: str
    run_id: str
    tracking_uri: str
    card: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class HeadsModule(nn.Module):
    """What DeepSpeed trains: the heads, and nothing of the backbone, whose lm_head it only reads."""

    def __init__(self, heads: MedusaHeads, backbone: Backbone, *, decay: float, chunk_size: int) -> None:
        super().__init__()
        self.heads = heads
        # In a list, so that torch and DeepSpeed do not take it for one of the module's own tensors.
        self._lm_head = [backbone.lm_head_weight.detach().to(next(heads.parameters()).dtype)]
        self._transform, self._decay, self._chunk_size = backbone.transform, decay, chunk_size

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of hidden [P,D], targets [P,K]. Workers bring equally many positions: their mean is the mean over all."""
        return medusa1_loss(
            self.heads,
            hidden,
            targets,
            self._lm_head[0],
            transform=self._transform,
            decay=self._decay,
            denominator=len(hidden),
            chunk_size=self._chunk_size,
        ).loss


def train_loop(settings: dict[str, Any]) -> None:
    """The whole life of one worker. `settings` is an `Assignment` as a dictionary."""
    import ray.train

    task = Assignment(**settings)
    config = Config.model_validate_json(task.config)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    use_threads(config.train.threads, processes=world)

    answers = read_answers(config.layout.distilled, TRAIN)
    backbone = _load_backbone(config, answers)
    heads, paths = initial_heads(config, backbone)
    lanes, held_out = _gather(config, backbone, answers, heads.num_heads, rank, world)
    module = HeadsModule(heads, backbone, decay=config.train.loss_decay, chunk_size=config.train.chunk_size)
    engine = _deepspeed(config, module, world)
    start = _restore(engine)
    log = RunLog(task.tracking_uri, task.run_id) if rank == 0 else None
    worker = _Worker(config=config, task=task, engine=engine, heads=heads, backbone=backbone, paths=paths, log=log)

    for step in range(start, config.train.steps):
        loss = worker.step(step, lanes)
        done = step + 1
        if done % config.train.log_every == 0 or done == config.train.steps:
            worker.tell(done, loss)
        if done % config.train.checkpoint_every == 0 and done < config.train.steps:
            worker.report(done, {"step": done, "loss": loss})
    hits = _held_out_hits(heads, backbone, held_out, config, world)
    worker.finish(hits)


@dataclass(kw_only=True)
class _Worker:
    """One rank's engine and what it reports with."""

    config: Config
    task: Assignment
    engine: Any
    heads: MedusaHeads
    backbone: Backbone
    paths: list[TreePath]
    log: RunLog | None

    def step(self, step: int, lanes: dict[int, Positions]) -> float:
        """One optimizer step; the loss of the global batch before it."""
        train = self.config.train
        per_lane = train.batch_positions // self.num_lanes
        parts = [
            (lane.hidden[chosen], lane.targets[chosen])
            for number, lane in lanes.items()
            for chosen in [
                batch_indices(len(lane), per_lane, step, seed=train.seed * 1000 + number).to(lane.hidden.device)
            ]
        ]
        hidden, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        loss = self.engine(hidden, targets)
        self.engine.backward(loss)
        self.engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean) / dist.get_world_size()

    @property
    def num_lanes(self) -> int:
        return self.config.train.shards or self.config.train.num_workers

    def tell(self, done: int, loss: float) -> None:
        if self.log is not None:
            self.log.metrics({"loss": loss, "lr_heads": learning_rate(self.config.train, done - 1)}, step=done)

    def report(self, done: int, metrics: dict[str, Any], hits: HitTable | None = None) -> None:
        """Save and report a checkpoint; every rank takes part."""
        import ray.train

        with tempfile.TemporaryDirectory() as work:
            self.engine.save_checkpoint(work, tag=f"step-{done}", client_state={"step": done})
            self._save_heads(Path(work) / HEADS, done, hits)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(work))

    def finish(self, hits: HitTable) -> None:
        """The last checkpoint, with the held-out accuracy and the tree that it gives."""
        top = {f"top{n}_head{k + 1}": float(row[:n].sum()) for k, row in enumerate(hits.accuracy) for n in (1, 5)}
        if hits.counts.sum() and self.log is not None:
            self.log.metrics(top, step=self.config.train.steps)
        metrics = {"finished": True, "step": self.config.train.steps, "held_out_positions": int(hits.counts[0]), **top}
        self.report(self.config.train.steps, metrics, hits)

    def _save_heads(self, folder: Path, done: int, hits: HitTable | None) -> None:
        import deepspeed

        measured = hits is not None and bool(hits.counts.sum())
        accuracy = hits.accuracy if hits is not None and measured else None
        paths = self.paths if accuracy is None else grow_paths(accuracy, self.config.calibrate.max_nodes) or self.paths
        with deepspeed.zero.GatheredParameters(
            list(self.heads.parameters()), enabled=self.config.train.zero_stage == 3
        ):
            if self.log is None:  # rank 0 writes
                return
            card = self.task.card | {"Training": {**self.task.card.get("Training", {}), "steps done": done}}
            save_checkpoint(
                folder,
                self.heads,
                paths=paths,
                backbone_name=self.backbone.name,
                backbone_fingerprint=self.backbone.fingerprint,
                accuracy=accuracy,
                card=card,
            )


def initial_heads(config: Config, backbone: Backbone) -> tuple[MedusaHeads, list[TreePath]]:
    """The heads that training begins with, in the training dtype, and the paths that serve until a tree is measured."""
    dtype = getattr(torch, config.train.dtype)
    choice = heads_choice(config.train.init_from)
    if choice is not None:
        folder = pretrained_heads(backbone.name) if choice == "default" else Path(choice)
        checkpoint = load_checkpoint(folder, backbone=backbone, dtype=dtype)
        return checkpoint.heads.train(), list(checkpoint.paths)
    shape = HeadsConfig(**config.heads.model_dump())
    heads = MedusaHeads(
        shape,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        lm_head_weight=backbone.lm_head_weight,
        dtype=dtype,
        device=backbone.device,
    )
    return heads, list(Tree.chain(shape.num_heads).paths[1:])


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


def _gather(
    config: Config, backbone: Backbone, answers: Answers, num_heads: int, rank: int, world: int
) -> tuple[dict[int, Positions], Positions]:
    """This worker's lanes and its share of the held-out rows, as positions."""
    learn, held_out = split_rows(answers.rows, config.train.holdout_share)
    num_lanes = config.train.shards or world
    lanes = {
        lane: positions_of(backbone, lane_rows(learn, lane, num_lanes), num_heads)
        for lane in range(rank, num_lanes, world)
    }
    empty = [lane for lane, positions in lanes.items() if not len(positions)]
    if empty:
        raise StageError(
            f"{len(learn)} training rows are too few for {num_lanes} shards; distil more or lower train.shards"
        )
    return lanes, positions_of(backbone, lane_rows(held_out, rank, world), num_heads)


def _deepspeed(config: Config, module: HeadsModule, world: int) -> Any:
    if config.train.zero_stage == 3 and module.heads.config.lm_heads == "own":
        raise ConfigError("train.zero_stage 3 cannot split heads with their own lm_head; set it to 2")
    if not config.train.use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not config.train.use_gpu:
        # Otherwise DeepSpeed compiles a shared-memory all-reduce at first use, about 90 s with g++ and ninja.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.train.lr_heads, weight_decay=config.train.weight_decay)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameters,
        optimizer=optimizer,
        config=zero_config(config.train, num_workers=world, on_gpu=config.train.use_gpu),
        dist_init_required=False,
    )
    return engine


def _restore(engine: Any) -> int:
    """Load the run's latest checkpoint, if it has one; the number of steps already done."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        path, state = engine.load_checkpoint(folder)
    assert path is not None, f"no DeepSpeed state in {checkpoint}"
    return int(state["step"])


@torch.inference_mode()
def _held_out_hits(heads: MedusaHeads, backbone: Backbone, held_out: Positions, config: Config, world: int) -> HitTable:
    """Hits of the heads on all workers' held-out positions."""
    import deepspeed

    ranks = min(config.calibrate.num_ranks, heads.num_choices)
    reader = backbone.lm_head_for(heads.vocabulary)
    hits = torch.zeros(heads.num_heads, ranks, dtype=torch.long, device=backbone.device)
    counts = torch.zeros(heads.num_heads, dtype=torch.long, device=backbone.device)
    with deepspeed.zero.GatheredParameters(list(heads.parameters()), enabled=config.train.zero_stage == 3):
        for start in range(0, len(held_out), _HELD_OUT_ROWS):
            rows = slice(start, start + _HELD_OUT_ROWS)
            table = count_hits(heads.guesses(held_out.hidden[rows], reader, num_ranks=ranks), held_out.targets[rows])
            hits += table.hits
            counts += table.counts
    if world > 1:
        dist.all_reduce(hits)
        dist.all_reduce(counts)
    return HitTable(hits=hits.cpu(), counts=counts.cpu())


def describe(config: Config, answers: Answers) -> dict[str, Any]:
    """Card of the heads that this configuration makes: where they come from, in words and numbers."""
    learn, held_out = split_rows(answers.rows, config.train.holdout_share)
    return {
        "Origin": {"started from": config.train.init_from, "method": "MEDUSA-1 (arXiv 2401.10774), backbone frozen"},
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
