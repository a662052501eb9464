"""Our engines by what the command line calls their trees. Knows models; times nothing but what a tree that follows the
load must know of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.command import choose_trees
from benchmarks.contenders import PLAIN, OurEngine
from medusa.engine import Engine
from medusa.generate import Model
from medusa.heads import MedusaHeads
from medusa.tree import Tree
from medusa.tree_policy import fit_policy

ADAPTIVE, CHAIN = "adaptive", "chain"
OUR_CHAIN = "our chain"
INT8 = "int8 "


def our_engines(
    model: Model, choices: Sequence[str], *, max_batch_size: int, context_length: int, kind: str = ""
) -> list[OurEngine]:
    """Plain, and an engine for each choice: nodes, "dynamic:N", "adaptive" (the model's own tree, cut by the load), or
    "chain" (each head's best guess). Without any, the model's own tree. `kind` goes before every name. ValueError for what
    the heads cannot fill."""
    make = partial(Engine, model.backbone, max_batch_size=max_batch_size, context_length=context_length)
    engines = [OurEngine(make(), name=kind + PLAIN)]
    for choice in dict.fromkeys(choices) or [str(model.tree.num_nodes)]:
        if choice == ADAPTIVE:
            engines.append(OurEngine(_following_load(model, make), name=f"{kind}adaptive {model.tree}"))
        elif choice == CHAIN:
            heads = _unrestricted(model)
            engines.append(OurEngine(make(heads, tree=Tree.chain(heads.num_heads)), name=kind + OUR_CHAIN))
        else:
            (tree,) = choose_trees(model, [choice])
            engines.append(OurEngine(make(model.heads, tree=tree), name=f"{kind}{tree}"))
    return engines


def _following_load(model: Model, make: Callable[..., Engine]) -> Engine:
    accuracy = model.checkpoint.accuracy if model.checkpoint else None
    if accuracy is None:
        raise ValueError("an adaptive tree needs the heads' accuracy; calibrate them, or name another tree")
    engine = make(model.heads, tree=model.tree)
    engine.policy = fit_policy(engine.decoder, accuracy)
    return engine


def _unrestricted(model: Model) -> MedusaHeads:
    """The same heads guessing among all tokens, as an export for vLLM has them: only so are the two chains one."""
    heads = model.heads
    if heads is None:
        raise ValueError("a chain needs Medusa heads; load the model with heads, or leave the chain out")
    if heads.vocabulary is None:
        return heads
    first = next(heads.parameters())
    whole = MedusaHeads(
        heads.config, hidden_size=heads.hidden_size, vocab_size=heads.vocab_size, dtype=first.dtype, device=first.device
    )
    whole.load_state_dict(heads.state_dict())
    return whole
