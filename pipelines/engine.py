"""One worker's DeepSpeed engine: a step, its state, whole weights. Knows a process group and a learner; knows no Ray.

W workers, K heads
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medusa.tree_search import HitTable, count_hits
from pipelines.config import TrainSection
from pipelines.dataset import lane_rows
from pipelines.errors import StageError
from pipelines.learner import Learner, read_weights
from pipelines.memory import lower
from pipelines.records import Answer
from pipelines.zero import learning_rates, zero_config

_HELD_OUT_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step found, over all workers. Losses are means in nats; `lm` is the backbone's own, None where frozen."""

    loss: float
    lm: float | None
    per_head: tuple[float, ...]
    num_labels: int
    grad_norm: float
    rates: dict[str, float]
    weights: tuple[float, ...]
    duration_s: float
    broken_ranks: tuple[int, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """By the names under which they are logged."""
        found = {"loss": self.loss, "grad_norm": self.grad_norm, "tokens_per_s": self.num_labels / self.duration_s}
        found |= {f"loss_head{k}": value for k, value in enumerate(self.per_head, start=1)}
        found |= {f"lr_{name}": rate for name, rate in self.rates.items()}
        if self.lm is not None:
            found["loss_lm"] = self.lm
        if self.weights:
            found["lambda0"] = self.weights[0]
        return found


class TrainEngine:
    """DeepSpeed around a learner's module. Make it on every rank, after the process group."""

    def __init__(self, learner: Learner, train: TrainSection) -> None:
        self.learner, self.train = learner, train
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._micro_batches = len(learner.micro_batches(0))
        self._engine = self._initialize()

    def step(self, step: int) -> StepReport:
        """One optimizer step over this worker's micro-batches; the losses are those before it."""
        started = time.perf_counter()
        batches = self.learner.micro_batches(step)
        device = self.learner.backbone.device
        labels = torch.tensor(sum(batch.num_labels for batch in batches), dtype=torch.float64, device=device)
        dist.all_reduce(labels)
        # DeepSpeed takes the mean over micro-batches and workers of what are parts of one sum.
        denominator = max(float(labels), 1.0) / (self.world * len(batches))
        rates, weights = learning_rates(self.train, step), self.learner.weights(step)
        for group, rate in zip(self._engine.optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate
        sums = torch.zeros(1 + self.learner.heads.num_heads, dtype=torch.float64, device=device)
        counts = torch.zeros_like(sums)
        norm = math.nan
        with _memory_told(self.train):
            for batch in batches:
                torch.manual_seed(batch.seed)
                loss, some, of = self._engine(batch.data, denominator, *weights)
                self._engine.backward(loss)
                norm = self._norm_of_gradients(norm)
                self._engine.step()
                sums += some
                counts += of
        known = self._engine.get_global_grad_norm()
        return self._report(sums, counts, norm if known is None else float(known), rates, weights, started)

    def _report(
        self, sums: Tensor, counts: Tensor, norm: float, rates: dict[str, float], weights: Any, started: float
    ) -> StepReport:
        broken = torch.zeros(self.world, dtype=torch.float64, device=sums.device)
        broken[self.rank] = float(not sums.isfinite().all())
        everything = torch.cat([sums, counts, broken])
        dist.all_reduce(everything)
        sums, counts, broken = everything.split([len(sums), len(counts), self.world])
        if not (math.isfinite(norm) or broken.any()):  # the norm is one of all ranks' gradients
            broken.fill_(1)
        means = (sums / counts.clamp_min(1)).tolist()
        labels = float(counts[0]) or float(self.train.batch_positions)
        decayed = sum(self.train.loss_decay**k * float(value) for k, value in enumerate(sums[1:], start=1)) / labels
        joint = bool(counts[0])
        return StepReport(
            loss=means[0] + weights[0] * decayed if joint else decayed,
            lm=means[0] if joint else None,
            per_head=tuple(means[1:]),
            num_labels=int(labels),
            grad_norm=norm,
            rates=rates,
            weights=weights,
            duration_s=time.perf_counter() - started,
            broken_ranks=tuple(broken.nonzero().flatten().tolist()),
        )

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Every rank its own part. What is frozen is not saved."""
        self._engine.save_checkpoint(
            str(folder), tag=f"step-{state['step']}", client_state=state, exclude_frozen_parameters=True
        )

    def restore(self, folder: Path) -> dict[str, Any]:
        path, state = self._engine.load_checkpoint(str(folder), load_module_strict=False)
        assert path is not None, f"no DeepSpeed state in {folder}"
        return dict(state)

    @contextlib.contextmanager
    def whole(self, weights: list[nn.Parameter] | None = None) -> Iterator[None]:
        """`weights` (default all), which ZeRO-3 keeps in parts, whole for the time of the block. Every rank takes part."""
        import deepspeed

        wanted = list(self.learner.module.parameters()) if weights is None else weights
        with deepspeed.zero.GatheredParameters(wanted, enabled=self.train.zero_stage == 3):
            yield

    @torch.no_grad()
    def held_out_hits(self, rows: list[Answer], num_ranks: int) -> HitTable:
        """Hits of the heads on held-out rows. Under ZeRO-3 every rank reads all of them, so that all gather in step."""
        together = self.train.zero_stage == 3
        learner = self.learner
        reader, lm_head = learner.held_out_reader()
        mine = rows if together else lane_rows(rows, self.rank, self.world)
        positions = reader.read_all(mine, self.train.sequence_length)
        ranks = min(num_ranks, learner.heads.num_choices)
        hits = torch.zeros(learner.heads.num_heads, ranks, dtype=torch.long, device=learner.backbone.device)
        counts = torch.zeros(learner.heads.num_heads, dtype=torch.long, device=learner.backbone.device)
        with self.whole(read_weights(learner)):
            for start in range(0, len(positions), _HELD_OUT_ROWS):
                some = positions.at(slice(start, start + _HELD_OUT_ROWS))
                guesses = learner.heads.guesses(some.hidden, lm_head, num_ranks=ranks, path=some.path.long())
                table = count_hits(guesses, some.targets.long())
                hits += table.hits
                counts += table.counts
        if not together:
            dist.all_reduce(hits)
            dist.all_reduce(counts)
        return HitTable(hits=hits.cpu(), counts=counts.cpu())

    def _norm_of_gradients(self, known: float) -> float:
        """Without ZeRO, DeepSpeed does not tell the norm: take it while the gradients of the last micro-batch are there."""
        if self.train.zero_stage or not self._engine.is_gradient_accumulation_boundary():
            return known
        norms = [p.grad.float().norm() for p in self.learner.module.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0

    def _initialize(self) -> Any:
        train = self.train
        if not train.use_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        if not train.use_gpu:
            # Otherwise DeepSpeed compiles a shared-memory all-reduce at first use, about 90 s with g++ and ninja.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel(logging.ERROR)
        rates = learning_rates(train, 0)
        groups = [{"params": weights, "lr": rates[name]} for name, weights in self.learner.groups.items()]
        optimizer = torch.optim.AdamW(groups, weight_decay=train.weight_decay)
        engine, *_ = deepspeed.initialize(
            model=self.learner.module,
            optimizer=optimizer,
            config=zero_config(train, num_workers=self.world, on_gpu=train.use_gpu, micro_batches=self._micro_batches),
            dist_init_required=False,
        )
        return engine


@contextlib.contextmanager
def _memory_told(train: TrainSection) -> Iterator[None]:
    """StageError that says what to lower where a step does not fit the memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError, or the CPU allocator's complaint
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not memory:
            raise
        raise StageError(f"a training step does not fit the memory; lower {lower(train)}") from error
