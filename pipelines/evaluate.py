"""What the heads are worth: acceleration rate, overhead, speedup and identity, tree against plain in the same engine.

acceleration rate = (tokens − 1) / verify steps; overhead = median tree step / median plain step; speedup = tokens per
second, tree / plain, same prompts and lengths, taking turns. Identity is with plain greedy decoding, token for token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medusa.errors import CheckpointError
from pipelines.config import Config, EvaluateSection
from pipelines.errors import StageError
from pipelines.inputs import inputs_key, machine, require_unchanged
from pipelines.models import load_model, trained_heads, use_threads
from pipelines.prompts import Prompt, evaluation_prompts
from pipelines.registry import folder_digest, open_registry
from pipelines.report import (
    Case,
    Details,
    Difference,
    Evaluation,
    Figures,
    Quality,
    log_report,
    report_of,
    write_report,
)
from pipelines.stage import Progress, Step, ignore_progress, main

if TYPE_CHECKING:
    from medusa import Model, SamplingParams, Tree
    from medusa.engine import Engine
    from pipelines.timing import Trace


logger = logging.getLogger(__name__)

GREEDY = "greedy"
Told = Callable[[int], None]  # how many answers were decoded since the last time


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The figures and where the report lies."""

    evaluation: Evaluation
    details: Details
    report: Path
    plot: Path
    measured_before: bool = False

    @property
    def summary(self) -> str:
        before = "; unchanged since, evaluate.again=true measures again" if self.measured_before else ""
        return f"{self.evaluation.headline}; report in {self.report}{before}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One turn as every contender is asked it. `prompt` is the prompt's id, `turn` counts from 1."""

    prompt: str
    turn: int
    category: str
    ids: list[int]

    @property
    def name(self) -> str:
        return f"{self.prompt}/{self.turn}" if self.turn > 1 else self.prompt


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two versions measured in one session: same prompts, same lengths, taking turns, beside the same plain decoding.

    `num_differing` of the challenger's answers are not its own backbone's plain ones, in `dtype`.
    """

    challenger: Figures
    champion: Figures
    num_differing: int
    dtype: str
    prompts_digest: str


def run(config: Config, progress: Progress = ignore_progress) -> EvaluateResult:
    """Measure the checkpoint in the working directory, and log the report to the registry if that is in reach.

    A report that was made of the same checkpoint, prompts and settings on such a machine stands as it is.
    Raises StageError (also where no answer has a second token, and where the checkpoint changes meanwhile), CheckpointError,
    ConfigError, PromptError, ValueError.
    """
    settings, folder = config.evaluate, trained_heads(config)
    prompts = evaluation_prompts(settings)
    digest = folder_digest(folder)
    key = _inputs(config, digest, prompts)
    if not settings.again and (made := report_of(config.layout.evaluation, key)) is not None:
        return EvaluateResult(
            evaluation=made.evaluation, details=made.details, report=made.page, plot=made.plot, measured_before=True
        )
    use_threads(None, processes=1)
    model = load_model(config.backbone, str(folder))
    trees = [model.tree, *(model.resolve_tree(size) for size in settings.nodes if size != model.tree.num_nodes)]
    schemes = [GREEDY, *(scheme for scheme in settings.schemes if scheme != GREEDY)]
    told = _teller(progress, settings, len(schemes), len(trees), len(prompts))

    questions = ask(model, prompts, settings.max_tokens, told)
    measured = {scheme: _measure_trees(model, questions, trees, scheme, settings, told) for scheme in schemes}
    plain, by_tree = measured[GREEDY]
    cases = tuple(
        _case(scheme, tree, questions, plains, found)
        for scheme, (plains, founds) in measured.items()
        for tree, found in zip(trees, founds, strict=True)
    )
    differences = differing(model, questions, plain, by_tree[0])
    checked, precise_differences = _check_identity(config, model, questions, plain, by_tree[0], told)
    headline = cases[0]
    quality = _quality(config, model, prompts) if is_tuned(model) else None
    require_unchanged(folder, folder_digest, digest)
    evaluation = Evaluation(
        num_prompts=headline.overall.num_answers,
        num_tokens=headline.overall.num_tokens,
        num_nodes=headline.num_nodes,
        dtype=_dtype(model),
        device=str(model.backbone.device),
        acceleration_rate=headline.overall.acceleration_rate,
        plain_step_s=headline.overall.plain_step_s,
        tree_step_s=headline.overall.tree_step_s,
        plain_tokens_per_s=headline.overall.plain_tokens_per_s,
        tree_tokens_per_s=headline.overall.tree_tokens_per_s,
        num_differing=headline.num_differing or 0,
        identity_checked=checked,
        identity_differing=len(precise_differences),
        prompts_digest=_digest(questions, settings),
        checkpoint_digest=digest,
        tuned=is_tuned(model),
        quality=quality,
    )
    details = Details(cases=cases, differences=tuple(dict.fromkeys([*differences, *precise_differences])))
    steps = [one.tokens_per_step[1:] for one in by_tree[0]]
    report, plot = write_report(config.layout.evaluation, evaluation, steps, details, inputs=key)
    _log(config, model, evaluation)
    return EvaluateResult(evaluation=evaluation, details=details, report=report, plot=plot)


def _inputs(config: Config, checkpoint: str, prompts: Sequence[Prompt]) -> str:
    """Names all that the evaluation of a checkpoint (its digest) depends on. ConfigError where `evaluate.text` cannot be read."""
    from pipelines.quality import heldout_paragraphs

    return inputs_key(
        checkpoint,
        config.backbone.model_dump(mode="json"),
        [asdict(prompt) for prompt in prompts],
        config.evaluate.text and heldout_paragraphs(config.evaluate.text),
        config.evaluate.model_dump(mode="json", exclude={"again", "path", "text"}),
        machine(),
    )


def compare(config: Config, *, challenger: Path, champion: Path, progress: Progress = ignore_progress) -> Comparison:
    """Measure two checkpoint folders side by side, as `config.evaluate` says, greedily, each with its own tree.

    The champion's backbone, decoding plainly, writes the conversations, sets the lengths, and is what both speedups
    are against. Raises CheckpointError where the challenger does not fit the configured backbone; StageError where the
    champion does not, which is no fault of the challenger, and where no answer has a second token.
    """
    settings = config.evaluate
    prompts = evaluation_prompts(settings)
    use_threads(None, processes=1)
    try:
        theirs = load_model(config.backbone, str(champion))
    except CheckpointError as error:
        raise StageError(
            f"the champion does not load with backbone.name={config.backbone.name}, so nothing is measured beside it: {error}; "
            "set backbone.name to its backbone, or promote.force=true to promote unmeasured"
        ) from error
    ours = _load_beside(config, theirs, challenger)
    total = len(prompts) * settings.max_turns * (1 + 3 * settings.rounds)
    done = 0

    def told(answers: int) -> None:
        nonlocal done
        done += answers
        progress(Step(done=min(done, total), total=total, note="answers, side by side"))

    questions = ask(theirs, prompts, settings.max_tokens, told)
    engines = {
        "champion": _engine(theirs, theirs.tree, questions, settings.max_tokens),
        "challenger": _engine(ours, ours.tree, questions, settings.max_tokens),
    }
    if ours.backbone is not theirs.backbone:
        engines["challenger, plain"] = _engine(ours, None, questions, settings.max_tokens)
    plain = _engine(theirs, None, questions, settings.max_tokens)
    plains, found = measure(plain, engines, questions, _params(GREEDY, settings.max_tokens), settings.rounds, told)
    _require_steps(plains)
    own_plain = found.get("challenger, plain", plains)
    pairs = zip(own_plain, found["challenger"], strict=True)
    return Comparison(
        challenger=figures(plains, found["challenger"]),
        champion=figures(plains, found["champion"]),
        num_differing=sum(one.token_ids != other.token_ids for one, other in pairs),
        dtype=_dtype(ours),
        prompts_digest=_digest(questions, settings),
    )


def ask(model: Model, prompts: Sequence[Prompt], max_tokens: int, told: Told) -> list[Question]:
    """Every turn of every prompt, the later ones behind the model's own plain greedy answers to the earlier.

    Turns that do not fit the context with their answers are told and left out, the turns behind them too.
    """
    from medusa.errors import PromptError
    from pipelines.timing import trace

    length = model.backbone.max_context
    plain: Engine | None = None
    questions = []
    for prompt in prompts:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system is not None else []
        category = prompt.category or prompt.source
        for turn, text in enumerate(prompt.turns, start=1):
            messages.append({"role": "user", "content": text})
            try:
                ids = model.encode(messages)
            except PromptError as error:
                logger.warning("prompt %s, turn %d is left out: %s", prompt.id, turn, error)
                break
            if len(ids) + max_tokens > length:
                logger.warning("prompt %s, turn %d has %d tokens, too many; left out", prompt.id, turn, len(ids))
                break
            questions.append(Question(prompt=prompt.id, turn=turn, category=category, ids=ids))
            if turn < len(prompt.turns):
                plain = _roomy(plain, model, len(ids) + max_tokens)
                answer = trace(plain, ids, _params(GREEDY, max_tokens))
                spoken = model.backbone.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                messages.append({"role": "assistant", "content": spoken})
            told(1)
    if not questions:
        raise StageError(f"no evaluation prompt fits the context with evaluate.max_tokens {max_tokens}; lower it")
    return questions


def measure(
    plain: Engine,
    trees: Mapping[str, Engine],
    questions: Sequence[Question],
    params: SamplingParams,
    rounds: int,
    told: Told,
) -> tuple[list[Trace], dict[str, list[Trace]]]:
    """Each question plainly, then by every tree to exactly that length; the trees' order changes with each question.

    So a busy moment of the machine, or a warm cache, falls on all alike.
    """
    from dataclasses import replace

    from pipelines.timing import trace

    for engine in (plain, *trees.values()):  # warm-up
        trace(engine, questions[0].ids, replace(params, max_tokens=min(8, params.max_tokens), ignore_eos=True))
    plains: list[Trace] = []
    found: dict[str, list[Trace]] = {name: [] for name in trees}
    names = list(trees)
    for number, question in enumerate([*questions] * rounds):
        keyed = replace(params, seed=number % len(questions))
        first = trace(plain, question.ids, keyed)
        plains.append(first)
        same_length = replace(keyed, max_tokens=len(first.token_ids), ignore_eos=True)
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            found[name].append(trace(trees[name], question.ids, same_length))
        told(1 + len(names))
    return plains, found


def figures(plain: Sequence[Trace], tree: Sequence[Trace]) -> Figures:
    """The same answers plainly and by tree."""
    from pipelines.timing import median_step_s, tokens_per_s

    return Figures(
        num_answers=len(tree),
        num_tokens=sum(len(one.token_ids) for one in tree),
        num_steps=sum(one.num_steps for one in tree),
        plain_step_s=median_step_s(plain),
        tree_step_s=median_step_s(tree),
        plain_tokens_per_s=tokens_per_s(plain),
        tree_tokens_per_s=tokens_per_s(tree),
    )


def depth_reached(traces: Sequence[Trace], depth: int) -> tuple[float, ...]:
    """For each depth 1 … `depth`, the share of all steps that emitted a path at least so long. An answer's last step
    counts as it was cut."""
    accepted = [tokens - 1 for one in traces for tokens in one.tokens_per_step[1:]]
    return tuple(sum(count >= level for count in accepted) / max(len(accepted), 1) for level in range(1, depth + 1))


def differing(
    model: Model, questions: Sequence[Question], plain: Sequence[Trace], tree: Sequence[Trace]
) -> list[Difference]:
    """Where each differing greedy answer first parts from the plain one. Repeated rounds count as rows of their own."""
    found = []
    for number, (one, other) in enumerate(zip(plain, tree, strict=True)):
        if one.token_ids == other.token_ids:
            continue
        question = questions[number % len(questions)]
        ours, theirs = one.token_ids, other.token_ids
        pairs = zip(ours, theirs, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        found.append(
            Difference(
                prompt=question.name,
                dtype=_dtype(model),
                position=place,
                plain_token=ours[place] if place < len(ours) else None,
                tree_token=theirs[place] if place < len(theirs) else None,
                margin=logit_margin(model, [*question.ids, *ours[:place]]),
            )
        )
    return found


def logit_margin(model: Model, ids: Sequence[int]) -> float:
    """How far the best next token's logit lies above the second's behind `ids`."""
    import torch

    backbone = model.backbone
    with torch.inference_mode():
        hidden = backbone.hidden_states(torch.tensor([list(ids)], device=backbone.device))[0, -1:]
        best = backbone.logits(hidden.to(backbone.step_dtype))[0].double().topk(2).values
    return float(best[0] - best[1])


def is_tuned(model: Model) -> bool:
    """Does the checkpoint bring a backbone of its own (MEDUSA-2)?"""
    return getattr(model.checkpoint, "adapters", None) is not None


def _measure_trees(
    model: Model,
    questions: Sequence[Question],
    trees: Sequence[Tree],
    scheme: str,
    settings: EvaluateSection,
    told: Told,
) -> tuple[list[Trace], list[list[Trace]]]:
    engines = {str(i): _engine(model, tree, questions, settings.max_tokens) for i, tree in enumerate(trees)}
    plain = _engine(model, None, questions, settings.max_tokens)
    plains, found = measure(plain, engines, questions, _params(scheme, settings.max_tokens), settings.rounds, told)
    _require_steps(plains)
    return plains, list(found.values())


def _require_steps(plain: Sequence[Trace]) -> None:
    """StageError where no answer has a second token: what is not decoded in steps has no rate and no overhead."""
    if not any(one.num_steps for one in plain):
        raise StageError(
            f"all {len(plain)} answers end at their first token, so there is no step to measure; give prompts that are "
            "answered at more length (evaluate.path)"
        )


def _check_identity(
    config: Config,
    model: Model,
    questions: Sequence[Question],
    plain: Sequence[Trace],
    tree: Sequence[Trace],
    told: Told,
) -> tuple[int, list[Difference]]:
    """(answers compared in float32, those that differ): what was measured already if that was float32."""
    from medusa.backbone import parse_dtype

    settings = config.evaluate
    chosen = dict.fromkeys(question.prompt for question in questions)
    names = set(list(chosen)[: settings.identity_prompts])
    wanted = [number for number, question in enumerate(questions) if question.prompt in names]
    asked = [questions[number] for number in wanted]
    if model.backbone.dtype == parse_dtype("float32"):
        return len(asked), differing(model, asked, [plain[i] for i in wanted], [tree[i] for i in wanted])
    precise = load_model(config.backbone, str(config.layout.checkpoint), dtype="float32")
    engines = {"tree": _engine(precise, precise.tree, asked, settings.max_tokens)}
    alone = _engine(precise, None, asked, settings.max_tokens)
    plains, found = measure(alone, engines, asked, _params(GREEDY, settings.max_tokens), 1, told)
    return len(asked), differing(precise, asked, plains, found["tree"])


def _case(
    scheme: str, tree: Tree, questions: Sequence[Question], plain: Sequence[Trace], found: Sequence[Trace]
) -> Case:
    rows = [questions[number % len(questions)].category for number in range(len(found))]
    by_category = {
        category: figures(
            [one for one, row in zip(plain, rows, strict=True) if row == category],
            [one for one, row in zip(found, rows, strict=True) if row == category],
        )
        for category in dict.fromkeys(rows)
    }
    same = [one.token_ids == other.token_ids for one, other in zip(plain, found, strict=True)]
    return Case(
        scheme=scheme,
        num_nodes=tree.num_nodes,
        overall=figures(plain, found),
        by_category=by_category,
        depth_reached=depth_reached(found, tree.depth),
        num_differing=None if scheme.startswith("typical") else same.count(False),
    )


def _quality(config: Config, model: Model, prompts: Sequence[Prompt]) -> Quality:
    """The quality guard: the tuned backbone beside the original, on the original's answers and on human text."""
    from medusa.engine import Request
    from pipelines.quality import compare_backbones, heldout_paragraphs

    original = load_model(config.backbone, "none")
    settings = config.evaluate
    paragraphs = heldout_paragraphs(settings.text)
    params = _params(GREEDY, settings.max_tokens)
    questions = ask(original, prompts, settings.max_tokens, lambda _: None)
    engine = _engine(original, None, questions, settings.max_tokens, batch=8)
    requests = [Request(prompt_ids=q.ids, params=params, request_id=str(i)) for i, q in enumerate(questions)]
    answers = {int(done.request_id): done.token_ids for done in engine.run(requests)}
    return compare_backbones(
        model.backbone,
        original.backbone,
        answers=[(question.ids, answers[i]) for i, question in enumerate(questions)],
        texts=[original.backbone.tokenizer(text)["input_ids"] for text in paragraphs],
    )


def _load_beside(config: Config, loaded: Model, folder: Path) -> Model:
    """Another checkpoint of the same backbone: on the weights that are there, unless one of the two has tuned its own."""
    from medusa import Model
    from medusa.checkpoint import load_checkpoint

    if not is_tuned(loaded):
        checkpoint = load_checkpoint(folder, backbone=loaded.backbone)
        beside = Model(loaded.backbone, checkpoint.heads, checkpoint)
        if not is_tuned(beside):
            return beside
    return load_model(config.backbone, str(folder))


def _engine(
    model: Model, tree: Tree | None, questions: Sequence[Question], max_tokens: int, *, batch: int = 1
) -> Engine:
    """An engine with room for these questions; plain decoding where there is no tree."""
    from medusa.engine import Engine

    length = min(max(len(question.ids) for question in questions) + max_tokens, model.backbone.max_context)
    heads = model.heads if tree is not None else None
    return Engine(model.backbone, heads, tree=tree, max_batch_size=batch, context_length=length)


def _roomy(engine: Engine | None, model: Model, need: int) -> Engine:
    """`engine` if a request of `need` tokens fits it; else one with room for twice that."""
    from medusa.engine import Engine

    if engine is not None and engine.context_length >= need:
        return engine
    return Engine(model.backbone, None, max_batch_size=1, context_length=min(2 * need, model.backbone.max_context))


def _params(scheme: str, max_tokens: int) -> SamplingParams:
    """What a scheme's name means to the engine: see `EvaluateSection`."""
    from medusa import SamplingParams

    name, _, temperature = scheme.partition("@")
    if name == GREEDY:
        return SamplingParams(max_tokens=max_tokens)
    return SamplingParams(max_tokens=max_tokens, temperature=float(temperature), acceptance=name)  # type: ignore[arg-type]


def _digest(questions: Sequence[Question], settings: EvaluateSection) -> str:
    from pipelines.timing import prompts_digest

    return prompts_digest([question.ids for question in questions], settings.max_tokens)


def _dtype(model: Model) -> str:
    from medusa.backbone import dtype_name

    return dtype_name(model.backbone.dtype)


def _teller(progress: Progress, settings: EvaluateSection, num_schemes: int, num_trees: int, num_prompts: int) -> Told:
    """Progress in answers. The total is exact where every prompt has all its turns and all fit."""
    turns = num_prompts * settings.max_turns
    identity = 2 * min(settings.identity_prompts * settings.max_turns, turns)
    total = turns * (1 + num_schemes * settings.rounds * (1 + num_trees)) + identity
    done = 0

    def told(answers: int) -> None:
        nonlocal done
        done += answers
        progress(Step(done=min(done, total), total=total, note="answers"))

    return told


def _log(config: Config, model: Model, evaluation: Evaluation) -> None:
    """A registry out of reach costs nothing: `register` logs the report again."""
    assert model.checkpoint is not None
    try:
        registry = open_registry(config)
        run_id = registry.run_of(model.checkpoint.card, evaluation.checkpoint_digest)
        log_report(registry, run_id, config.layout.evaluation, evaluation)
    except (StageError, OSError) as error:
        logger.warning("the report is not logged: %s", error)


if __name__ == "__main__":
    main("evaluate", run)
