"""The simple face: text in, text or a stream of it out. Knows tokenizer and engine; knows nothing of HTTP or Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path as FilePath
from typing import Any, overload

import torch
from torch import Tensor

from medusa.attention import GpuKernels
from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import Checkpoint, load_checkpoint
from medusa.config import SamplingParams
from medusa.detokenize import TextStream
from medusa.dynamic_tree import DynamicTree
from medusa.engine import Completion, Engine, Request, Stats, check_request
from medusa.errors import PromptError
from medusa.grammar_masks import Guide
from medusa.heads import MedusaHeads
from medusa.logprobs import TokenLogprob
from medusa.pretrained import heads_folder
from medusa.provision import DEFAULT_BACKBONE
from medusa.tree import Tree
from medusa.tree_policy import MEASURED_LENGTH, TreePolicy, fit_policy

Message = dict[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
DYNAMIC, AUTO = "dynamic", "auto"
AUTO_NODES = 64  # the largest tree that "auto" tries
AUTO_BUDGET_S = 1.0
StaticChoice = Tree | int | Sequence[Sequence[int]] | None
TreeChoice = StaticChoice | DynamicTree | str
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An answer. `token_ids` includes the end-of-sequence token and, after a stop string, the tokens that completed it;
    `logprobs` stands beside it where `logprobs=` asked for them."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: Stats
    logprobs: tuple[TokenLogprob, ...] = ()


class Chunk(str):
    """A piece of streamed text, with the tokens that one step accepted. `step` 0 is the prefill; the last piece of an
    answer also carries its `generation`."""

    token_ids: tuple[int, ...]
    step: int
    generation: Generation | None

    @classmethod
    def of(cls, text: str, token_ids: Sequence[int], step: int, generation: Generation | None = None) -> Chunk:
        chunk = cls(text)
        chunk.token_ids, chunk.step, chunk.generation = tuple(token_ids), step, generation
        return chunk


class Model:
    """A backbone with its heads, or without: then it decodes plainly, by the same code. Make one with `medusa.load`."""

    def __init__(self, backbone: Backbone, heads: MedusaHeads | None, checkpoint: Checkpoint | None = None) -> None:
        self.backbone = backbone
        self.heads = heads
        self.checkpoint = checkpoint
        self._idle: Engine | None = None  # one alone, since each holds a cache
        self._fastest: Tree | None = None  # what "auto" is here
        self._policy: TreePolicy | None = None  # and how many of its nodes several sequences use

    @property
    def tree(self) -> Tree:
        """The tree used where none is asked for."""
        return self.resolve_tree(None)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        stop: str | Sequence[str] = (),
        tree: TreeChoice = None,
        max_batch_size: int = 8,
        **sampling: Any,
    ) -> Any:
        """Answer a prompt — text, chat messages or token ids — or a list of them; a list comes back for a list.

        `sampling` are the fields of `SamplingParams` (max_tokens, temperature, top_p, top_k, seed, acceptance, epsilon,
        delta, root, logit_bias, logprobs, …). `tree` is a number of nodes, paths, a `Tree`, "dynamic:N", or "auto": as many
        nodes as decode fastest here, by steps timed at its first use and at the first list as long; typical acceptance, whose
        answers depend on the tree, takes as many for a list as for one. Raises PromptError and ValueError.
        """
        many, batch = _as_batch(prompts)
        if not batch:
            return []
        params = SamplingParams(**sampling)
        streams = [TextStream(self.backbone.tokenizer, _stops(stop)) for _ in batch]
        requests = [
            Request(prompt_ids=self.encode(prompt), params=params, request_id=str(i), on_token=stream.push)
            for i, (prompt, stream) in enumerate(zip(batch, streams, strict=True))
        ]
        chosen = self._checked_tree(requests, tree)
        engine = self._take_engine(requests, tree=chosen, max_batch_size=min(max_batch_size, len(batch)))
        engine.policy = self._policy_for(engine) if _is_auto(tree) else None
        done = {completion.request_id: completion for completion in engine.run(requests)}
        self._idle = engine
        results = [_generation(done[str(i)], stream) for i, stream in enumerate(streams)]
        return results if many else results[0]

    def stream(
        self, prompt: Prompt, *, stop: str | Sequence[str] = (), tree: TreeChoice = None, **sampling: Any
    ) -> Iterator[Chunk]:
        """The answer in pieces, one for each step as soon as it is accepted; a piece may be empty text.

        Leaving the iterator early cancels the request. Bad input raises at once, not at the first piece.
        """
        text = TextStream(self.backbone.tokenizer, _stops(stop))
        params = SamplingParams(**sampling)
        request = Request(prompt_ids=self.encode(prompt), params=params, on_token=text.push)
        return self._pieces(request, self._checked_tree([request], tree), text)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, the chat template applied; a string is one user turn, a developer's message the system's.

        Raises PromptError, for a role too that is neither a usual one nor named in the template: many take any.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt is empty; give some text")
            prompt = [{"role": "user", "content": prompt}]
        items = _items(prompt)
        if not items:
            raise PromptError("the prompt is empty; give text, chat messages or token ids")
        if all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
            return [int(item) for item in items]
        messages = [_message(item, index) for index, item in enumerate(items)]
        tokenizer = self.backbone.tokenizer
        if not tokenizer.chat_template:
            if len(messages) > 1:
                raise PromptError(f"backbone {self.backbone.name} has no chat template; give one text or token ids")
            return list(tokenizer(messages[0]["content"])["input_ids"])
        template = str(tokenizer.chat_template).replace('"', "'")
        for index, message in enumerate(messages):
            if (role := message["role"]) not in _ROLES and f"'{role}'" not in template:
                raise PromptError(
                    f"message {index} has the role {role!r:.60}, which the chat template of {self.backbone.name} does not "
                    f"know; give one of {', '.join(_ROLES)}"
                )
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        except Exception as error:  # templates are programs of the model's author and raise what they like
            raise PromptError(f"the chat template of {self.backbone.name} refuses these messages: {error}") from error
        return list(ids["input_ids"])

    @overload
    def resolve_tree(self, tree: StaticChoice) -> Tree: ...

    @overload
    def resolve_tree(self, tree: TreeChoice) -> Tree | DynamicTree: ...

    def resolve_tree(self, tree: TreeChoice) -> Tree | DynamicTree:
        """The tree that is asked for, None for the checkpoint's own. ValueError where the heads cannot fill it.

        Text is a number of nodes, "dynamic" (as many nodes as the checkpoint's own, the likeliest for each context),
        "dynamic:N", or "auto" (as many nodes as decode one sequence fastest here).
        """
        if self.heads is None:
            if tree not in (None, 1, "1", Tree.root_only()):
                raise ValueError("a tree needs Medusa heads; load the model with heads, or leave the tree out")
            return Tree.root_only()
        chosen = self._choose(tree)
        chosen.check_fits(num_heads=self.heads.num_heads, vocab_size=self.heads.num_choices)
        return chosen

    def _choose(self, tree: TreeChoice) -> Tree | DynamicTree:
        if isinstance(tree, (Tree, DynamicTree)):
            return tree
        if isinstance(tree, str):
            kind, _, count = tree.partition(":")
            if tree.removeprefix("-").isdecimal():
                return self._choose(int(tree))
            if tree == AUTO:
                return self._fastest_tree()
            if tree != DYNAMIC and not (kind == DYNAMIC and count.isdecimal()):
                raise ValueError(f'tree must be a number of nodes, "auto", "dynamic" or "dynamic:N", got {tree!r}')
            return self._dynamic(int(count) if count else None)
        if tree is None or isinstance(tree, int):
            if tree is not None and (isinstance(tree, bool) or tree < 1):
                raise ValueError(f"tree must have at least 1 node, got {tree}")
            return self._chain(tree) if self.checkpoint is None else self.checkpoint.tree(tree)
        try:
            return Tree.from_paths(tree)
        except TypeError:
            raise ValueError(
                f"tree must be a number of nodes, a Tree, or paths like [[0], [0, 0]], got {tree!r}"
            ) from None

    def _chain(self, num_nodes: int | None) -> Tree:
        """Heads without a checkpoint have no tree of their own: each one's best guess, one below the other."""
        assert self.heads is not None
        chain = Tree.chain(self.heads.num_heads)
        if num_nodes is not None and num_nodes > chain.num_nodes:
            raise ValueError(
                f"heads without a checkpoint have a chain of {chain.num_nodes} nodes at most, got {num_nodes}"
            )
        return chain if num_nodes is None else chain.first(num_nodes)

    def _dynamic(self, num_nodes: int | None) -> DynamicTree:
        if self.checkpoint is None:
            raise ValueError("a dynamic tree needs a checkpoint's accuracies; give a DynamicTree of your own superset")
        return self.checkpoint.dynamic_tree(num_nodes)

    def _fastest_tree(self) -> Tree:
        """What "auto" is, measured at its first use."""
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.accuracy is None:
            raise ValueError(
                'tree "auto" needs heads whose accuracy is known; calibrate them, or give a number of nodes'
            )
        if self._fastest is None:
            self._idle = None  # its cache goes before another is made
            largest = checkpoint.tree(min(AUTO_NODES, len(checkpoint.paths) + 1))
            length = min(2 * MEASURED_LENGTH, self.backbone.max_context)
            engine = Engine(self.backbone, self.heads, tree=largest, max_batch_size=1, context_length=length)
            self._fastest = largest.first(self._fit(engine).choose(1))
        return self._fastest

    def _policy_for(self, engine: Engine) -> TreePolicy | None:
        """How many nodes of "auto" the sequences of an idle engine use, by how many they are; None: all."""
        if engine.max_batch_size == 1 or engine.tree.num_nodes == 1:
            return None
        if self._policy is None or max(self._policy.costs.seconds) < engine.max_batch_size:
            self._policy = self._fit(engine)
        return self._policy

    def _fit(self, engine: Engine) -> TreePolicy:
        assert self.checkpoint is not None and self.checkpoint.accuracy is not None
        return fit_policy(engine.decoder, self.checkpoint.accuracy, budget_s=AUTO_BUDGET_S)

    def _checked_tree(self, requests: Sequence[Request], tree: TreeChoice) -> Tree | DynamicTree:
        """The tree asked for. PromptError and ValueError for what no engine could serve, before one is made or measured."""
        chosen = None if _is_auto(tree) else self.resolve_tree(tree)
        for request in requests:
            check_request(request, context_length=self.backbone.max_context, vocab_size=self.backbone.vocab_size)
        for grammar in {request.params.grammar for request in requests if request.params.grammar}:
            Guide(grammar, self.backbone.grammar_vocabulary)
        return self.resolve_tree(tree) if chosen is None else chosen

    def _take_engine(self, requests: Sequence[Request], *, tree: Tree | DynamicTree, max_batch_size: int) -> Engine:
        """An engine with room for these requests, the caller's alone: the idle one if it fits, else a new one.

        It becomes the idle one again when its work is done; after an error or Ctrl-C within a step it is dropped.
        """
        need = max(len(request.prompt_ids) + request.params.max_tokens for request in requests)
        idle, self._idle = self._idle, None
        if idle and (idle.tree, idle.max_batch_size) == (tree, max_batch_size) and idle.context_length >= need:
            return idle
        idle = None  # its cache goes before another is made
        length = min(max(2 * need, 512), self.backbone.max_context)
        return Engine(self.backbone, self.heads, tree=tree, max_batch_size=max_batch_size, context_length=length)

    def _pieces(self, request: Request, tree: Tree | DynamicTree, text: TextStream) -> Iterator[Chunk]:
        engine = self._take_engine([request], tree=tree, max_batch_size=1)
        engine.submit(request)
        step = 0
        try:
            while engine.has_work:
                for delta in engine.step():
                    done = delta.completion
                    piece = text.take() if done is None else text.take() + text.finish()
                    yield Chunk.of(piece, delta.token_ids, step, _generation(done, text) if done else None)
                    step += 1
        except GeneratorExit:  # left early, between two steps
            engine.cancel(request.request_id)
        self._idle = engine


def load(
    backbone: str | FilePath = DEFAULT_BACKBONE,
    *,
    heads: str | FilePath | None = "default",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    force: bool = False,
    fused: bool = True,
    gpu_kernels: GpuKernels | None = None,
) -> Model:
    """A model ready to generate.

    `backbone` is the built-in default, a folder or a hub id; `heads` a checkpoint folder, `"default"`, `"plain"` or `"medusa2"`
    (trained heads that come with this package, for the default backbone) or None (plain decoding, the original backbone).
    A MEDUSA-2 checkpoint, `"medusa2"` too, brings its tuned backbone: its adapters are merged. `force` uses heads made for
    other weights; `fused` and `gpu_kernels` as in `load_backbone`. Raises BackboneError, CheckpointError, ValueError.
    """
    loaded = load_backbone(backbone, dtype=dtype, device=device, fused=fused, gpu_kernels=gpu_kernels)
    if heads is None:
        return Model(loaded, None)
    checkpoint = load_checkpoint(heads_folder(heads, loaded.name), backbone=loaded, force=force)
    if checkpoint.adapters is not None:
        loaded.merge(checkpoint.adapters)
    return Model(loaded, checkpoint.heads, checkpoint)


def _is_auto(tree: TreeChoice) -> bool:
    return isinstance(tree, str) and tree == AUTO


def _generation(completion: Completion, stream: TextStream) -> Generation:
    if completion.error is not None:
        raise PromptError(completion.error)
    stream.finish()
    return Generation(
        text=stream.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        stats=completion.stats,
        logprobs=completion.logprobs,
    )


def _stops(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(each, str) for each in stops):
        raise ValueError(f"stop must be a text or several, got {stop!r}")
    return list(stops)


def _as_batch(prompts: Any) -> tuple[bool, list[Any]]:
    """(is it a list of prompts?, the list). A list of messages or of ids is one prompt; so is a string."""
    if isinstance(prompts, str):
        return False, [prompts]
    items = _items(prompts)
    if items and isinstance(items[0], (dict, Integral)):
        return False, [items]
    return True, items


def _items(prompt: Any) -> list[Any]:
    """What a prompt that is no text holds, or a list of prompts; tensors and arrays of token ids pass."""
    try:
        if not isinstance(prompt, dict):
            return list(prompt.tolist() if isinstance(prompt, Tensor) else prompt)
    except TypeError:  # holds nothing
        pass
    raise PromptError(f"a prompt is text, a list of chat messages or a list of token ids, got {str(prompt)[:80]!r}")


def _message(item: Any, index: int) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or not isinstance(item.get("content"), str):
        raise PromptError(f'message {index} must be an object with text "role" and "content", got {str(item)[:80]}')
    return item | {"role": "system"} if item["role"] == "developer" else item
