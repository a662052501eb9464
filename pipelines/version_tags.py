"""What a registered version says of itself by its tags. Loads neither models nor MLflow."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipelines.report import Evaluation

if TYPE_CHECKING:
    from pipelines.registry import Version

logger = logging.getLogger(__name__)

TAG_DIGEST = "medusa.digest"  # `folder_digest` of the version's folder; of a training run, of its last checkpoint's
TAG_EVALUATION = "medusa.evaluation"  # the JSON of an `Evaluation`
TAG_BACKBONE = "medusa.backbone"  # its name and fingerprint
TAG_GATE = "medusa.gate"  # JSON: what promotion last said of it
TAG_PREVIOUS = "medusa.previous_champion"  # the number of the version that it followed
TAG_ROLLED_BACK = "medusa.rolled_back"  # when; empty once it has come back


def stored_evaluation(version: Version) -> Evaluation | None:
    """The evaluation that the version was registered with; None where it has none that this release can read."""
    text = version.tags.get(TAG_EVALUATION)
    if not text:
        return None
    try:
        return Evaluation.from_json(text)
    except (ValueError, TypeError, KeyError):
        logger.warning("version %d bears an evaluation that is not of this release", version.number)
        return None
