"""Where the best logits stand, as two Triton kernels in place of `topk`'s many small ones. Knows tensors and a tree's levels.

    B sequences, N tree nodes, F nodes of a level that are gone on from, V vocabulary, R ranks, C chunks that a row is cut into

Value and place make one integer, as in `candidates.ranked_by_keys`, so no two keys are equal and the R best are R rounds
of "the highest, then without it": first of each chunk, then of what the chunks have found. Only shapes decide what is
launched: a graph can record it once the kernels are compiled. Import this where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa import candidates
from medusa.candidates import ranked_by_keys
from medusa.tree import Level

CHUNK = 2048  # logits of a program: 49,152 of them for five rows are 120 programs
MAX_RANKS = 64  # each rank is a round
MAX_FOUND = 8192  # keys that one program merges
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOTHING = tl.constexpr(-(2**62))  # below the key of any float32, and far from int64's own border


@triton.jit
def float32_bits(values):
    """Values of one of DTYPES, as the bits of float32."""
    if values.dtype == tl.bfloat16:  # bit by bit: the interpreter's conversion is not to be trusted with a NaN
        bits = values.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def ordered(bits):
    """Bits of float32 → integers that compare as the values do, both zeros alike."""
    return tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


@triton.jit
def _take_best(keys):
    """The highest key, and the keys without it."""
    best = tl.max(keys, axis=0)
    return best, tl.where(keys == best, NOTHING, keys)


@triton.jit
def _place_of(key):
    return -key & 0x7FFFFFFF


@triton.jit
def _best_of_chunk(logits, found, size, num_ranks, CHUNK: tl.constexpr):
    """One chunk of one row of logits [V] → its best keys, descending: found [rows,C,R]; NOTHING where it has too few."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = place < size
    values = tl.load(logits + row * size + place, mask=inside, other=0.0)
    keys = tl.where(inside, (ordered(float32_bits(values)).to(tl.int64) << 31) - place, NOTHING)
    found += (row * tl.num_programs(1) + chunk) * num_ranks
    for rank in range(num_ranks):
        best, keys = _take_best(keys)
        tl.store(found + rank, best)


@triton.jit
def _best_of_row(found, places, num_found, num_ranks, FOUND: tl.constexpr):
    """The keys that one row's chunks have found [C·R] → where the best of them stand: places [rows,R]."""
    row, within = tl.program_id(0).to(tl.int64), tl.arange(0, FOUND)
    keys = tl.load(found + row * num_found + within, mask=within < num_found, other=NOTHING)
    for rank in range(num_ranks):
        best, keys = _take_best(keys)
        tl.store(places + row * num_ranks + rank, _place_of(best))


@triton.jit
def _best_to_children(found, vocabulary, children, parents, ranks, tokens, num_found, num_inner, num_children, num_nodes,
                      VOCABULARY: tl.constexpr, CHILDREN: tl.constexpr, FOUND: tl.constexpr):  # fmt: skip
    """The keys that the chunks of one inner node's logits have found [C·R] → the tokens of this node's children, all others
    stay as they are."""
    row, within = tl.program_id(0).to(tl.int64), tl.arange(0, FOUND)
    keys = tl.load(found + row * num_found + within, mask=within < num_found, other=NOTHING)
    child = tl.arange(0, CHILDREN)
    is_child = child < num_children
    is_own = is_child & (tl.load(parents + child, mask=is_child, other=-1) == row % num_inner)
    rank_of = tl.where(is_own, tl.load(ranks + child, mask=is_child, other=-1), -1)
    target = tokens + row // num_inner * num_nodes + tl.load(children + child, mask=is_child, other=0)
    for rank in range(tl.max(rank_of, axis=0) + 1):
        best, keys = _take_best(keys)
        token = _place_of(best)
        if VOCABULARY:
            token = tl.load(vocabulary + token)
        tl.store(target, token, mask=rank_of == rank)


def ranked_places(logits: Tensor, num_ranks: int) -> Tensor:
    """logits [...,V] → where the `num_ranks` best stand [...,R], best first; of equal logits the first comes first.

    More ranks or logits than the kernels are made for, or more ranks than logits, are `ranked_by_keys`'s.
    """
    if not _fits(logits.shape[-1], num_ranks):
        return ranked_by_keys(logits, num_ranks)
    places = torch.empty(*logits.shape[:-1], num_ranks, dtype=torch.int64, device=logits.device)
    if not places.numel():
        return places
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        found = _found(logits, num_ranks)
        num_found = found[0].numel()
        _best_of_row[(len(found),)](found, places, num_found, num_ranks, **_merging(num_found))
    return places


def fill_children(tokens: Tensor, level: Level, logits: Tensor, vocabulary: Tensor | None = None) -> None:
    """As `candidates.fill_children`, which serves what these kernels are not made for. `tokens` must be contiguous."""
    if not _fits(logits.shape[-1], level.width):
        candidates.fill_children(tokens, level, logits, vocabulary)
        return
    assert tokens.is_contiguous()
    num_inner, num_children = logits.shape[1], len(level.children)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        found = _found(logits, level.width)
        num_found = found[0].numel()
        _best_to_children[(len(found),)](
            found, level.children if vocabulary is None else vocabulary, level.children, level.parents, level.ranks, tokens,
            num_found, num_inner, num_children, tokens.shape[1], VOCABULARY=vocabulary is not None,
            CHILDREN=triton.next_power_of_2(num_children), **_merging(num_found),
        )  # fmt: skip


def _fits(size: int, num_ranks: int) -> bool:
    """Are the kernels made for so many ranks of so many logits?"""
    return 1 <= num_ranks <= min(size, MAX_RANKS) and triton.cdiv(size, CHUNK) * num_ranks <= MAX_FOUND


def _found(logits: Tensor, num_ranks: int) -> Tensor:
    """logits [...,V], at least one row → the best keys of each row's chunks [rows,C,R]."""
    size = logits.shape[-1]
    chunks = triton.cdiv(size, CHUNK)
    rows = (logits if logits.dtype in DTYPES else logits.to(torch.float32)).reshape(-1, size).contiguous()
    found = torch.empty(len(rows), chunks, num_ranks, dtype=torch.int64, device=logits.device)
    _best_of_chunk[(len(rows), chunks)](rows, found, size, num_ranks, CHUNK=CHUNK, num_warps=4)
    return found


def _merging(num_found: int) -> dict[str, int]:
    """How the program that merges so many keys is cut."""
    width = triton.next_power_of_2(num_found)
    return {"FOUND": width, "num_warps": min(8, max(1, width // 256))}
