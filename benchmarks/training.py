"""`python -m benchmarks.training`: memory and speed of the heads' loss in chunks beside the plain formula.

    P positions of a step, K heads, V vocabulary, D hidden
Each contender runs in a process of its own, so that its peak memory is its own: forward and backward of K heads over P
hidden states through a shared lm_head, as a step of MEDUSA-1 makes them.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from benchmarks.command import RESULTS, console, run_command
from benchmarks.machine import describe_machine, num_cores
from benchmarks.peak_memory import MIB, peak_bytes
from benchmarks.report import Grid, save
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from medusa.losses import HEAD_DECAY, medusa1_loss

Shape = dict[str, Any]


def naive_loss(heads: MedusaHeads, hidden: torch.Tensor, targets: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
    """The formula as it is written down: all logits [P,K,V], then the cross-entropies."""
    logits = F.linear(heads.features(hidden), lm_head)
    losses = [F.cross_entropy(logits[:, k].float(), targets[:, k]) for k in range(heads.num_heads)]
    return sum((HEAD_DECAY ** (k + 1) * loss for k, loss in enumerate(losses)), start=losses[0].new_zeros(()))


def chunked_loss(chunk_size: int) -> Callable[..., torch.Tensor]:
    return lambda heads, hidden, targets, lm_head: (
        medusa1_loss(heads, hidden, targets, lm_head, chunk_size=chunk_size).loss
    )


def measure(shape: Shape, num_positions: int, chunk_size: int | None, repeats: int, answer: Any) -> None:
    """One contender (`chunk_size` None: naive), in this process; sends seconds of each step, MiB above the start, loss."""
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    device, dtype = torch.device(shape["device"]), getattr(torch, shape["dtype"])
    heads = MedusaHeads(
        HeadsConfig(num_heads=shape["num_heads"]), hidden_size=shape["hidden_size"], vocab_size=shape["vocab_size"],
        dtype=dtype, device=device,
    )  # fmt: skip
    lm_head = torch.randn(shape["vocab_size"], shape["hidden_size"], device=device).mul_(0.05).to(dtype)
    hidden = torch.randn(num_positions, shape["hidden_size"], device=device).to(dtype)
    targets = torch.randint(0, shape["vocab_size"], (num_positions, shape["num_heads"]), device=device)
    loss_of = naive_loss if chunk_size is None else chunked_loss(chunk_size)

    def step(rows: int) -> float:
        loss = loss_of(heads, hidden[:rows], targets[:rows], lm_head)
        loss.backward()
        heads.zero_grad(set_to_none=True)
        return float(loss.detach())

    step(1)  # whatever is made at first use is no part of the peak
    before = peak_bytes(device)
    value = step(num_positions)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step(num_positions)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    answer.put({"seconds": seconds, "peak_mib": (peak_bytes(device) - before) / MIB, "loss": value})


def in_own_process(*arguments: Any) -> dict[str, Any]:
    """What `measure` answers, from a fresh process. MemoryError where that was killed."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=measure, args=(*arguments, answer))
    process.start()
    while process.is_alive() and answer.empty():
        process.join(0.1)
    if answer.empty():
        process.join()
        raise MemoryError(f"the process ended with code {process.exitcode}")
    found: dict[str, Any] = answer.get()
    process.join()
    return found


def main(
    positions: Annotated[list[int] | None, typer.Option(min=1, help="positions of a step; repeat it")] = None,
    num_heads: Annotated[int, typer.Option(min=1)] = 5,
    hidden_size: Annotated[int, typer.Option(min=1)] = 576,
    vocab_size: Annotated[int, typer.Option(min=2)] = 49152,
    chunk: Annotated[int, typer.Option(min=1, help="train.chunk_size")] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="torch threads; 0: one for each core")] = 0,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
    save_results: Annotated[bool, typer.Option("--save/--no-save")] = True,
) -> None:
    """Compare the chunked loss with the plain one, in memory and positions a second."""
    machine = describe_machine("benchmarks.training")
    shape: Shape = {
        "num_heads": num_heads, "hidden_size": hidden_size, "vocab_size": vocab_size, "dtype": dtype, "device": device,
        "threads": threads or num_cores(),
    }  # fmt: skip
    rows, figures = [], {}
    for count in positions or [256, 1024]:
        found = {
            name: in_own_process(shape, count, size, repeats) for name, size in (("naive", None), ("chunked", chunk))
        }
        if abs(found["naive"]["loss"] - found["chunked"]["loss"]) > 1e-2 * abs(found["naive"]["loss"]):
            raise ValueError(f"the losses differ: {json.dumps({name: one['loss'] for name, one in found.items()})}")
        for name, one in found.items():
            speed = count / statistics.median(one["seconds"])
            figures[f"{name} {count}"] = one | {"positions_per_s": speed}
            rows.append([f"{name}, {count} positions", f"{one['peak_mib']:.0f}", f"{speed:.0f}"])
    table = Grid(
        title="A step of MEDUSA-1 (forward and backward of the heads' loss)",
        columns=("loss", "peak memory, MiB", "positions/s"),
        rows=rows,
    )
    table.show(console)
    if save_results:
        stem = f"training-{dtype}-{device}-{datetime.now(UTC):%Y%m%d-%H%M}"
        settings: dict[str, object] = shape | {"chunk_size": chunk, "repeats": repeats}
        page = save(
            output, stem, title=f"The loss in chunks, {dtype}", machine=machine, settings=settings, grids=[table],
            figures=dict(figures),
        )  # fmt: skip
        console.print(f"saved {page}")


if __name__ == "__main__":
    run_command(main)
