"""An evaluation as a record, a page, a picture and a table. Knows figures and files; measures nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import StageError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one measurement found. `num_differing` rows in `dtype`; `identity_differing` of `identity_checked` in float32."""

    num_prompts: int
    num_tokens: int
    num_nodes: int
    dtype: str
    device: str
    acceleration_rate: float
    plain_step_s: float
    tree_step_s: float
    plain_tokens_per_s: float
    tree_tokens_per_s: float
    num_differing: int
    identity_checked: int
    identity_differing: int
    prompts_digest: str
    checkpoint_digest: str

    @property
    def overhead(self) -> float:
        return self.tree_step_s / self.plain_step_s

    @property
    def speedup(self) -> float:
        return self.tree_tokens_per_s / self.plain_tokens_per_s

    @property
    def headline(self) -> str:
        return (
            f"acceleration rate {self.acceleration_rate:.2f}, overhead {self.overhead:.2f}, speedup {self.speedup:.2f}x, "
            f"{self.identity_checked - self.identity_differing} of {self.identity_checked} answers identical in float32"
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        return cls(**json.loads(text))

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each figure, in the order in which they are read."""
        return [
            ("acceleration rate (tokens − 1) / steps", f"{self.acceleration_rate:.2f}"),
            ("overhead, tree step / plain step", f"{self.overhead:.2f}"),
            ("speedup, tokens/s tree / plain", f"{self.speedup:.2f}×"),
            ("tokens/s, plain → tree", f"{self.plain_tokens_per_s:.1f} → {self.tree_tokens_per_s:.1f}"),
            ("step, plain → tree", f"{1000 * self.plain_step_s:.1f} → {1000 * self.tree_step_s:.1f} ms"),
            (f"rows differing from plain greedy in {self.dtype}", f"{self.num_differing} of {self.num_prompts}"),
            ("identity check in float32, rows differing", f"{self.identity_differing} of {self.identity_checked}"),
            ("tree nodes", str(self.num_nodes)),
            ("prompts, tokens", f"{self.num_prompts}, {self.num_tokens}"),
            ("device", self.device),
        ]


def write_report(folder: Path, evaluation: Evaluation, tokens_per_step: Sequence[Sequence[int]]) -> tuple[Path, Path]:
    """report.md, report.json and report.png in `folder`; (page, picture). `tokens_per_step` is for the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(evaluation.to_json() + "\n", encoding="utf-8")
    plot = _draw(folder / "report.png", evaluation, tokens_per_step)
    table = [f"| {name} | {value} |" for name, value in evaluation.rows()]
    lines = ["# Evaluation", "", evaluation.headline + ".", "", "| figure | value |", "| --- | --- |", *table]
    lines += ["", f"![tokens per second and tokens per step]({plot.name})", ""]
    lines += [
        f"Checkpoint `{evaluation.checkpoint_digest}`, prompts `{evaluation.prompts_digest}`, batch 1, greedy.",
        "",
    ]
    page = folder / "report.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page, plot


def read_evaluation(folder: Path) -> Evaluation:
    """The record that `write_report` left. Raises StageError where there is none."""
    path = folder / "report.json"
    try:
        return Evaluation.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"no evaluation at {path}; run `evaluate` first") from None
    except (ValueError, TypeError) as error:
        raise StageError(f"{path} is not an evaluation of this version ({error}); run `evaluate` again") from None


def terminal_table(evaluation: Evaluation, title: str = "Evaluation") -> Table:
    """The figures as a table for the terminal."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in evaluation.rows():
        table.add_row(name, value)
    return table


def _draw(path: Path, evaluation: Evaluation, tokens_per_step: Sequence[Sequence[int]]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bars = left.bar(["plain", "tree"], [evaluation.plain_tokens_per_s, evaluation.tree_tokens_per_s])
    left.bar_label(bars, fmt="%.1f")
    left.set_title(f"tokens per second ({evaluation.speedup:.2f}×)")
    counts = Counter(tokens for steps in tokens_per_step for tokens in steps)
    right.bar(list(counts), list(counts.values()))
    right.set_title(f"tokens per step (mean {evaluation.acceleration_rate:.2f})")
    right.set_xlabel("tokens")
    figure.savefig(path, dpi=120)
    return path
