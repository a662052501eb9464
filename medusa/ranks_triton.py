"""Where the best logits stand, as two Triton kernels in place of `topk`'s many small ones. Knows tensors alone.

    V vocabulary, R ranks, C chunks that a row of logits is cut into

Value and place make one integer, as in `candidates.ranked_by_keys`, so no two keys are equal and the R best are R rounds
of "the highest, then without it": first of each chunk, then of what the chunks have found. Only shapes decide what is
launched: a graph can record it once the kernels are compiled. Import this where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from medusa.candidates import ranked_by_keys

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
def _best_of_chunk(logits, found, size, num_ranks, CHUNK: tl.constexpr):
    """One chunk of one row of logits [V] → its best keys, descending: found [rows,C,R]; NOTHING where it has too few."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = place < size
    values = tl.load(logits + row * size + place, mask=inside, other=0.0)
    keys = tl.where(inside, (ordered(float32_bits(values)).to(tl.int64) << 31) - place, NOTHING)
    found += (row * tl.num_programs(1) + chunk) * num_ranks
    for rank in range(num_ranks):
        best = tl.max(keys, axis=0)
        tl.store(found + rank, best)
        keys = tl.where(keys == best, NOTHING, keys)


@triton.jit
def _best_of_row(found, places, num_found, num_ranks, FOUND: tl.constexpr):
    """The keys that one row's chunks have found [C·R] → where the best of them stand: places [rows,R]."""
    row, within = tl.program_id(0).to(tl.int64), tl.arange(0, FOUND)
    keys = tl.load(found + row * num_found + within, mask=within < num_found, other=NOTHING)
    for rank in range(num_ranks):
        best = tl.max(keys, axis=0)
        tl.store(places + row * num_ranks + rank, -best & 0x7FFFFFFF)
        keys = tl.where(keys == best, NOTHING, keys)


def ranked_places(logits: Tensor, num_ranks: int) -> Tensor:
    """logits [...,V] → where the `num_ranks` best stand [...,R], best first; of equal logits the first comes first.

    More ranks or logits than the kernels are made for, or more ranks than logits, are `ranked_by_keys`'s.
    """
    size = logits.shape[-1]
    chunks = triton.cdiv(size, CHUNK)
    num_found = chunks * num_ranks
    if not 1 <= num_ranks <= min(size, MAX_RANKS) or num_found > MAX_FOUND:
        return ranked_by_keys(logits, num_ranks)
    rows = (logits if logits.dtype in DTYPES else logits.to(torch.float32)).reshape(-1, size).contiguous()
    found = torch.empty(len(rows), chunks, num_ranks, dtype=torch.int64, device=logits.device)
    places = torch.empty(*logits.shape[:-1], num_ranks, dtype=torch.int64, device=logits.device)
    if not len(rows):
        return places
    width = triton.next_power_of_2(num_found)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _best_of_chunk[(len(rows), chunks)](rows, found, size, num_ranks, CHUNK=CHUNK, num_warps=4)
        _best_of_row[(len(rows),)](
            found, places, num_found, num_ranks, FOUND=width, num_warps=min(8, max(1, width // 256))
        )
    return places
