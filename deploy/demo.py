"""`medusa demo`: the life cycle, then its champion served, and one answer streamed by the openai client. Prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import openai
from rich.console import Console

from deploy.serve import serving, sigterm_interrupts
from deploy.terminal import facts_table
from pipelines import demo as life_cycle
from pipelines.cluster import ray_session
from pipelines.config import Config

QUESTION = "Explain in three sentences why leaves are green."
MAX_TOKENS = 96


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One answer as its client saw it."""

    text: str
    num_tokens: int
    first_s: float
    total_s: float


def run(config: Config) -> None:
    """Everything in one Ray, which ends with the demo, however it ends. What was made stays in `workdir`."""
    began = time.monotonic()
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    anywhere = config.model_copy(update={"serve": config.serve.model_copy(update={"port": 0})})
    with ray_session(config), sigterm_interrupts():
        made = life_cycle.run(config, console=notes)
        notes.print("starting the server")
        with serving(anywhere) as url:
            notes.print(f"[green]✓[/] [bold]serve[/] {url}/v1")
            console.print(f"\n[bold]{QUESTION}[/]")
            answer = stream_one(url, QUESTION, on_text=lambda text: console.out(text, end="", highlight=False))
            console.print("\n")
    role = "champion" if made.promoted else "challenger, refused by the gate"
    speed = f"{answer.num_tokens} tokens in {answer.total_s:.1f} s, first text after {answer.first_s:.2f} s"
    console.print(
        facts_table(
            "Medusa on Ray, measured on this machine",
            [
                ("evaluation", made.evaluation.headline),
                ("version", f"{made.version} ({role})"),
                ("streamed answer", speed),
                ("report", str(made.report)),
                ("plot", str(made.plot)),
                ("whole demo", f"{(time.monotonic() - began) / 60:.1f} min"),
            ],
        )
    )


def stream_one(url: str, question: str, *, on_text: Callable[[str], None]) -> Streamed:
    """Ask the server greedily through OpenAI's own client; `on_text` sees each piece as it arrives."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        model = next(iter(client.models.list())).id
        asked, first, texts, num_tokens = time.monotonic(), None, [], 0
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in chunks:
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first = first if first is not None else time.monotonic() - asked
                texts.append(text)
                on_text(text)
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
        total = time.monotonic() - asked
    return Streamed(
        text="".join(texts), num_tokens=num_tokens, first_s=first if first is not None else total, total_s=total
    )
