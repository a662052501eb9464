"""A recording of tensor operations that is replayed on a CPU as a CUDA graph is on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten


class _Recorder(TorchDispatchMode):
    """Keeps every operation, what it was given and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], list[Any], Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{func} looks at values, which a recorded step cannot")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_flatten((args, kwargs or {})), out))
        return out


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `step_graphs.Capture`: the operations of one run of a step, to be run again.

    As on a GPU, tensors from outside are the same memory at every replay, and Python runs but once.
    """
    with _Recorder() as recorder:
        result = step()
    calls = recorder.calls  # keeps what came out alive: its ids name it

    @torch.inference_mode()
    def replay() -> Tensor:
        values: dict[int, Tensor] = {}

        def now(given: Any) -> Any:
            return values.get(id(given), given) if isinstance(given, Tensor) else given

        for func, flat, form, out in calls:
            args, kwargs = tree_unflatten([now(given) for given in flat], form)
            found = func(*args, **kwargs)
            for then, value in zip(tree_iter(out), tree_iter(found), strict=True):
                if isinstance(value, Tensor):
                    values[id(then)] = value
        return now(result)

    return replay


def run_without_values(step: Callable[[], Tensor]) -> Tensor:
    """Run a step on tensors that have shapes but no values: control flow that looks at one, and any transfer, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Recorder():
        return step()
