"""What tuning or rounding did to a backbone: perplexity and divergence beside the original. Knows token ids; loads nothing.

S tokens, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from medusa.backbone import Backbone
from pipelines.errors import ConfigError
from pipelines.heldout_text import PARAGRAPHS
from pipelines.report import Fidelity, Quality

_ROWS = 64  # positions whose logits exist at once
Sequences = Iterable[tuple[Sequence[int], Sequence[int]]]


def compare_backbones(
    tuned: Backbone, original: Backbone, *, answers: Sequences, texts: Iterable[Sequence[int]]
) -> Quality:
    """`answers` are (prompt ids, ids of the original's greedy answer), of which the answers count; `texts` are ids of
    human text, of which all but the first token count. Text past the context is left out. ValueError for no tokens."""
    behind_first = ((ids[:1], ids[1:]) for ids in texts)
    return Quality(answers=fidelity(tuned, original, answers), text=fidelity(tuned, original, behind_first))


@torch.inference_mode()
def fidelity(tuned: Backbone, original: Backbone, sequences: Sequences) -> Fidelity:
    """Both backbones on the same tokens: each reads (context, continuation) and is asked for the continuation."""
    limit = min(tuned.max_context, original.max_context)
    count, ours, theirs, kl = 0, 0.0, 0.0, 0.0
    for context, continuation in sequences:
        ids = torch.tensor([[*context, *continuation][:limit]])
        first = max(len(context), 1)
        if ids.shape[1] <= first:
            continue
        wanted = ids[0, first:]
        hidden_tuned, hidden_original = (
            model.step_alone(ids.to(model.device))[0, first - 1 : -1] for model in (tuned, original)
        )
        for start in range(0, len(wanted), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p = _log_probs(original, hidden_original[rows])
            log_q = _log_probs(tuned, hidden_tuned[rows])
            index = wanted[rows, None]
            theirs -= float(log_p.gather(1, index).sum())
            ours -= float(log_q.gather(1, index).sum())
            kl += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(wanted)
    if not count:
        raise ValueError("no token to compare the backbones on; give longer answers or texts")
    return Fidelity(
        num_tokens=count,
        original_perplexity=math.exp(theirs / count),
        tuned_perplexity=math.exp(ours / count),
        mean_kl=kl / count,
    )


def heldout_paragraphs(path: Path | None) -> list[str]:
    """The paragraphs of a file, one a line, or the built-in ones. ConfigError where there are none."""
    if path is None:
        return list(PARAGRAPHS)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluate.text: cannot read {path}: {error}") from None
    if not any(line.strip() for line in lines):
        raise ConfigError(f"evaluate.text: {path} holds no text; give one paragraph a line")
    return [line.strip() for line in lines if line.strip()]


def _log_probs(backbone: Backbone, hidden: Tensor) -> Tensor:
    """[rows,V] on the CPU in float64, so that sums over many tokens are those of the models, not of the adding."""
    logits = backbone.logits(hidden)
    return torch.log_softmax(logits.to("cpu", torch.float64), dim=-1)
