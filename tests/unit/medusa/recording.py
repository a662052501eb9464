"""A recording of tensor operations that is replayed on a CPU as a CUDA graph is on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only


class _Recorder(TorchDispatchMode):
    """Keeps every operation with what it was given and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `step_graphs.Capture`: one warm-up run, then the operations of a run on tensors that have shapes but no values.

    As on a GPU, tensors from outside are the same memory at every replay, and Python runs but once. Control flow that
    looks at a value, or a transfer to the host, raises.
    """
    step()
    with FakeTensorMode(allow_non_fake_inputs=True), _Recorder() as recorder:
        result = step()
    calls = recorder.calls  # keeps the shapes alive, whose ids name them

    @torch.inference_mode()
    def replay() -> Tensor:
        values: dict[int, Tensor] = {}

        def real(tensor: Tensor) -> Tensor:
            return values.get(id(tensor), tensor)

        for func, args, kwargs, out in calls:
            found = func(*tree_map_only(Tensor, real, args), **tree_map_only(Tensor, real, kwargs))
            for shape, value in zip(tree_iter(out), tree_iter(found), strict=True):
                if isinstance(value, Tensor):
                    values[id(shape)] = value
        return real(result)

    return replay
