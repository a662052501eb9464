"""What a registry holds, told: versions, aliases, figures, the gate's verdicts. Reads the registry; changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.config import Config
from pipelines.registry import Version, has_registry, open_registry
from pipelines.report import Evaluation
from pipelines.version_tags import TAG_BACKBONE, TAG_DIGEST, TAG_GATE, TAG_ROLLED_BACK, stored_evaluation


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version. `gate` is what promotion last said of it: passed, forced, reasons, champion, when, comparison."""

    version: int
    aliases: tuple[str, ...]
    created: str
    run_id: str
    digest: str
    backbone: str
    evaluation: Evaluation | None
    gate: dict[str, Any] | None
    rolled_back: str | None

    @property
    def verdict(self) -> str:
        """The gate's last word, in a few words."""
        if self.rolled_back:
            return f"rolled back on {self.rolled_back}"
        if self.gate is None:
            return "not judged"
        beside = f" beside version {self.gate['champion']}" if self.gate.get("champion") else ""
        reasons = "; ".join(self.gate.get("reasons") or ())
        if not self.gate.get("passed"):
            return f"refused{beside}: {reasons}"
        return f"forced{beside} against: {reasons}" if self.gate.get("forced") else f"passed{beside}"

    def as_dict(self) -> dict[str, Any]:
        found = self.evaluation
        ratios = {"overhead": found.overhead, "speedup": found.speedup} if found else {}
        return asdict(self) | {"evaluation": asdict(found) | ratios if found else None}


def list_entries(config: Config) -> list[Entry]:
    """All versions, the newest first; none, and nothing made, where there is no registry yet. StageError where it is out
    of reach."""
    if not has_registry(config):
        return []
    return [_entry(version) for version in reversed(open_registry(config).versions())]


def _entry(version: Version) -> Entry:
    tags = version.tags
    return Entry(
        version=version.number,
        aliases=version.aliases,
        created=version.created,
        run_id=version.run_id,
        digest=tags.get(TAG_DIGEST, ""),
        backbone=tags.get(TAG_BACKBONE, ""),
        evaluation=stored_evaluation(version),
        gate=_gate(tags.get(TAG_GATE)),
        rolled_back=tags.get(TAG_ROLLED_BACK) or None,
    )


def _gate(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
