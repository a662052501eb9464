"""Decode steps recorded once for each shape and replayed: CUDA graphs. Knows buffers and shapes; knows no model and no tree.

    B rows, N nodes, L depth

A step is launched kernel by kernel only until its shape is known: recorded, its hundreds of launches are one. What
changes between replays lies in buffers that never move: the decoder's own state and cache, and here how many rows are
live and how they sample. Recording is a function that is passed in, so tests replay on a CPU what a GPU would.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from medusa.config import SamplingParams
from medusa.errors import BackboneError
from medusa.sampling import SamplingKind, SamplingRows

MAX_GRAPHS = 128
WARM_UP_RUNS = 2  # the first loads kernels and chooses among them; nothing may be chosen while recording

Replay = Callable[[], Tensor]
Capture = Callable[[Replay], Replay]


class StepShape(NamedTuple):
    """What a step's kernels depend on: rows, nodes of each one's tree, and the first `length` cache slots being seen."""

    num_rows: int
    nodes: int
    length: int


Advance = Callable[[StepShape, SamplingRows, Tensor], Tensor]


class StepGraphs:
    """At most `max_graphs` recorded steps, the least recently used make room."""

    def __init__(
        self,
        advance: Advance,
        *,
        num_slots: int,
        device: torch.device,
        capture: Capture,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        """`advance(shape, rows, live)` is the step: tensors alone, no host synchronisation, its result [B,2+L] its own.

        It must change no row from `live` (a tensor without dimensions) on. `capture` may run it as often as it likes.
        """
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, got {max_graphs}; to do without, give graphs=False")
        self._advance = advance
        self._capture = capture
        self._max_graphs = max_graphs
        self._replays: OrderedDict[tuple[StepShape, SamplingKind], Replay] = OrderedDict()
        self._rows = SamplingRows.of([SamplingParams()] * num_slots, device)
        self._loaded: SamplingRows | None = None
        self._live = torch.zeros((), dtype=torch.long, device=device)

    def __len__(self) -> int:
        return len(self._replays)

    @property
    def shapes(self) -> list[StepShape]:
        """Of the recorded steps, one entry for each kind of sampling."""
        return [shape for shape, _ in self._replays]

    def run(self, shape: StepShape, rows: SamplingRows, live: int) -> Tensor:
        """One step of rows 0…live−1; the result [B,2+L] is overwritten by a later step. `rows` must stay on the device."""
        assert rows.stays_on_device, "edits and log-probabilities take part on the host"
        key = shape, rows.kind
        replay = self._replays.pop(key, None) or self._record(shape, rows.kind)
        self._replays[key] = replay
        if rows is not self._loaded:
            self._rows.load(rows)
            self._loaded = rows
        self._live.fill_(live)
        return replay()

    def _record(self, shape: StepShape, kind: SamplingKind) -> Replay:
        while len(self._replays) >= self._max_graphs:
            self._replays.popitem(last=False)
        rows = self._rows.view(shape.num_rows, kind)
        self._live.fill_(0)  # whatever runs while recording advances nobody
        return self._capture(lambda: self._advance(shape, rows, self._live))


class CudaCapture:
    """Records on one GPU, all graphs in one pool of memory.

    They may share it, since nothing inside a graph outlives its replay but the result, which is read before the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # one for all: what a stream has allocated is its own

    def __call__(self, step: Replay) -> Replay:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_RUNS):
                    step()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, of other engines, go on with what would spoil a recording of their own.
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    result = step()
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise BackboneError(
                    f"a decode step cannot be recorded as a CUDA graph: {reason} (give graphs=False, or serve.cuda_graphs=false)"
                ) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def capture_for(device: torch.device, graphs: bool | Capture) -> Capture | None:
    """How steps are recorded on this device: not at all for False, by CUDA where there is CUDA for True, or as given."""
    if not isinstance(graphs, bool):
        return graphs
    return CudaCapture(device) if graphs and device.type == "cuda" else None
