"""The gate: challenger to champion, and back. Knows figures and aliases; loads no model itself, `evaluate` measures.

Measuring takes minutes and holds no lock. What was measured counts only for the pair that was measured: under the
registry's lock, the champion's alias is read again, and a champion that changed meanwhile is measured against anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from medusa.errors import CheckpointError
from pipelines.cluster import measured
from pipelines.config import Config, PromoteSection
from pipelines.errors import PromotionRefused, StageError
from pipelines.registry import CHALLENGER, CHAMPION, Registry, Version, existing_registry
from pipelines.report import Evaluation
from pipelines.stage import Progress, Step, ignore_progress, main
from pipelines.version_tags import TAG_BACKBONE, TAG_DIGEST, TAG_GATE, TAG_PREVIOUS, TAG_ROLLED_BACK, stored_evaluation

if TYPE_CHECKING:
    from pipelines.evaluate import Comparison

logger = logging.getLogger(__name__)

MAX_ROUNDS = 5

# (challenger, champion) → both measured side by side
Measure = Callable[[Version, Version], "Comparison"]


@dataclass(frozen=True, kw_only=True)
class PromoteResult:
    """Who is champion now and who was. `overruled` are the gate's reasons that `force` set aside."""

    champion: int
    previous: int | None
    overruled: tuple[str, ...] = ()
    comparison: Comparison | None = None

    @property
    def summary(self) -> str:
        if self.previous == self.champion:
            return f"version {self.champion} is champion already"
        measured = f"; {_told(self.comparison)}" if self.comparison else ""
        forced = f" (forced against: {'; '.join(self.overruled)})" if self.overruled else ""
        was = f"version {self.previous}" if self.previous else "none"
        return f"version {self.champion} is champion, {was} was{measured}{forced}"


def run(config: Config, progress: Progress = ignore_progress, *, measure: Measure | None = None) -> PromoteResult:
    """Promote the challenger (or `promote.version`), or roll back where `promote.rollback` says so.

    Challenger and champion are fetched and measured side by side, now, where `ray.measure_on` says. Without a champion
    there is nothing to measure beside, and the challenger's stored evaluation, made of these very bytes, is enough. Raises
    PromotionRefused with the gate's reasons, StageError where there is no registry or no challenger, the champion never
    rests, or what is no fault of the heads keeps them from being measured: then `promote.force` promotes unmeasured.
    """
    if config.promote.rollback:
        return rollback(config)
    registry = existing_registry(config)
    measure = measure or _side_by_side(config, registry, progress)
    for _ in range(MAX_ROUNDS):
        challenger, champion = _pair(registry, config)
        if champion is not None and champion.number == challenger.number:
            return PromoteResult(champion=champion.number, previous=champion.number)
        reasons, comparison = _gate(challenger, champion, config.promote, measure)
        if reasons and not config.promote.force:
            registry.tag(challenger.number, {TAG_GATE: _record(champion, reasons, comparison, passed=False)})
            raise PromotionRefused(challenger.number, reasons)
        with registry.lock(config.promote.lock_timeout_s) as lease:
            now = registry.aliased(CHAMPION)
            if (now and now.number) != (champion and champion.number):
                logger.warning("the champion changed while it was measured; measuring against the new one")
                continue
            record = _record(champion, reasons, comparison, passed=True)
            previous = {TAG_PREVIOUS: str(champion.number)} if champion else {}
            registry.crown([*registry.champions(), challenger.number], lease)  # tags tell of what has happened
            registry.tag(challenger.number, {TAG_GATE: record, TAG_ROLLED_BACK: "", **previous})
        progress(Step(done=1, total=1, note=f"version {challenger.number}"))
        return PromoteResult(
            champion=challenger.number,
            previous=champion.number if champion else None,
            overruled=reasons,
            comparison=comparison,
        )
    raise StageError(f"the champion changed {MAX_ROUNDS} times while it was being measured; promote again later")


def rollback(config: Config) -> PromoteResult:
    """Make the champion's predecessor champion again; again, and its predecessor is. Raises StageError where there is none.

    The version that is left is marked: the gate does not take it again unless forced. Who comes back is marked no more.
    """
    registry = existing_registry(config)
    with registry.lock(config.promote.lock_timeout_s) as lease:
        *earlier, champion = registry.champions() or [0]
        while earlier and earlier[-1] == champion:
            earlier.pop()
        if not earlier:
            if not champion:
                raise StageError(f"{registry.model_name} has no champion to go back from; `medusa promote` makes one")
            raise StageError(
                f"version {champion} of {registry.model_name} is its first champion: there is none to go back to"
            )
        registry.crown(earlier, lease)
        registry.tag(champion, {TAG_ROLLED_BACK: f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"})
        registry.tag(earlier[-1], {TAG_ROLLED_BACK: ""})
    return PromoteResult(champion=earlier[-1], previous=champion)


def judge(
    challenger: Evaluation | None, compared: Comparison | None, gate: PromoteSection, *, rolled_back: str | None = None
) -> tuple[str, ...]:
    """Why the challenger must not be promoted; empty when it may. Pure.

    The `guard` first. Then acceleration rate and speedup must reach the least that the gate asks for and, where it was
    `compared` with a champion, the champion's less the margins: then all of these are what was just measured.
    """
    reasons = list(guard(challenger, gate, rolled_back=rolled_back))
    if challenger is None:
        return tuple(reasons)
    if compared is not None and compared.dtype in ("float32", "float64") and compared.num_differing:
        reasons.append(f"{compared.num_differing} {compared.dtype} answers differed from plain decoding just now")
    found = compared.challenger if compared else challenger
    if not found.acceleration_rate >= gate.min_acceleration:
        reasons.append(
            f"acceleration rate {found.acceleration_rate:.2f} is below promote.min_acceleration {gate.min_acceleration:g}"
        )
    if not found.speedup >= gate.min_speedup:
        reasons.append(f"speedup {found.speedup:.2f} is below promote.min_speedup {gate.min_speedup:g}")
    if compared is None:
        return tuple(reasons)
    for name, margin in (("acceleration_rate", gate.acceleration_margin), ("speedup", gate.speedup_margin)):
        ours, theirs = getattr(compared.challenger, name), getattr(compared.champion, name)
        if not ours >= theirs * (1 - margin):
            reasons.append(
                f"{name.replace('_', ' ')} {ours:.2f} is more than {margin:.0%} below the champion's {theirs:.2f}"
            )
    return tuple(reasons)


def guard(challenger: Evaluation | None, gate: PromoteSection, *, rolled_back: str | None = None) -> tuple[str, ...]:
    """What no measurement beside a champion can mend; empty where nothing. Pure.

    Identity with plain decoding must have been checked in float32 and have held; a tuned backbone must also have kept its
    perplexity.
    """
    if challenger is None:
        return ("it was never evaluated",)
    reasons = []
    if rolled_back:
        reasons.append(f"it was champion and rolled back on {rolled_back}")
    if challenger.identity_checked == 0:
        reasons.append("its identity with plain decoding was not checked (evaluate.identity_prompts is 0)")
    if challenger.identity_differing:
        reasons.append(
            f"{challenger.identity_differing} of {challenger.identity_checked} float32 answers differ from plain decoding"
        )
    return (*reasons, *_quality_reasons(challenger, gate))


def _quality_reasons(challenger: Evaluation, gate: PromoteSection) -> list[str]:
    if not challenger.tuned:
        return []
    if challenger.quality is None:
        return ["it tunes the backbone but the quality guard was not measured; evaluate it again"]
    kinds = (("the original's answers", challenger.quality.answers), ("human text", challenger.quality.text))
    return [
        f"its backbone's perplexity on {name} rose by {found.rise:.2%}, more than promote.perplexity_margin "
        f"{gate.perplexity_margin:.2%}"
        for name, found in kinds
        if not found.rise <= gate.perplexity_margin
    ]


def _pair(registry: Registry, config: Config) -> tuple[Version, Version | None]:
    """(the version to promote, the champion), as the registry has them now."""
    if config.promote.version is not None:
        return registry.version(config.promote.version), registry.aliased(CHAMPION)
    challenger = registry.aliased(CHALLENGER)
    if challenger is None:
        raise StageError(f"no version of {registry.model_name} is {CHALLENGER}; run `register` first")
    return challenger, registry.aliased(CHAMPION)


def _gate(
    challenger: Version, champion: Version | None, gate: PromoteSection, measure: Measure
) -> tuple[tuple[str, ...], Comparison | None]:
    """The reasons against, and what was measured. What the guard already forbids is not measured.

    The stored rate and speed, of whichever machine and hour, are asked only where there is no champion to measure beside.
    """
    evaluation = stored_evaluation(challenger)
    rolled_back = challenger.tags.get(TAG_ROLLED_BACK)
    if champion is None:
        reasons = judge(evaluation, None, gate, rolled_back=rolled_back)
    else:
        reasons = guard(evaluation, gate, rolled_back=rolled_back)
    if (
        evaluation is not None
        and challenger.tags.get(TAG_DIGEST, evaluation.checkpoint_digest) != evaluation.checkpoint_digest
    ):
        reasons = (*reasons, "its evaluation is of another checkpoint; register it again")
    if champion is None or reasons:
        return reasons, None
    ours, theirs = challenger.tags.get(TAG_BACKBONE, ""), champion.tags.get(TAG_BACKBONE, "")
    if _fingerprint(ours) != _fingerprint(theirs):
        return (f"it is for backbone {ours}, the champion for {theirs}: there is nothing to compare",), None
    try:
        compared = measure(challenger, champion)
    except (CheckpointError, StageError) as error:
        # An outage, a cluster without room, a champion that does not load: no verdict on the heads. Only `force` goes on.
        if isinstance(error, StageError) and not gate.force:
            raise
        return (f"it cannot be measured beside version {champion.number}: {error}",), None
    return judge(evaluation, compared, gate, rolled_back=rolled_back), compared


def _fingerprint(backbone: str) -> str:
    """Of "name fingerprint": a name may be a path, which differs from machine to machine."""
    return backbone.rpartition(" ")[2]


def _side_by_side(config: Config, registry: Registry, progress: Progress) -> Measure:
    def measure(challenger: Version, champion: Version) -> Comparison:
        from pipelines.evaluate import compare  # loads PyTorch: not where nothing is measured

        ours, theirs = registry.fetch(challenger), registry.fetch(champion)
        assert ours.folder is not None
        assert theirs.folder is not None
        folders = {"challenger": ours.folder, "champion": theirs.folder}
        return measured("promote", compare, config, progress, **folders)

    return measure


def _record(champion: Version | None, reasons: tuple[str, ...], comparison: Comparison | None, *, passed: bool) -> str:
    """What the gate said, for the version's tag."""
    return json.dumps(
        {
            "passed": passed,
            "forced": passed and bool(reasons),
            "reasons": list(reasons),
            "champion": champion.number if champion else None,
            "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "comparison": asdict(comparison) if comparison else None,
        }
    )


def _told(comparison: Comparison) -> str:
    ours, theirs = comparison.challenger, comparison.champion
    return (
        f"side by side, speedup {ours.speedup:.2f}x beside {theirs.speedup:.2f}x, "
        f"acceleration rate {ours.acceleration_rate:.2f} beside {theirs.acceleration_rate:.2f}"
    )


if __name__ == "__main__":
    main("promote", run)
