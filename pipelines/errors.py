"""What can go wrong in the life cycle, by name. Messages are one line, written for the user."""

from __future__ import annotations

from medusa.errors import MedusaError


class ConfigError(MedusaError):
    """The configuration is missing, malformed or contradicts itself."""


class StageError(MedusaError):
    """A stage cannot begin: what it reads is missing, stale or was made by something else."""


class TrackingUnreachable(StageError):
    """No MLflow server answers where one should be; work that can go on without it does."""


class StageFailed(StageError):
    """One of several stages that were run failed; the message begins with its name."""


class PromotionRefused(MedusaError):
    """The gate keeps a challenger from becoming champion; `reasons` say why."""

    def __init__(self, version: int, reasons: tuple[str, ...]) -> None:
        self.version = version
        self.reasons = reasons
        super().__init__(f"version {version} is not promoted: {'; '.join(reasons)} (promote.force=true overrides)")
