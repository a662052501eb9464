"""The tree of a device: how often the heads are right, what a step of each size costs, and the best between the two.

Writes the grown paths, the accuracy and the chosen size into the checkpoint. arXiv 2401.10774 §2.3.3 and §4 (figure 4).
Run again over the same weights, answers and settings it measures nothing: what it found then is put back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipelines.config import CalibrateSection, Config, Layout
from pipelines.inputs import inputs_key, machine, require_unchanged, weights_digest
from pipelines.models import load_model, trained_heads, use_threads
from pipelines.records import CALIBRATION, Answers, settled_answers
from pipelines.stage import Progress, Step, ignore_progress, main

if TYPE_CHECKING:
    from torch import Tensor

    from medusa import Model
    from medusa.tree import Path as TreePath

logger = logging.getLogger(__name__)

RECORD, PLOT = "calibration.json", "calibration.png"


@dataclass(frozen=True, kw_only=True)
class SizeCost:
    """A tree of `nodes` on this device: tokens a step is expected to give, and its median seconds, batch 1."""

    nodes: int
    expected_tokens: float
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.expected_tokens / self.step_s


@dataclass(frozen=True, kw_only=True)
class CalibrateResult:
    """The curve, and the size taken from it."""

    checkpoint: Path
    plot: Path
    curve: tuple[SizeCost, ...]
    num_nodes: int
    num_positions: int
    measured_before: bool = False

    @property
    def summary(self) -> str:
        best = next(cost for cost in self.curve if cost.nodes == self.num_nodes)
        before = "; unchanged since, calibrate.again=true measures again" if self.measured_before else ""
        if self.num_nodes == 1:
            return (
                f"plain decoding is fastest with {self.checkpoint}, from {self.num_positions} positions: its guesses do not "
                f"pay for a tree here; train longer, or on more answers; curve in {self.plot}{before}"
            )
        return (
            f"tree of {self.num_nodes} nodes for {self.checkpoint}: {best.expected_tokens:.2f} tokens expected a step of "
            f"{1000 * best.step_s:.0f} ms, from {self.num_positions} positions; curve in {self.plot}{before}"
        )


def run(config: Config, progress: Progress = ignore_progress) -> CalibrateResult:
    """Calibrate the checkpoint in the working directory on the calibration answers.

    Raises CheckpointError, StageError (also where its weights change meanwhile: then it gets no tree).
    """
    from medusa.backbone import dtype_name
    from medusa.confidence import fit_temperatures
    from medusa.tree_search import best_size, expected_tokens, grow_paths, measure_hits

    answers = settled_answers(config.layout.distilled, CALIBRATION)
    heads = trained_heads(config)
    if json.loads(answers.sampling)["temperature"] > 0:
        logger.warning("the calibration answers are sampled, not greedy; the tree will fit sampling")
    weights = weights_digest(heads)
    key = _inputs(config, weights, answers)
    record = _record_in(config.layout.calibration)
    if not config.calibrate.again and record is not None and record.get("inputs") == key:
        return _result(config, record, weights, measured_before=True)
    use_threads(None, processes=1)
    model = load_model(config.backbone, str(heads))
    assert model.heads is not None
    sequences = [(row.prompt_ids, row.response_ids) for row in answers.rows]
    hits = measure_hits(model.backbone, model.heads, sequences, num_ranks=config.calibrate.num_ranks)
    paths = grow_paths(hits.accuracy, config.calibrate.max_nodes)
    step_s = measure_cost(model, paths, answers, config.calibrate, progress)
    expected = {nodes: expected_tokens(hits.accuracy, paths[: nodes - 1]) for nodes in step_s}
    chosen = best_size(expected, step_s)
    curve = tuple(SizeCost(nodes=n, expected_tokens=expected[n], step_s=step_s[n]) for n in sorted(step_s))
    record = {
        "inputs": key,
        "weights": weights,
        "num_nodes": chosen,
        "num_answers": len(answers.rows),
        "device": f"{model.backbone.device}, {dtype_name(model.backbone.step_dtype)}",
        "curve": [asdict(cost) for cost in curve],
        "accuracy": hits.accuracy.tolist(),
        "temperatures": fit_temperatures(model.backbone, model.heads, sequences),
        "positions": hits.counts.tolist(),  # for each head, since later heads have fewer targets
        "paths": [list(path) for path in paths],  # the first n - 1 are the best tree of n nodes
        "expected_tokens": expected_by_size(hits.accuracy, paths),  # of the best tree of 1, 2, … nodes
    }
    folder = config.layout.calibration
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)  # a record says that all else is there
    draw_tree(folder / "tree.png", paths[: chosen - 1], hits.accuracy)
    draw(folder / PLOT, curve, chosen, record["expected_tokens"])
    result = _result(config, record, weights)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return result


def _inputs(config: Config, weights: str, answers: Answers) -> str:
    """Names all that the calibration of weights, given by their digest, depends on."""
    return inputs_key(
        weights,
        config.backbone.model_dump(mode="json"),
        [answers.backbone, answers.fingerprint],
        config.calibrate.model_dump(mode="json", exclude={"again"}),
        machine(),
    )


def is_current(layout: Layout) -> bool:
    """Is what lies in the calibration folder of the weights that lie in the checkpoint? Of others, or unknown: no."""
    record = _record_in(layout.calibration)
    return record is not None and record.get("weights") == weights_digest(layout.checkpoint)


def _record_in(folder: Path) -> dict[str, Any] | None:
    """What an earlier calibration found; None where there was none, or it was cut off."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _result(config: Config, record: dict[str, Any], weights: str, *, measured_before: bool = False) -> CalibrateResult:
    """Give the checkpoint the tree that a calibration of `weights` found. StageError where it has others by now."""
    from medusa.checkpoint import load_checkpoint, save_checkpoint

    checkpoint = load_checkpoint(config.layout.checkpoint)
    require_unchanged(config.layout.checkpoint, weights_digest, weights)
    chosen = int(record["num_nodes"])
    told = {"nodes": chosen, "answers": record["num_answers"], "chosen for": record["device"]}
    save_checkpoint(
        config.layout.checkpoint,
        checkpoint.heads,
        paths=[tuple(path) for path in record["paths"]],
        backbone_name=checkpoint.backbone_name,
        backbone_fingerprint=checkpoint.backbone_fingerprint,
        default_nodes=chosen,
        accuracy=record["accuracy"],
        temperatures=record["temperatures"],
        adapters=checkpoint.adapters,
        card=checkpoint.card | {"Tree": told},
        dtype=checkpoint.dtype,
    )
    return CalibrateResult(
        checkpoint=config.layout.checkpoint,
        plot=config.layout.calibration / PLOT,
        curve=tuple(SizeCost(**cost) for cost in record["curve"]),
        num_nodes=chosen,
        num_positions=int(record["positions"][0]),
        measured_before=measured_before,
    )


def measure_cost(
    model: Model, paths: list[TreePath], answers: Answers, config: CalibrateSection, progress: Progress
) -> dict[int, float]:
    """Nodes → median seconds of a step, batch 1. The sizes take turns, so that a busy moment falls on all of them."""
    from medusa.config import SamplingParams
    from medusa.engine import Engine
    from medusa.tree import Tree
    from pipelines.timing import median_step_s, trace

    sizes = sorted({1, *(nodes for nodes in config.sizes if nodes <= len(paths) + 1)})
    prompt = min((row.prompt_ids for row in answers.rows), key=len)
    params = SamplingParams(max_tokens=config.tokens_per_size, ignore_eos=True)
    length = min(len(prompt) + config.tokens_per_size + 1, model.backbone.max_context)
    engines = {
        nodes: Engine(
            model.backbone,
            model.heads if nodes > 1 else None,
            tree=Tree.from_paths(paths[: nodes - 1]),
            max_batch_size=1,
            context_length=length,
        )
        for nodes in sizes
    }
    measured: dict[int, list[float]] = {nodes: [] for nodes in sizes}
    for turn in range(config.rounds + 1):  # the first warms up
        for nodes, engine in engines.items():
            seconds = median_step_s([trace(engine, prompt, params)])
            if turn:
                measured[nodes].append(seconds)
        progress(Step(done=turn, total=config.rounds, note="rounds of step times"))
    return {nodes: median(seconds) for nodes, seconds in measured.items()}


def expected_by_size(accuracy: Tensor, paths: Sequence[TreePath]) -> list[float]:
    """Expected tokens a step of the best tree of 1, 2, … nodes: the nested trees, each one path longer."""
    from medusa.tree_search import expected_tokens

    expected = [1.0]
    for path in paths:
        expected.append(expected[-1] + expected_tokens(accuracy, [path]) - 1.0)
    return expected


def draw_tree(file: Path, paths: Sequence[TreePath], accuracy: Tensor) -> Path:
    """The tree from the top down: a node bears its rank, an edge is as wide as its node is likely to be accepted."""
    from matplotlib.figure import Figure

    from medusa.tree import Tree
    from medusa.tree_search import expected_tokens

    tree = Tree.from_paths(paths)
    children: dict[int, list[int]] = {node: [] for node in range(tree.num_nodes)}
    for node in range(1, tree.num_nodes):
        children[tree.parents[node]].append(node)
    across: dict[int, float] = {}
    num_leaves = 0
    # Paths in lexicographic order visit leaves from left to right, and backwards children before parents.
    for node in sorted(tree.leaves, key=lambda leaf: tree.paths[leaf]):
        across[node] = num_leaves
        num_leaves += 1
    for node in sorted(children, key=lambda one: -tree.depths[one]):
        if children[node]:
            across[node] = sum(across[child] for child in children[node]) / len(children[node])
    figure = Figure(figsize=(max(4.0, 0.32 * num_leaves), 1.2 + 1.1 * tree.depth), layout="constrained")
    panel = figure.subplots()
    for node in range(1, tree.num_nodes):
        worth = expected_tokens(accuracy, [tree.paths[node]]) - 1.0
        parent = tree.parents[node]
        ends = [across[parent], across[node]], [-tree.depths[parent], -tree.depths[node]]
        panel.plot(*ends, color="tab:blue", linewidth=0.5 + 7 * worth, alpha=0.6, zorder=1, solid_capstyle="round")
    panel.scatter(
        [across[n] for n in children],
        [-tree.depths[n] for n in children],
        s=130,
        color="white",
        edgecolors="black",
        zorder=2,
    )
    for node, path in enumerate(tree.paths):
        label = str(path[-1] + 1) if path else "·"
        panel.text(across[node], -tree.depths[node], label, ha="center", va="center", fontsize=7, zorder=3)
    panel.set_yticks([-d for d in range(1, tree.depth + 1)], [f"head {d}" for d in range(1, tree.depth + 1)])
    panel.set_xticks([])
    panel.set_title(f"{tree.num_nodes} nodes; rank of each guess, width: probability of acceptance")
    figure.savefig(file, dpi=120)
    return file


def draw(path: Path, curve: tuple[SizeCost, ...], chosen: int, expected: Sequence[float]) -> Path:
    """Expected tokens (of every size), step time and their quotient (of the measured ones) over the tree's size."""
    from matplotlib.figure import Figure

    nodes = [cost.nodes for cost in curve]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].plot(range(1, len(expected) + 1), expected)
    panels[0].plot(nodes, [cost.expected_tokens for cost in curve], linestyle="", marker="o", color="C0")
    panels[0].set_title("expected tokens a step")
    panels[1].plot(nodes, [1000 * cost.step_s for cost in curve], marker="o")
    panels[1].set_title("step time, ms")
    panels[2].plot(nodes, [cost.tokens_per_s for cost in curve], marker="o")
    panels[2].set_title(f"expected tokens/s, best at {chosen} nodes")
    panels[2].axvline(chosen, linestyle=":")
    for panel in panels:
        panel.set_xlabel("nodes")
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main("calibrate", run)
