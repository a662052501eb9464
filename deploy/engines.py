"""How serving sets up an engine: its size, its caches, a tree that gives way to load. Knows no loop and no clients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from medusa.backbone import Backbone
from medusa.engine import Engine, StepRecord
from medusa.errors import MedusaError
from medusa.generate import Model
from medusa.tree_policy import StepCosts, TreePolicy, expected_by_size, measure_step_costs
from pipelines.config import ServeSection

logger = logging.getLogger(__name__)


class EngineMaker:
    """Makes engines of one model, the first and, after a failed step, the next. Measures step times at most once.

    `costs` that an earlier maker measured stand where they cover this tree's sizes: beside an engine at work new ones
    would tell of that engine as well. Heads without measured accuracy always use their whole tree.
    """

    def __init__(
        self,
        model: Model,
        settings: ServeSection,
        *,
        costs: StepCosts | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._on_step = on_step
        self._policy: TreePolicy | None = None
        self.costs = costs

    def __call__(self) -> Engine:
        model, settings = self._model, self._settings
        engine = Engine(
            model.backbone,
            model.heads,
            tree=model.resolve_tree(settings.tree),
            max_batch_size=settings.max_batch_size,
            context_length=min(settings.context_length, model.backbone.max_context),
            prefix_cache_tokens=settings.prefix_cache_tokens,
            on_step=self._on_step,
            graphs=settings.cuda_graphs,
        )
        if settings.adaptive_tree:
            self._policy = self._policy or self._fit(engine)
            engine.policy = self._policy
        _prepare_grammars(model.backbone)
        return engine

    def _fit(self, engine: Engine) -> TreePolicy | None:
        checkpoint = self._model.checkpoint
        if checkpoint is None or checkpoint.accuracy is None or engine.tree.num_nodes == 1:
            return None
        expected = expected_by_size(checkpoint.accuracy, engine.tree)
        if self.costs is None or not _covers(self.costs, expected, engine.max_batch_size):
            self.costs = measure_step_costs(engine.decoder, expected)
        policy = TreePolicy(expected=expected, costs=self.costs)
        chosen = {batch: policy.choose(batch) for batch in sorted(self.costs.seconds)}
        logger.info("tree nodes by number of running requests: %s", chosen)
        return policy


def _prepare_grammars(backbone: Backbone) -> None:
    """Read the vocabulary now, which takes a second: the engine's first request with a grammar would make all others wait.

    A backbone that cannot serve grammars serves all else; a request that asks for one is told why.
    """
    try:
        _ = backbone.grammar_vocabulary
    except MedusaError as error:
        logger.warning("no answer can be held to a grammar: %s", error)


def _covers(costs: StepCosts, expected: Mapping[int, float], max_batch_size: int) -> bool:
    measured = costs.seconds
    return set(expected) <= set(measured[min(measured)]) and max_batch_size <= max(measured)
