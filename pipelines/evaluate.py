"""What the heads are worth: acceleration rate, overhead, speedup and identity, tree against plain in the same engine.

acceleration rate = (tokens − 1) / verify steps; overhead = median tree step / median plain step; speedup = tokens per
second, tree / plain, same prompts and lengths, taking turns. Identity is with plain greedy decoding, token for token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import Config
from pipelines.errors import StageError
from pipelines.models import load_model, use_threads
from pipelines.prompts import Prompt, evaluation_prompts
from pipelines.registry import folder_digest
from pipelines.report import Evaluation, write_report
from pipelines.stage import Progress, Step, ignore_progress, main

if TYPE_CHECKING:
    from medusa import Model
    from medusa.engine import Engine
    from pipelines.timing import Trace


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The figures and where the report lies."""

    evaluation: Evaluation
    report: Path
    plot: Path

    @property
    def summary(self) -> str:
        return f"{self.evaluation.headline}; report in {self.report}"


@dataclass(frozen=True, kw_only=True)
class _Pair:
    plain: Trace
    tree: Trace

    @property
    def identical(self) -> bool:
        return self.plain.token_ids == self.tree.token_ids


def run(config: Config, progress: Progress = ignore_progress) -> EvaluateResult:
    """Measure the checkpoint in the working directory. Raises StageError, CheckpointError, ConfigError, PromptError."""
    from medusa.backbone import parse_dtype

    settings = config.evaluate
    if not config.layout.checkpoint.is_dir():
        raise StageError(f"no checkpoint at {config.layout.checkpoint}; run `train` first")
    prompts = evaluation_prompts(settings)
    num_checked = min(settings.identity_prompts, len(prompts))
    total = settings.rounds * len(prompts) + num_checked
    use_threads(None, processes=1)

    def step(done: int) -> None:
        progress(Step(done=done, total=total, note="prompts"))

    model = load_model(config.backbone, str(config.layout.checkpoint))
    ids = _encode(model, prompts, settings.max_tokens)
    pairs = _measure(model, ids * settings.rounds, settings.max_tokens, step)
    exact = parse_dtype("float32")
    if model.backbone.dtype == exact or not num_checked:
        checked = pairs[:num_checked]
    else:
        precise = load_model(config.backbone, str(config.layout.checkpoint), dtype="float32")
        checked = _measure(precise, ids[:num_checked], settings.max_tokens, lambda done: step(len(pairs) + done))
    evaluation = _summarise(pairs, checked, config, model, ids)
    report, plot = write_report(config.layout.evaluation, evaluation, [pair.tree.tokens_per_step[1:] for pair in pairs])
    return EvaluateResult(evaluation=evaluation, report=report, plot=plot)


def _encode(model: Model, prompts: Sequence[Prompt], max_tokens: int) -> list[list[int]]:
    """Token ids of the prompts that fit the context with their answers; the others are told and left out."""
    fitting = []
    for prompt in prompts:
        ids = model.encode(_messages(prompt.system, prompt.turns[0]))
        if len(ids) + max_tokens <= model.backbone.max_context:
            fitting.append(ids)
        else:
            logger.warning("prompt %s has %d tokens, too many for the context; left out", prompt.id, len(ids))
    if not fitting:
        raise StageError(f"no evaluation prompt fits the context with evaluate.max_tokens {max_tokens}; lower it")
    return fitting


def _measure(model: Model, prompts: list[list[int]], max_tokens: int, step: Callable[[int], None]) -> list[_Pair]:
    """Each prompt plainly, then by tree to exactly the same length."""
    from medusa.config import SamplingParams
    from medusa.engine import Engine
    from pipelines.timing import trace

    length = min(max(map(len, prompts)) + max_tokens, model.backbone.max_context)
    plain: Engine = Engine(model.backbone, None, max_batch_size=1, context_length=length)
    tree: Engine = Engine(model.backbone, model.heads, tree=model.tree, max_batch_size=1, context_length=length)
    for engine in (plain, tree):
        trace(engine, prompts[0], SamplingParams(max_tokens=min(8, max_tokens), ignore_eos=True))  # warm-up
    pairs = []
    for done, ids in enumerate(prompts, start=1):
        first = trace(plain, ids, SamplingParams(max_tokens=max_tokens))
        second = trace(tree, ids, SamplingParams(max_tokens=len(first.token_ids), ignore_eos=True))
        pairs.append(_Pair(plain=first, tree=second))
        step(done)
    return pairs


def _summarise(
    pairs: list[_Pair], checked: list[_Pair], config: Config, model: Model, ids: list[list[int]]
) -> Evaluation:
    from pipelines.timing import median_step_s, prompts_digest

    def tokens_per_s(traces: list[Trace]) -> float:
        return sum(len(one.token_ids) for one in traces) / sum(one.total_s for one in traces)

    plain, tree = [pair.plain for pair in pairs], [pair.tree for pair in pairs]
    steps = sum(one.num_steps for one in tree)
    return Evaluation(
        num_prompts=len(ids),
        num_tokens=sum(len(one.token_ids) for one in tree),
        num_nodes=model.tree.num_nodes,
        dtype=str(model.backbone.dtype).removeprefix("torch."),
        device=str(model.backbone.device),
        acceleration_rate=sum(len(one.token_ids) - 1 for one in tree) / steps if steps else 1.0,
        plain_step_s=median_step_s(plain),
        tree_step_s=median_step_s(tree),
        plain_tokens_per_s=tokens_per_s(plain),
        tree_tokens_per_s=tokens_per_s(tree),
        num_differing=sum(not pair.identical for pair in pairs),
        identity_checked=len(checked),
        identity_differing=sum(not pair.identical for pair in checked),
        prompts_digest=prompts_digest(ids, config.evaluate.max_tokens),
        checkpoint_digest=folder_digest(config.layout.checkpoint),
    )


def _messages(system: str | None, turn: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": turn}]


if __name__ == "__main__":
    main("evaluate", run)
