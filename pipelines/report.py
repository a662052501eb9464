"""An evaluation as a record, a page, a picture and a table. Knows figures and files; measures nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import StageError

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.registry import Registry


RECORD, PAGE, PLOT = "report.json", "report.md", "report.png"


class Ratios:
    """What a tree costs and gains beside plain decoding, for any record that holds both sides."""

    plain_step_s: float
    tree_step_s: float
    plain_tokens_per_s: float
    tree_tokens_per_s: float

    @property
    def overhead(self) -> float:
        return self.tree_step_s / self.plain_step_s

    @property
    def speedup(self) -> float:
        return self.tree_tokens_per_s / self.plain_tokens_per_s


@dataclass(frozen=True, kw_only=True)
class Figures(Ratios):
    """Sums and medians over answers: a tree beside plain decoding of the same prompts to the same lengths."""

    num_answers: int
    num_tokens: int
    num_steps: int
    plain_step_s: float
    tree_step_s: float
    plain_tokens_per_s: float
    tree_tokens_per_s: float

    @property
    def acceleration_rate(self) -> float:
        """(tokens − 1) / verify steps: the first token of an answer comes from its prefill."""
        return (self.num_tokens - self.num_answers) / self.num_steps if self.num_steps else 1.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scheme with one size of tree. `depth_reached[d]`: share of steps whose accepted path is deeper than d.

    `num_differing` answers are not plain decoding's; None for typical acceptance, which does not promise them to be.
    """

    scheme: str
    num_nodes: int
    overall: Figures
    by_category: dict[str, Figures]
    depth_reached: tuple[float, ...]
    num_differing: int | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where an answer first parts from plain decoding: the tokens (None: one had ended), and how far plain decoding's best
    logit lay above its second there. A margin near the rounding of `dtype` is a tie that fell the other way."""

    prompt: str
    dtype: str
    position: int
    plain_token: int | None
    tree_token: int | None
    margin: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """A tuned backbone beside the original on one kind of text. Perplexities per token; KL(original ‖ tuned) in nats."""

    num_tokens: int
    original_perplexity: float
    tuned_perplexity: float
    mean_kl: float

    @property
    def rise(self) -> float:
        """How much the perplexity rose, relative to the original's; below 0 where it fell."""
        return self.tuned_perplexity / self.original_perplexity - 1


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What tuning did to a backbone: on the original's own greedy answers, and on text that people wrote."""

    answers: Fidelity
    text: Fidelity


@dataclass(frozen=True, kw_only=True)
class Details:
    """What stands in the report beside the headline figures."""

    cases: tuple[Case, ...] = ()
    differences: tuple[Difference, ...] = ()

    @classmethod
    def from_record(cls, record: Any) -> Details:
        return cls(
            cases=tuple(_case_of(case) for case in record["cases"]),
            differences=tuple(Difference(**difference) for difference in record["differences"]),
        )


def _figures_of(record: dict[str, Any]) -> Figures:
    given: dict[str, Any] = {name: math.nan if value is None else value for name, value in record.items()}
    return Figures(**given)


def _without_nan(value: Any) -> Any:
    """A record with null for NaN, which JSON has not: what was measured of answers without a step."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _case_of(record: dict[str, Any]) -> Case:
    by_category = {name: _figures_of(figures) for name, figures in record["by_category"].items()}
    given = {"overall": _figures_of(record["overall"]), "by_category": by_category}
    return Case(**{**record, **given, "depth_reached": tuple(record["depth_reached"])})


@dataclass(frozen=True, kw_only=True)
class Evaluation(Ratios):
    """What one measurement found. `num_differing` rows in `dtype`; `identity_differing` of `identity_checked` in float32.

    `quality` where the checkpoint brings a tuned backbone (MEDUSA-2); identity is then with that backbone's plain output.
    """

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
    tuned: bool = False
    quality: Quality | None = None

    @property
    def headline(self) -> str:
        quality = (
            f", perplexity {self.quality.answers.rise:+.2%} on the original's answers, {self.quality.text.rise:+.2%} on text"
            if self.quality
            else ""
        )
        return (
            f"acceleration rate {self.acceleration_rate:.2f}, overhead {self.overhead:.2f}, speedup {self.speedup:.2f}x, "
            f"{self.identity_checked - self.identity_differing} of {self.identity_checked} answers identical in float32"
            f"{quality}"
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """ValueError or TypeError for anything else."""
        return cls.from_record(json.loads(text))

    @classmethod
    def from_record(cls, record: Any) -> Evaluation:
        if not isinstance(record, dict):
            raise TypeError(f"expected an object, got a {type(record).__name__}")
        quality = record.get("quality")
        if quality is not None:
            quality = Quality(answers=Fidelity(**quality["answers"]), text=Fidelity(**quality["text"]))
        made = cls(**{**record, "quality": quality})
        bad = [name for name, value in asdict(made).items() if value is None and name != "quality"]
        if bad:
            raise ValueError(f"no value for {', '.join(bad)}")
        return made

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
            *self._quality_rows(),
            ("tree nodes", str(self.num_nodes)),
            ("prompts (turns), tokens", f"{self.num_prompts}, {self.num_tokens}"),
            ("device", self.device),
        ]

    def _quality_rows(self) -> list[tuple[str, str]]:
        if self.quality is None:
            return []
        kinds = (("the original's answers", self.quality.answers), ("human text", self.quality.text))
        return [
            (
                f"perplexity on {name}, original → tuned; mean KL",
                f"{f.original_perplexity:.3f} → {f.tuned_perplexity:.3f} ({f.rise:+.2%}); {f.mean_kl:.4f} nats",
            )
            for name, f in kinds
        ]


def log_report(registry: Registry, run_id: str, folder: Path, evaluation: Evaluation) -> None:
    """The report's files and figures, under the run that made what was evaluated."""
    registry.log_folder(run_id, folder, f"{folder.name}-{evaluation.checkpoint_digest}")
    fields = {name: float(value) for name, value in asdict(evaluation).items() if isinstance(value, (int, float))}
    if evaluation.quality is not None:
        for kind, found in (("answers", evaluation.quality.answers), ("text", evaluation.quality.text)):
            fields |= {f"{kind}_perplexity_rise": found.rise, f"{kind}_mean_kl": found.mean_kl}
    registry.log_metrics(run_id, fields | {"overhead": evaluation.overhead, "speedup": evaluation.speedup})


def write_report(
    folder: Path,
    evaluation: Evaluation,
    tokens_per_step: Sequence[Sequence[int]],
    details: Details = Details(),
    *,
    inputs: str = "",
) -> tuple[Path, Path]:
    """report.md, report.json and pictures in `folder`; (page, picture). `tokens_per_step` is for the picture.

    `inputs` names what was measured (see `inputs.inputs_key`). The record is written last: where it is, all is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    plot = _draw(folder / PLOT, evaluation, tokens_per_step)
    lines = ["# Evaluation", "", evaluation.headline + ".", ""]
    lines += [*_table(("figure", "value"), evaluation.rows()), ""]
    lines += [f"![tokens per second and tokens per step]({plot.name})", ""]
    if details.cases:
        cases = _draw_cases(folder / "cases.png", details.cases)
        lines += _page_of_cases(details.cases)
        lines += [f"![acceleration rate by category, accepted depth]({cases.name})", ""]
    lines += _page_of_differences(details.differences)
    lines += [
        f"Checkpoint `{evaluation.checkpoint_digest}`, prompts `{evaluation.prompts_digest}`, batch 1. "
        "A tree answers each prompt to the length of the plain answer; second turns stand behind the plain greedy answer.",
        "",
    ]
    page = folder / PAGE
    page.write_text("\n".join(lines), encoding="utf-8")
    record = _without_nan({"inputs": inputs, "evaluation": asdict(evaluation), "details": asdict(details)})
    (folder / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return page, plot


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `write_report` left in a folder."""

    evaluation: Evaluation
    details: Details
    page: Path
    plot: Path


def report_of(folder: Path, inputs: str) -> Report | None:
    """The report that was made of these inputs; None where there is none, or it was cut off."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["inputs"] != inputs:
            return None
        return Report(
            evaluation=Evaluation.from_record(record["evaluation"]),
            details=Details.from_record(record["details"]),
            page=folder / PAGE,
            plot=folder / PLOT,
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def read_evaluation(folder: Path) -> Evaluation:
    """The record that `write_report` left. Raises StageError where there is none."""
    path = folder / RECORD
    try:
        return Evaluation.from_record(json.loads(path.read_text(encoding="utf-8"))["evaluation"])
    except FileNotFoundError:
        raise StageError(f"no evaluation at {path}; run `evaluate` first") from None
    except (ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"{path} is not an evaluation of this version ({type(error).__name__}: {error}); run `evaluate` again"
        ) from None


def _page_of_cases(cases: Sequence[Case]) -> list[str]:
    def figures(one: Figures) -> list[str]:
        if not one.num_steps:  # a category whose answers all end at their first token
            return ["–", "–", "–", f"{one.tree_tokens_per_s:.1f}"]
        return [
            f"{one.acceleration_rate:.2f}",
            f"{one.overhead:.2f}",
            f"{one.speedup:.2f}×",
            f"{one.tree_tokens_per_s:.1f}",
        ]

    columns = ("acceleration rate", "overhead", "speedup", "tokens/s")
    overall = [
        [
            case.scheme,
            str(case.num_nodes),
            *figures(case.overall),
            "–" if case.num_differing is None else str(case.num_differing),
        ]
        for case in cases
    ]
    lines = ["## Schemes and sizes", "", *_table(("scheme", "nodes", *columns, "rows differing"), overall), ""]
    lines += ["## By category", ""]
    for case in cases:
        lines += [f"{case.scheme}, {case.num_nodes} nodes", ""]
        rows = [[name, str(one.num_answers), *figures(one)] for name, one in sorted(case.by_category.items())]
        lines += [*_table(("category", "answers", *columns), rows), ""]
    depth = max(len(case.depth_reached) for case in cases)
    lines += ["## Accepted depth", "", "Share of steps whose accepted path is at least so deep.", ""]
    reached = [
        [case.scheme, str(case.num_nodes), *(f"{share:.3f}" for share in case.depth_reached)]
        + ["–"] * (depth - len(case.depth_reached))
        for case in cases
    ]
    return [*lines, *_table(("scheme", "nodes", *map(str, range(1, depth + 1))), reached), ""]


def _page_of_differences(differences: Sequence[Difference]) -> list[str]:
    if not differences:
        return []
    rows = [
        [d.prompt, d.dtype, str(d.position), f"{d.plain_token}", f"{d.tree_token}", f"{d.margin:.2e}"]
        for d in differences
    ]
    columns = ("prompt", "dtype", "first differing token", "plain", "tree", "logit margin")
    return ["## Rows that differ from plain greedy", "", *_table(columns, rows), ""]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]


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


def _draw_cases(path: Path, cases: Sequence[Case]) -> Path:
    """Acceleration rate by category, and how deep the accepted paths go, for each scheme and size."""
    from matplotlib.figure import Figure

    categories = ["all", *sorted({name for case in cases for name in case.by_category})]
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(categories) * max(1, len(cases) / 2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    height = 0.8 / len(cases)
    for row, case in enumerate(cases):
        label = f"{case.scheme}, {case.num_nodes}"
        by = {"all": case.overall, **case.by_category}
        places = [place + row * height for place in range(len(categories))]
        left.barh(places, [by[name].acceleration_rate if name in by else 0 for name in categories], height, label=label)
        right.plot(range(1, len(case.depth_reached) + 1), case.depth_reached, marker="o", label=label)
    left.set_yticks([place + 0.4 - height / 2 for place in range(len(categories))], categories)
    left.invert_yaxis()
    left.set_title("acceleration rate")
    right.set_title("share of steps that accept at least this depth")
    right.set_ylim(0, 1)
    right.legend(fontsize="small", title="scheme, nodes")
    figure.savefig(path, dpi=120)
    return path
