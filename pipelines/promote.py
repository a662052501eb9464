"""The gate: challenger to champion, and back. Knows figures and aliases; loads no model, measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import Config, PromoteSection
from pipelines.errors import PromotionRefused, StageError
from pipelines.register import TAG_EVALUATION
from pipelines.registry import CHALLENGER, CHAMPION, Registry, Version, open_registry
from pipelines.report import Evaluation
from pipelines.stage import Progress, Step, ignore_progress, main

TAG_PREVIOUS = "medusa.previous_champion"


@dataclass(frozen=True, kw_only=True)
class PromoteResult:
    """Who is champion now and who was. `overruled` are the gate's reasons that `force` set aside."""

    champion: int
    previous: int | None
    overruled: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        if self.previous == self.champion:
            return f"version {self.champion} is champion already"
        forced = f" (forced against: {'; '.join(self.overruled)})" if self.overruled else ""
        return f"version {self.champion} is champion, {f'version {self.previous}' if self.previous else 'none'} was{forced}"


def run(config: Config, progress: Progress = ignore_progress) -> PromoteResult:
    """Promote the challenger. Raises PromotionRefused with the gate's reasons, StageError where there is no challenger."""
    registry = open_registry(config)
    with registry.lock(config.promote.lock_timeout_s):
        challenger, champion = registry.aliased(CHALLENGER), registry.aliased(CHAMPION)
        if challenger is None:
            raise StageError(f"no version of {registry.model_name} is {CHALLENGER}; run `register` first")
        if champion is not None and champion.number == challenger.number:
            return PromoteResult(champion=champion.number, previous=champion.number)
        reasons = judge(_evaluation(challenger), _evaluation(champion) if champion else None, config.promote)
        if reasons and not config.promote.force:
            raise PromotionRefused(challenger.number, reasons)
        _crown(registry, challenger, champion)
    progress(Step(done=1, total=1, note=f"version {challenger.number}"))
    return PromoteResult(champion=challenger.number, previous=champion.number if champion else None, overruled=reasons)


def rollback(config: Config) -> PromoteResult:
    """Make the champion's predecessor champion again. Raises StageError where there is none."""
    registry = open_registry(config)
    with registry.lock(config.promote.lock_timeout_s):
        champion = registry.aliased(CHAMPION)
        if champion is None or TAG_PREVIOUS not in champion.tags:
            raise StageError(f"{registry.model_name} has no earlier champion to go back to")
        previous = int(champion.tags[TAG_PREVIOUS])
        registry.set_alias(CHAMPION, previous)
    return PromoteResult(champion=previous, previous=champion.number)


def judge(challenger: Evaluation | None, champion: Evaluation | None, gate: PromoteSection) -> tuple[str, ...]:
    """Why the challenger must not be promoted; empty when it may. Pure.

    Identity with plain decoding must have been checked and have held. Then acceleration rate and speedup must reach the
    champion's, less the gate's margins, measured on the same prompts.
    """
    if challenger is None:
        return ("it was never evaluated",)
    reasons = []
    if challenger.identity_checked == 0:
        reasons.append("its identity with plain decoding was not checked (evaluate.identity_prompts is 0)")
    if challenger.identity_differing:
        reasons.append(
            f"{challenger.identity_differing} of {challenger.identity_checked} float32 answers differ from plain decoding"
        )
    if (rate := challenger.acceleration_rate) < gate.min_acceleration:
        reasons.append(f"acceleration rate {rate:.2f} is below promote.min_acceleration {gate.min_acceleration:g}")
    if champion is None:
        return tuple(reasons)
    if challenger.prompts_digest != champion.prompts_digest:
        return (*reasons, "it was evaluated on other prompts than the champion; evaluate both alike")
    for name, margin in (("acceleration_rate", gate.acceleration_margin), ("speedup", gate.speedup_margin)):
        ours, theirs = getattr(challenger, name), getattr(champion, name)
        if ours < theirs * (1 - margin):
            reasons.append(
                f"{name.replace('_', ' ')} {ours:.2f} is more than {margin:.0%} below the champion's {theirs:.2f}"
            )
    return tuple(reasons)


def _evaluation(version: Version) -> Evaluation | None:
    text = version.tags.get(TAG_EVALUATION)
    return Evaluation.from_json(text) if text else None


def _crown(registry: Registry, challenger: Version, champion: Version | None) -> None:
    """The way back is written before the alias moves, so that it is never lost."""
    if champion is not None:
        registry.tag(challenger.number, {TAG_PREVIOUS: str(champion.number)})
    registry.set_alias(CHAMPION, challenger.number)


if __name__ == "__main__":
    main("promote", run)
