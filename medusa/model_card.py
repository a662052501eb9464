"""The model card of a folder of heads, from its configuration. Knows text; reads and writes nothing."""

from __future__ import annotations

import json
from typing import Any


def card_text(config: dict[str, Any]) -> str:
    """README.md of a checkpoint whose config.json this is."""
    lines = [
        f"# Medusa heads for {config['backbone_name']}",
        "",
        f"{config['num_heads']} {config['kind']} heads, {config['num_layers']} residual layer(s) each, "
        f"{config['lm_heads']} lm_head; backbone fingerprint `{config['backbone_fingerprint']}`.",
    ]
    if config["adapters"]:
        lines.append(f"The backbone is tuned with them (MEDUSA-2): adapters {json.dumps(config['adapters'])}.")
    for heading, text in config["card"].items():
        lines += ["", f"## {heading.replace('_', ' ').capitalize()}", ""]
        lines += [f"- {key}: {value}" for key, value in text.items()] if isinstance(text, dict) else [str(text)]
    if config["accuracy"]:
        ranks = [r for r in (1, 5, 10) if r <= len(config["accuracy"][0])]
        lines += ["", "## Held-out accuracy", "", "| head | " + " | ".join(f"top-{r}" for r in ranks) + " |"]
        lines += ["| --- |" + " --- |" * len(ranks)]
        for k, row in enumerate(config["accuracy"], start=1):
            lines.append(f"| {k} | " + " | ".join(f"{sum(row[:r]):.3f}" for r in ranks) + " |")
    return "\n".join(lines) + "\n"
