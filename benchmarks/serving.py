"""Load on a running endpoint: `python -m benchmarks.serving --server ours --clients 1 --clients 16`.

Closed loops of so many clients, plain decoding beside the tree, and an open loop at a multiple of the capacity that they
found. Every answer is compared with the one that its prompt got alone. `--server` is ours, vllm or the URL of any OpenAI
endpoint on this machine; what is started is ended again.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from benchmarks.command import RESULTS, console, run_command
from benchmarks.comparison import Spread
from benchmarks.machine import describe_machine
from benchmarks.prompts import Prompt, read_prompts
from benchmarks.report import Grid, save
from benchmarks.serving_client import Ending, Endpoint, Outcome, ask, first_model, require_own_host, session
from benchmarks.serving_figures import Figures, Quantiles
from benchmarks.serving_load import Ask, closed_loop, open_loop
from benchmarks.serving_memory import Memory, watched
from benchmarks.serving_page import collect
from benchmarks.serving_servers import Launch, ours, started, vllm
from medusa.provision import default_backbone
from pipelines.builtin_prompts import BUILTIN

DECODINGS: dict[str, dict[str, Any]] = {"plain": {"tree_nodes": 1}, "tree": {}}
COLUMNS = (
    "load", "tokens/s", "answers/s", "TTFT ms p50 / p95", "gap ms p50 / p95 / p99", "TPOT ms p50", "finished", "refused",
    "error", "lost", "identical", "differing", "mixed", "RSS MiB before → after (peak)", "growth MiB (of the model's process)",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load on one server with one decoding, and what came of it."""

    name: str
    figures: Figures
    memory: Memory | None

    def row(self) -> list[str]:
        f, a, m = self.figures, self.figures.answers, self.memory
        ends = [str(f.endings.get(kind, 0)) for kind in ("finished", "refused", "error")]
        memory = f"{m.before_mib:.0f} → {m.after_mib:.0f} ({m.peak_mib:.0f})" if m else "–"
        return [
            self.name, f"{f.tokens_per_s:.1f}", f"{f.requests_per_s:.2f}", _ms(f.ttft_ms, "p50", "p95"),
            _ms(f.gap_ms, "p50", "p95", "p99"), _ms(f.tpot_ms, "p50"), *ends, str(f.lost), str(a.identical),
            str(a.differing), str(a.mixed), memory, f"{m.growth_mib:+.1f} ({m.largest_growth_mib:+.1f})" if m else "–",
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much load: each of `clients` for `seconds`, `repeats` times; then arrivals at `open_loop` times the capacity."""

    clients: Sequence[int]
    seconds: float
    repeats: int
    open_loop: float
    open_seconds: float


def main(
    server: Annotated[list[str], typer.Option(help="ours, vllm or a URL; may be given again")],
    clients: Annotated[
        list[int] | None, typer.Option(help="clients of a closed loop; again; default 1 4 16 32")
    ] = None,
    decoding: Annotated[list[str] | None, typer.Option(help="plain, tree (ours); again; default both")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="of each closed loop")] = 60.0,
    repeats: Annotated[int, typer.Option(min=1, max=20)] = 1,
    open_multiple: Annotated[float, typer.Option("--open-loop", min=0, max=10, help="× capacity; 0: none")] = 0.0,
    open_seconds: Annotated[float, typer.Option(min=0.1, max=3600)] = 600.0,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    prompts: Annotated[Path | None, typer.Option(help="JSONL; default: built-in")] = None,
    limit: Annotated[int, typer.Option(min=1, help="prompts asked in turn")] = 24,
    dtype: Annotated[str, typer.Option(help="of a server that is started here")] = "bfloat16",
    max_batch_size: Annotated[int, typer.Option(min=1, help="of a server that is started here")] = 32,
    context_length: Annotated[int, typer.Option(min=64, help="of a server that is started here")] = 1024,
    vllm_python: Annotated[Path, typer.Option(help="the Python of vLLM's environment")] = Path("python"),
    vllm_option: Annotated[
        list[str] | None, typer.Option(help="for vLLM, as --vllm-option=--enforce-eager; again")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for our server; again")] = None,
    pid: Annotated[int | None, typer.Option(help="process behind a URL, for its memory")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
    owned: Annotated[bool, typer.Option("--i-own-this-host", help="load a host other than this machine")] = False,
    stem: Annotated[str, typer.Option(help="name of the files, before the date")] = "serving-throughput",
    output: Annotated[Path, typer.Option(help="folder of the .md and .json")] = RESULTS,
) -> None:
    """Measure throughput, latency, refusals, fidelity and memory under load."""
    machine = describe_machine("benchmarks.serving")
    rows = read_prompts(prompts, limit=limit) if prompts else built_in(limit)
    plan = Plan(
        clients=clients or [1, 4, 16, 32], seconds=seconds, repeats=repeats, open_loop=open_multiple,
        open_seconds=open_seconds,
    )  # fmt: skip
    options: list[str] = [
        f"serve.max_batch_size={max_batch_size}", f"serve.context_length={context_length}", *(setting or ()),
    ]  # fmt: skip
    levels: list[Level] = []
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        launches = {
            "ours": ours(workdir=Path(folder), dtype=dtype, settings=options),
            "vllm": vllm(
                python=vllm_python, folder=default_backbone(), dtype=dtype, context_length=context_length,
                max_batch_size=max_batch_size, options=vllm_option or (),
            ),
        }  # fmt: skip
        for name in server:
            with _at(name, launches, Path(folder), pid=pid, owned=owned) as (url, server_pid):
                kinds = (decoding or list(DECODINGS)) if name != "vllm" else ["its own"]
                base = Endpoint(url=url, model="", max_tokens=max_tokens, extra={"ignore_eos": True}, api_key=api_key)
                levels += asyncio.run(measure(name, base, kinds, rows, plan, pid=server_pid))
    table = Grid(title="Load", columns=COLUMNS, rows=[level.row() for level in levels])
    grids = [*_spreads(levels), table]
    for grid in grids:
        grid.show(console)
    settings: dict[str, object] = {
        "prompts": f"{len(rows)} ({prompts.name if prompts else 'built-in'})", "max_tokens": max_tokens, "dtype": dtype,
        "max_batch_size": max_batch_size, "context_length": context_length, "temperature": 0, "seconds": seconds,
        "open loop": f"{open_multiple:g} × capacity for {open_seconds:g} s" if open_multiple else "none",
    }  # fmt: skip
    figures: dict[str, object] = {"levels": [asdict(level) for level in levels]}
    named = f"{stem}-{datetime.now(UTC):%Y%m%d-%H%M}"
    page = save(
        output, named, title="Serving under load", machine=machine, settings=settings, grids=grids, figures=figures
    )
    console.print(f"saved {page} and {collect(output)}")


def built_in(limit: int) -> list[Prompt]:
    """Prompts of every kind before the second of any."""
    rows = [
        Prompt(id=f"{kind}-{number}", category=kind, messages=({"role": "user", "content": text},))
        for number, texts in enumerate(zip(*BUILTIN.values(), strict=True))
        for kind, text in zip(BUILTIN, texts, strict=True)
    ]
    return rows[:limit]


async def measure(
    name: str, base: Endpoint, decodings: Sequence[str], prompts: Sequence[Prompt], plan: Plan, *, pid: int | None
) -> list[Level]:
    """All loads on one server. Expected answers are those that the first decoding gives to each prompt alone."""
    async with session() as http:
        base = replace(base, model=base.model or await first_model(http, base.url, base.headers))
        endpoints = {kind: replace(base, extra={**base.extra, **DECODINGS.get(kind, {})}) for kind in decodings}
        expected = await reference(http, endpoints[decodings[0]], prompts)
        levels = []
        for repeat in range(plan.repeats):
            for count in plan.clients:
                for kind in decodings:  # in turn, so that both see the same minute of the machine
                    said = f"{name}, {kind}, {count} client{'s' * (count > 1)}" + f" (repeat {repeat + 1})" * (
                        repeat > 0
                    )
                    async with watched(pid) as samples:
                        outcomes = await closed_loop(
                            asking(http, endpoints[kind], prompts), clients=count, seconds=plan.seconds
                        )
                    levels.append(_level(said, outcomes, expected, samples))
        if plan.open_loop:
            kind = decodings[-1]
            capacity = max(level.figures.requests_per_s for level in levels if f", {kind}," in level.name)
            rate = plan.open_loop * capacity
            async with watched(pid) as samples:
                outcomes, unsent = await open_loop(
                    asking(http, endpoints[kind], prompts), rate=rate, seconds=plan.open_seconds
                )
            if unsent:
                raise ValueError(f"{unsent} arrivals found too many requests open to be sent; lower --open-loop")
            levels.append(_level(f"{name}, {kind}, open loop of {rate:.2f}/s", outcomes, expected, samples))
    return levels


async def reference(http: aiohttp.ClientSession, endpoint: Endpoint, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What each prompt is answered when nobody else asks. ValueError where the server does not answer it."""
    expected = {}
    for prompt in prompts:
        outcome = await ask(http, endpoint, prompt)
        if outcome.ending is not Ending.FINISHED:
            raise ValueError(f"{endpoint.url} does not answer prompt {prompt.id}: {outcome.ending}, {outcome.detail}")
        expected[prompt.id] = outcome.text
    return expected


def asking(http: aiohttp.ClientSession, endpoint: Endpoint, prompts: Sequence[Prompt]) -> Ask:
    """Asks the prompts in turn."""

    async def one(number: int) -> Outcome:
        return await ask(http, endpoint, prompts[number % len(prompts)])

    return one


@contextlib.contextmanager
def _at(
    name: str, launches: dict[str, Launch], folder: Path, *, pid: int | None, owned: bool
) -> Iterator[tuple[str, int | None]]:
    """URL and process of a server that is started for the block, or of one that is there."""
    if name in launches:
        with started(launches[name], folder=folder) as one:
            yield one.url, one.pid
        return
    require_own_host(name, owned=owned)
    yield name.rstrip("/").removesuffix("/v1"), pid


def _level(name: str, outcomes: list[Outcome], expected: dict[str, str], samples: Sequence[Any]) -> Level:
    figures = Figures.of(outcomes, expected)
    console.print(f"{name}: {figures.tokens_per_s:.1f} tokens/s, {figures.endings}", highlight=False)
    return Level(name=name, figures=figures, memory=Memory.of(samples) if samples else None)


def _spreads(levels: Sequence[Level]) -> list[Grid]:
    """Throughput over the repeats; nothing where there was one."""
    by_name: dict[str, list[float]] = {}
    for level in levels:
        by_name.setdefault(level.name.partition(" (repeat")[0], []).append(level.figures.tokens_per_s)
    if max(map(len, by_name.values())) < 2:
        return []
    spreads = {name: Spread.of(values) for name, values in by_name.items()}
    rows = [[name, f"{s.median:.1f}", f"{s.min:.1f} – {s.max:.1f}"] for name, s in spreads.items()]
    return [Grid(title="Tokens per second over the repeats", columns=("load", "median", "range"), rows=rows)]


def _ms(quantiles: Quantiles, *names: str) -> str:
    values = [getattr(quantiles, name) for name in names]
    return " / ".join("–" if value is None else f"{value:.0f}" for value in values)


if __name__ == "__main__":
    run_command(main)
