"""The queries of the Grafana dashboard and of the alert rules, as Grafana would send them. Knows both files; asks nobody."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import yaml

FOLDER = resources.files("deploy").joinpath("grafana")
ALERTS = FOLDER.joinpath("alerts.yaml")


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FOLDER.joinpath("medusa.json").read_text(encoding="utf-8"))
    return content


def panel_queries(*, prefix: str = "medusa", interval: str = "5m") -> list[tuple[str, str]]:
    """(panel, query) with the dashboard's variables filled in."""
    values = {"${prefix}": prefix, "$__rate_interval": interval, "$model": ".*"}
    queries = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in values.items():
                query = query.replace(variable, value)
            assert "$" not in query, f"{panel['title']}: an unknown variable in {query}"
            queries.append((panel["title"], query))
    return queries


def alert_queries() -> list[tuple[str, str]]:
    """(alert, condition)."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def metric_names(query: str) -> set[str]:
    return set(re.findall(r"\bmedusa_\w+", query.replace("(ray_)?", " ").replace("ray_medusa", "medusa")))
