"""Memory: what is free here, and what training holds at least, so that what cannot fit is told before it is tried.

P positions of a worker's step, K heads, T tokens of a forward, D hidden, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import TrainSection
from pipelines.errors import StageError

if TYPE_CHECKING:
    import torch

_FLOAT32 = 4
_SIZES = {"float32": 4, "bfloat16": 2}
_CGROUP = Path("/sys/fs/cgroup")
GIB = 2**30


def free_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take, within its container's limit; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return None
    left = _left_in_container(_CGROUP)
    return free if left is None else min(free, left)


def _left_in_container(folder: Path) -> int | None:
    """What control groups (version 2) leave to this container; None without a limit."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the memory of a training step depends on, beside the configuration.

    `trainable` parameters, `layers` of the backbone and `inner` width of its feed-forward blocks, `longest` row in tokens.
    """

    trainable: int
    num_heads: int
    head_layers: int
    hidden_size: int
    vocab_size: int
    layers: int
    inner: int
    longest: int


def step_bytes(train: TrainSection, shape: Shape, *, world: int) -> int:
    """What one worker of `world` needs beside the loaded weights, at least: gradients, the optimizer's state, what a
    backward pass keeps, a chunk of logits. A lower bound, so that nothing is refused that fits."""
    size = _SIZES[train.dtype]
    state = shape.trainable * 2 * _FLOAT32 + (shape.trainable * _FLOAT32 if size < _FLOAT32 else 0)
    gradients = shape.trainable * size
    state //= world if train.zero_stage >= 1 else 1
    gradients //= world if train.zero_stage >= 2 else 1
    if train.method == "medusa1":
        tokens, backbone = train.batch_positions // world, 0
    else:
        tokens = max(train.sequence_length, shape.longest) * train.sequences_at_once
        backbone = tokens * shape.layers * (6 * shape.hidden_size + 3 * shape.inner) * size
    # A block keeps its input (the first ones share theirs) and its pre-activation; the loss, the features' gradients.
    heads = tokens * shape.hidden_size * (2 * shape.num_heads * shape.head_layers + 1) * size
    chunk = min(train.chunk_size, tokens) * shape.vocab_size * 2 * _FLOAT32
    return state + gradients + backbone + heads + chunk


def lower(train: TrainSection) -> str:
    """The settings that make a training step smaller, with their values."""
    names: Sequence[str] = ("batch_positions", "chunk_size")
    if train.method == "medusa2":
        names = ("sequences_at_once", "sequence_length", "chunk_size")
    told = [f"train.{name} ({getattr(train, name)})" for name in names]
    return f"{', '.join(told[:-1])} or {told[-1]}"


def require_memory(train: TrainSection, shape: Shape, *, free: int | None, world: int, here: int) -> None:
    """StageError, saying what to lower, where `here` workers of one node cannot all have what a step needs of `free`."""
    need = step_bytes(train, shape, world=world)
    if free is not None and need * here > free:
        workers = "a training worker" if here == 1 else f"each of {here} training workers of a node"
        raise StageError(
            f"{workers} needs at least {need / GIB:.1f} GiB for a step, and {free / GIB:.1f} GiB are free there; "
            f"lower {lower(train)}"
        )
