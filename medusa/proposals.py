"""What heads propose for a step: the tokens of a tree and the tree itself. Knows hidden states; knows no cache and no text.

    B sequences, N tree nodes, D hidden

Two kinds of heads, two of trees, and two ways to ask: by PyTorch or, where the backbone's products are those of the CPU
kernels, by one call of theirs, which costs little more than the weights that it reads.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from medusa.backbone import Backbone
from medusa.candidates import static_candidates
from medusa.dynamic_tree import DeviceDynamicTree, dynamic_candidates
from medusa.heads import LmHead, LogitTransform, MedusaHeads, PartialLmHead
from medusa.hydra import searched_candidates, sequential_candidates
from medusa.native.guesses import NativeHead, NativeHeads
from medusa.native.linear import PackedWeight
from medusa.tree import DeviceTree, RowTrees


class Proposer:
    """The heads of a backbone, asked for trees."""

    def __init__(self, heads: MedusaHeads, backbone: Backbone, *, native: bool = True) -> None:
        """`native` lets the CPU kernels do it where they can; without, PyTorch: what they are held to. The kernels see heads
        and backbone as they are now: what is learned or merged later they do not."""
        reader = backbone.lm_head_for(heads.vocabulary)
        found = native_heads(heads, reader, backbone) if native else None
        by_triton = backbone.fused.embedding if backbone.fused is not None and backbone.fuses_steps else None
        self._heads = TorchHeads(heads, reader, embeddings=by_triton) if found is None else found
        self._sequential = heads.config.kind == "hydra"

    @property
    def is_native(self) -> bool:
        return isinstance(self._heads, NativeHeads)

    def __call__(self, tree: DeviceTree | DeviceDynamicTree, root: Tensor, hidden: Tensor) -> tuple[Tensor, RowTrees]:
        """root [B] and the hidden states [B,D] before it → candidate tokens [B,N], the root first, and the trees of them.

        `tree` is at least one deep.
        """
        if self._sequential and isinstance(tree, DeviceDynamicTree):
            return self._heads.search(tree, root, hidden)
        if isinstance(tree, DeviceDynamicTree):
            best, log_probs = self._heads.weighed_guess(
                hidden, num_heads=tree.depth, num_ranks=tree.width, temperatures=tree.temperatures
            )
            return dynamic_candidates(tree, root, best, log_probs)
        if self._sequential:
            return self._heads.fill(tree, root, hidden), tree.rows(len(root))
        best = self._heads.guess(hidden, num_heads=tree.depth, num_ranks=tree.width)
        return static_candidates(tree, root, best), tree.rows(len(root))


class TorchHeads:
    """Heads asked by PyTorch's operations, on any device; `NativeHeads` has the same methods.

    With `embeddings` [V,D], what the reader's `embed` looks up, a tree is filled by Triton kernels.
    """

    def __init__(self, heads: MedusaHeads, reader: LmHead, *, embeddings: Tensor | None = None) -> None:
        self._heads, self._reader, self._embeddings = heads, reader, embeddings

    def guess(self, hidden: Tensor, *, num_heads: int, num_ranks: int) -> Tensor:
        return self._heads.guesses(hidden, self._reader, num_heads=num_heads, num_ranks=num_ranks)

    def weighed_guess(
        self, hidden: Tensor, *, num_heads: int, num_ranks: int, temperatures: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = self._heads.logits(hidden, self._reader, num_heads)
        return self._heads.weighed_tokens(logits, num_ranks, None if temperatures is None else temperatures[:, None])

    def fill(self, tree: DeviceTree, root: Tensor, hidden: Tensor) -> Tensor:
        given = self._heads, tree, root, hidden, self._reader
        if self._embeddings is None:
            return sequential_candidates(*given)
        from medusa import hydra_triton  # Triton is where CUDA builds of torch are

        return hydra_triton.sequential_candidates(*given, embeddings=self._embeddings)

    def search(self, tree: DeviceDynamicTree, root: Tensor, hidden: Tensor) -> tuple[Tensor, RowTrees]:
        return searched_candidates(self._heads, tree, root, hidden, self._reader)


def native_heads(heads: MedusaHeads, reader: LmHead, backbone: Backbone) -> NativeHeads | None:
    """The heads as the kernels read them, or None where anything about them is not as those expect it."""
    fused = backbone.fused
    if fused is None or heads.config.lm_heads != "shared" or reader.transform != LogitTransform():
        return None
    project = reader.project if isinstance(reader, PartialLmHead) else fused.lm_head
    packed = [[block.packed for block in head.blocks] for head in heads.heads]  # type: ignore[union-attr]
    if not all(isinstance(weight, PackedWeight) for weight in (project, *chain(*packed))):
        return None
    own = [
        NativeHead(
            blocks=weights,  # type: ignore[arg-type]
            biases=torch.stack([block.bias.detach().float() for block in head.blocks]),  # type: ignore[union-attr]
            num_read=head.num_read,  # type: ignore[arg-type]
        )
        for head, weights in zip(heads.heads, packed, strict=True)
    ]
    vocabulary = None if heads.vocabulary is None else heads.vocabulary.long().contiguous()
    embeddings = fused.embedding.detach().contiguous()
    return NativeHeads(own, lm_head=project, vocabulary=vocabulary, embeddings=embeddings)  # type: ignore[arg-type]
