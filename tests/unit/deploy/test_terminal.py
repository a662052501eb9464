"""Tables fit a terminal of eighty columns."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from deploy.terminal import versions_table
from pipelines.listing import Entry
from pipelines.report import Evaluation, Fidelity, Quality

REASON = "speedup 1.10 of version 7's 1.52 is below the margin"


def entry(number: int, *aliases: str, gate: dict[str, Any] | None = None) -> Entry:
    part = Fidelity(num_tokens=9, original_perplexity=1.75, tuned_perplexity=1.77, mean_kl=0.004)
    evaluation = Evaluation(
        num_prompts=80, num_tokens=3840, num_nodes=64, dtype="bfloat16", device="cpu", acceleration_rate=2.44,
        plain_step_s=0.02, tree_step_s=0.03, plain_tokens_per_s=50.0, tree_tokens_per_s=76.0, num_differing=0,
        identity_checked=16, identity_differing=0, prompts_digest="p", checkpoint_digest="c",
        quality=Quality(answers=part, text=part),
    )  # fmt: skip
    return Entry(
        version=number, aliases=aliases, created="2026-11-26 10:00", run_id="r", digest="d", backbone="b",
        evaluation=evaluation, gate=gate, rolled_back=None,
    )  # fmt: skip


def test_versions_are_a_line_each_and_what_the_gate_said_stands_below() -> None:
    out = io.StringIO()
    refused = {"passed": False, "champion": 7, "reasons": [REASON]}
    Console(file=out, width=80).print(versions_table([entry(12, "challenger"), entry(8, gate=refused)]))
    text = out.getvalue()
    lines = [line.split() for line in text.splitlines()]
    figures = ["2026-11-26", "10:00", "64", "2.44", "1.52×", "16/16", "+1.14%"]
    assert ["12", "challenger", *figures] in lines and ["8", *figures] in lines
    assert "version 12: not judged" in text
    assert f"version 8: refused beside version 7: {REASON}" in " ".join(text.split())
