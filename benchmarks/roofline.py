"""What a plain step cannot be faster than: the bytes it must read over the memory's bandwidth. Knows tensors and a clock."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from medusa.backbone import Backbone
from medusa.kv_cache import KVCache

READ_BYTES = 2**29  # far above a processor's cache
READS = 5


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """One plain step of a batch. `limit_s` reads every byte once; `share` of it is reached by the measured step."""

    weight_bytes: int
    cache_bytes: int
    bandwidth: float
    step_s: float

    @property
    def limit_s(self) -> float:
        return (self.weight_bytes + self.cache_bytes) / self.bandwidth

    @property
    def share(self) -> float:
        return self.limit_s / self.step_s

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"limit_s": self.limit_s, "share": self.share}


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over a large tensor reads, all threads at work: the best of a few."""
    large = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    best = min(_seconds_of_sum(large) for _ in range(READS))
    return large.nbytes / best


def _seconds_of_sum(tensor: torch.Tensor) -> float:
    start = time.perf_counter()
    tensor.sum().item()
    return time.perf_counter() - start


def weight_bytes(backbone: Backbone) -> int:
    """What a step reads of the weights, each once: everything but an input embedding that is not also the lm_head.

    Matrices count in the type that products read; scales of rounded ones are left out.
    """
    itemsize = backbone.weight_dtype.itemsize
    read = {p.data_ptr(): p.numel() * itemsize if p.dim() == 2 else p.nbytes for p in backbone.model.parameters()}
    for embedding in backbone.model.get_input_embeddings().parameters():
        if embedding.data_ptr() != backbone.lm_head_weight.data_ptr():
            del read[embedding.data_ptr()]
    return sum(read.values())


def cache_bytes(cache: KVCache, *, length: int) -> int:
    """What a step reads of one sequence's keys and values at a context of `length`."""
    return cache.store.nbytes // (cache.num_slots * cache.capacity) * length
