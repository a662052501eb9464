"""Heads' guesses, those of a whole tree in one call. Knows weights and tokens; what is computed stands in guesses.h and search.h.

B sequences, N tree nodes, K heads, R ranks, D hidden, V tokens that heads guess among
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.dynamic_tree import DeviceDynamicTree
from medusa.native.linear import CWeight, PackedWeight, kernels
from medusa.tree import DeviceTree, RowTrees


class CHead(ctypes.Structure):
    """`Head` of guesses.h."""

    _fields_ = (
        ("blocks", ctypes.POINTER(CWeight)),
        ("biases", ctypes.c_void_p),
        ("num_read", ctypes.c_int64),
    )


class CHeads(ctypes.Structure):
    """`Heads` of guesses.h."""

    _fields_ = (
        ("heads", ctypes.POINTER(CHead)),
        ("num_layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("lm_head", CWeight),
        ("vocabulary", ctypes.c_void_p),
        ("embeddings", ctypes.c_void_p),
        ("embeddings_in_half", ctypes.c_int64),
    )


class CGuess(ctypes.Structure):
    """`Guess` of guesses.h."""

    _fields_ = (
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("ranks", ctypes.c_int64),
        ("rows_each", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("path", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("log_probs", ctypes.c_void_p),
    )


class CLevel(ctypes.Structure):
    """`Level` of search.h."""

    _fields_ = (
        ("parents", ctypes.c_int64),
        ("ranks", ctypes.c_int64),
        ("paths", ctypes.c_void_p),
        ("children", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("child_ranks", ctypes.c_void_p),
        ("num_children", ctypes.c_int64),
    )


class CSearch(ctypes.Structure):
    """`Search` of search.h."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("num_nodes", ctypes.c_int64),
        ("num_levels", ctypes.c_int64),
        ("levels", ctypes.POINTER(CLevel)),
        ("hidden", ctypes.c_void_p),
        ("roots", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("depths", ctypes.c_void_p),
        ("parents", ctypes.c_void_p),
        ("node_paths", ctypes.c_void_p),
        ("visible", ctypes.c_void_p),
    )


@dataclass(frozen=True, kw_only=True)
class NativeHead:
    """One head: its blocks' packed weights, their biases [layers,D], and how many tokens of the path it reads."""

    blocks: Sequence[PackedWeight]
    biases: Tensor
    num_read: int

    def c(self) -> CHead:
        return CHead(
            blocks=(CWeight * len(self.blocks))(*(block.c() for block in self.blocks)),
            biases=self.biases.data_ptr(),
            num_read=self.num_read,
        )


class NativeHeads:
    """All heads of a set. `vocabulary` [V] names the tokens that `lm_head` scores, None for all; `embeddings` [tokens,D]."""

    def __init__(
        self, heads: Sequence[NativeHead], *, lm_head: PackedWeight, vocabulary: Tensor | None, embeddings: Tensor
    ) -> None:
        assert embeddings.dtype in (torch.float32, torch.bfloat16)
        assert vocabulary is None or (vocabulary.dtype == torch.int64 and vocabulary.is_contiguous())
        self._held = (list(heads), lm_head, vocabulary, embeddings)  # the kernels know their addresses only
        self._heads = (CHead * len(heads))(*(head.c() for head in heads))
        self._set = CHeads(
            heads=self._heads,
            num_layers=len(heads[0].blocks),
            hidden=lm_head.inputs,
            lm_head=lm_head.c(),
            vocabulary=None if vocabulary is None else vocabulary.data_ptr(),
            embeddings=embeddings.data_ptr(),
            embeddings_in_half=embeddings.dtype == torch.bfloat16,
        )

    def guess(self, hidden: Tensor, *, num_heads: int, num_ranks: int) -> Tensor:
        """hidden [B,D] → the best tokens of the first heads, which read no path [B,K,R]."""
        tokens = torch.empty(num_heads, len(hidden), num_ranks, dtype=torch.int64)
        self._guess(hidden, tokens)
        return tokens.transpose(0, 1)

    def weighed_guess(
        self, hidden: Tensor, *, num_heads: int, num_ranks: int, temperatures: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `guess`; beside the tokens their log-probabilities [B,K,R], of logits divided by `temperatures` [K]."""
        tokens = torch.empty(num_heads, len(hidden), num_ranks, dtype=torch.int64)
        log_probs = torch.empty(tokens.shape)
        self._guess(hidden, tokens, log_probs, temperatures)
        return tokens.transpose(0, 1), log_probs.transpose(0, 1)

    def _guess(
        self, hidden: Tensor, tokens: Tensor, log_probs: Tensor | None = None, temperatures: Tensor | None = None
    ) -> None:
        assert all(head.num_read == 0 for head in self._held[0])
        guess = CGuess(
            first=0,
            count=tokens.shape[0],
            rows=tokens.shape[1],
            ranks=tokens.shape[2],
            rows_each=1,
            hidden=_floats(hidden),
            temperatures=_floats(temperatures),
            tokens=tokens.data_ptr(),
            log_probs=_floats(log_probs),
        )
        self._run("guess", guess)

    def fill(self, tree: DeviceTree, root: Tensor, hidden: Tensor) -> Tensor:
        """root [B] and hidden [B,D] → tokens [B,N] of a static tree: `hydra.sequential_candidates`."""
        levels = [
            CLevel(
                parents=len(level.paths),
                ranks=level.width,
                paths=level.paths.data_ptr(),
                children=level.children.data_ptr(),
                places=level.parents.data_ptr(),
                child_ranks=level.ranks.data_ptr(),
                num_children=len(level.children),
            )
            for level in tree.levels
        ]
        tokens = torch.empty(len(root), tree.num_nodes, dtype=torch.int64)
        self._search(levels, root, hidden, tokens)
        return tokens

    def search(self, tree: DeviceDynamicTree, root: Tensor, hidden: Tensor) -> tuple[Tensor, RowTrees]:
        """root [B] and hidden [B,D] → tokens [B,N] and each row's tree: `hydra.searched_candidates`."""
        levels = [CLevel(parents=beam.num_parents, ranks=beam.ranks) for beam in tree.beams]
        tokens, depths, parents = torch.empty(3, len(root), tree.num_nodes, dtype=torch.int64)
        rows = RowTrees(
            depths=depths,
            parents=parents,
            node_paths=torch.empty(*tokens.shape, len(levels) + 1, dtype=torch.int64),
            ancestor_mask=torch.empty(*tokens.shape, tree.num_nodes, dtype=torch.bool),
            depth=len(levels),
        )
        self._search(levels, root, hidden, tokens, rows, tree.temperatures)
        return tokens, rows

    def _search(
        self,
        levels: Sequence[CLevel],
        root: Tensor,
        hidden: Tensor,
        tokens: Tensor,
        rows: RowTrees | None = None,
        temperatures: Tensor | None = None,
    ) -> None:
        root = root.contiguous()
        search = CSearch(
            batch=len(root),
            num_nodes=tokens.shape[1],
            num_levels=len(levels),
            levels=(CLevel * len(levels))(*levels),
            hidden=_floats(hidden),
            roots=root.data_ptr(),
            temperatures=_floats(temperatures),
            tokens=tokens.data_ptr(),
        )
        if rows is not None:
            search.depths, search.parents = rows.depths.data_ptr(), rows.parents.data_ptr()
            search.node_paths, search.visible = rows.node_paths.data_ptr(), rows.ancestor_mask.data_ptr()
        self._run("search", search)

    def _run(self, name: str, what: CGuess | CSearch) -> None:
        heads, here = ctypes.byref(self._set), ctypes.byref(what)
        work = torch.empty(getattr(kernels(), f"medusa_{name}_bytes")(heads, here), dtype=torch.uint8)
        threads = ctypes.c_int64(torch.get_num_threads())
        getattr(kernels(), f"medusa_{name}")(heads, here, ctypes.c_void_p(work.data_ptr()), threads)


def _floats(x: Tensor | None) -> int | None:
    """The address of a tensor that the kernels read as it lies."""
    assert x is None or (x.dtype == torch.float32 and x.is_contiguous())
    return None if x is None else x.data_ptr()
