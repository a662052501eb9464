"""Is a run still learning? Knows numbers; its state is a plain dictionary, so that a resumed run watches on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import StageError

WINDOW = 10
_FLOOR = 1.0  # nats: below it a loss may double without meaning anything


class Diverged(StageError):
    """A loss is not a number, or has left where it was for good. Trying again from the same place would end the same."""


@dataclass(kw_only=True)
class Watch:
    """Raises Diverged where a loss or the gradient is not finite, or where the median of a loss over the last `WINDOW`
    steps is more than `ratio` times (null: any times) the lowest such median."""

    ratio: float | None
    recent: dict[str, list[float]] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)

    def see(self, step: int, losses: Mapping[str, float], broken_ranks: tuple[int, ...] = ()) -> None:
        """The losses of one step, in nats."""
        if broken_ranks:
            ranks = ", ".join(map(str, broken_ranks))
            raise Diverged(
                f"step {step}: loss or gradient is not finite on rank {ranks}; lower the learning rate or train.max_grad_norm"
            )
        for name, value in losses.items():
            window = self.recent.setdefault(name, [])
            window.append(value)
            del window[:-WINDOW]
            if len(window) < WINDOW:
                continue
            usual = statistics.median(window)
            lowest = self.lowest.get(name, usual)
            if self.ratio is not None and usual > self.ratio * max(lowest, _FLOOR):
                raise Diverged(
                    f"step {step}: {name} has risen to {usual:.3g} nats over all ranks, more than {self.ratio:g} times its "
                    f"lowest of {lowest:.3g}; lower the learning rate (train.divergence_ratio is the limit)"
                )
            self.lowest[name] = min(lowest, usual)

    def state(self) -> dict[str, Any]:
        return {"recent": self.recent, "lowest": self.lowest}

    def load(self, state: Mapping[str, Any]) -> None:
        self.recent = {name: list(values) for name, values in state["recent"].items()}
        self.lowest = dict(state["lowest"])
