from __future__ import annotations

import json

import pytest

from pipelines.watch import WINDOW, Diverged, Watch


def run(watch: Watch, values: list[float], start: int = 1) -> None:
    for step, value in enumerate(values, start):
        watch.see(step, {"the loss": value})


def test_a_loss_that_wanders_or_falls_is_left_alone() -> None:
    run(Watch(ratio=3.0), [8.0, 2.0, 9.0, 4.0] * 10 + [1.0 + 0.1 * (n % 3) for n in range(50)])


def test_a_loss_that_rises_for_good_stops_the_run_with_the_step() -> None:
    watch = Watch(ratio=3.0)
    run(watch, [2.0] * 30)
    run(watch, [50.0], start=31)  # one bad batch among ten is none
    with pytest.raises(Diverged, match=r"step 4\d: the loss has risen"):
        run(watch, [20.0] * WINDOW, start=40)


def test_a_loss_near_zero_may_double() -> None:
    """The distance to the original backbone begins at zero."""
    run(Watch(ratio=3.0), [0.0] * 20 + [0.9] * 50)
    with pytest.raises(Diverged):
        run(Watch(ratio=3.0), [0.0] * 20 + [3.5] * 50)


def test_a_rank_that_is_not_finite_is_named() -> None:
    with pytest.raises(Diverged, match=r"step 7: .* rank 1, 3"):
        Watch(ratio=None).see(7, {"the loss": float("nan")}, (1, 3))


def test_without_a_ratio_only_what_is_not_finite_stops_it() -> None:
    run(Watch(ratio=None), [1.0] * 20 + [1e9] * 20)


def test_a_resumed_watch_stops_where_the_first_would_have() -> None:
    values = [2.0] * 15 + [30.0] * 20

    def stops_at(watch: Watch, first: int) -> int:
        with pytest.raises(Diverged) as told:
            run(watch, values[first:], start=first + 1)
        return int(str(told.value).split()[1].rstrip(":"))

    whole = stops_at(Watch(ratio=3.0), 0)
    half = Watch(ratio=3.0)
    run(half, values[:14])
    resumed = Watch(ratio=3.0)
    resumed.load(json.loads(json.dumps(half.state())))
    assert stops_at(resumed, 14) == whole
