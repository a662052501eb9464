"""Contenders of a training step, each in a process of its own, taking turns. Knows processes, clocks and peaks; no page.

What a peak holds is what came after the backbone was loaded: heads, optimizer, a teacher, and all that a step makes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.gpu.shapes import SHAPES, random_backbone
from benchmarks.peak_memory import MIB, peak_bytes, reset_peak
from benchmarks.training_contenders import CONTENDERS, LATER, NAIVE, Batch, Setting, Trainer, keep
from medusa.backbone import Backbone, load_backbone, parse_device
from medusa.config import HeadsConfig
from medusa.provision import DEFAULT_BACKBONE, default_backbone
from pipelines.config import TrainSection

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # between losses, relative


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a contender's process is told. `shapes` names random weights; None: `backbone` is loaded."""

    backbone: str
    shapes: str | None
    device: str
    threads: int
    heads: HeadsConfig
    train: TrainSection

    @property
    def vocab_size(self) -> int:
        """Known without loading the weights."""
        if self.shapes is not None:
            return int(SHAPES[self.shapes]["vocab_size"])
        source = default_backbone() if self.backbone == DEFAULT_BACKBONE else self.backbone
        return int(AutoConfig.from_pretrained(source).vocab_size)

    def load(self) -> Backbone:
        device = parse_device(self.device)
        if self.shapes is None:
            return load_backbone(self.backbone, dtype=self.train.dtype, device=device, fused=False)
        torch.manual_seed(self.train.seed)
        made = random_backbone(self.shapes, device=device, dtype=getattr(torch, self.train.dtype))
        made.fused = None
        return made


@dataclass(frozen=True, kw_only=True)
class Step:
    """`peak_mib` is above the loaded backbone, since the first step; `loss` in nats per label position."""

    seconds: float
    loss: float
    peak_mib: float


def serve(name: str, job: Job, batches: Sequence[Batch], pipe: Connection) -> None:
    """One contender, in this process: a Step for each number of a batch that comes, until None does."""
    torch.set_num_threads(job.threads)
    with tempfile.TemporaryDirectory() as folder:
        backbone = job.load()
        backbone.model.requires_grad_(False)
        setting = Setting(
            backbone=backbone, heads=job.heads, train=job.train, batches=batches, folder=Path(folder)
        )  # fmt: skip
        for number in range(len(batches)) if name == LATER else ():
            keep(setting, number)
        start = reset_peak(backbone.device)
        trainer = Trainer(CONTENDERS[job.train.method][name](setting), job.train)
        while (number := pipe.recv()) is not None:
            began = time.perf_counter()
            loss = trainer.step(number)
            if backbone.device.type == "cuda":
                torch.cuda.synchronize(backbone.device)
            seconds = time.perf_counter() - began
            pipe.send(Step(seconds=seconds, loss=loss, peak_mib=(peak_bytes(backbone.device) - start) / MIB))


class OwnProcess(contextlib.AbstractContextManager["OwnProcess"]):
    """A contender in a fresh process, which waits between its turns."""

    def __init__(self, name: str, job: Job, batches: Sequence[Batch]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, job, batches, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here

    def step(self, number: int) -> Step:
        """ChildProcessError where it was killed."""
        try:
            self._pipe.send(number)
            found: Step = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise ChildProcessError(
                f"{self.name!r} ended with code {self._process.exitcode}; where memory was short, take fewer --rows"
            ) from None
        return found

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join()


def run_in_turns(job: Job, batches: Sequence[Batch]) -> dict[str, list[Step]]:
    """Contender → its step on each batch, the first one to warm up; who begins rotates. ValueError where losses differ."""
    names = list(CONTENDERS[job.train.method])
    steps: dict[str, list[Step]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(OwnProcess(name, job, batches)) for name in names}
        for number in range(len(batches)):
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                steps[name].append(processes[name].step(number))
            if number == 0:
                _check_same({name: found[0].loss for name, found in steps.items()}, TOLERANCE[job.train.dtype])
    return steps


def _check_same(losses: Mapping[str, float], tolerance: float) -> None:
    naive = losses[NAIVE]
    if not all(abs(loss - naive) <= tolerance * abs(naive) for loss in losses.values()):
        told = ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items())
        raise ValueError(f"the losses of the same rows differ by more than {tolerance:g} of their size: {told}")
