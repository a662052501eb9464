"""The dashboard and the alerts ask for what is exported, and for all of it that an operator needs."""

from __future__ import annotations

import re

from deploy import metric_names as names
from deploy.metric_names import SPECS
from tests.dashboard import alert_queries, dashboard, metric_names, panel_queries

EXPORTED = {series: spec for spec in SPECS for series in spec.series}


def test_every_metric_asked_for_is_exported() -> None:
    queries = panel_queries() + alert_queries()
    assert len(queries) > 40
    for where, query in queries:
        asked = metric_names(query)
        assert asked, f"{where} asks for no metric of ours: {query}"
        assert asked <= EXPORTED.keys(), f"{where}: {sorted(asked - EXPORTED.keys())}"


def test_every_metric_that_an_operator_needs_is_shown() -> None:
    """What is not shown is a distribution whose quantiles stand under another name, or said in another way."""
    shown = {EXPORTED[name].name for _, query in panel_queries() for name in metric_names(query)}
    assert {spec.name for spec in SPECS} == shown


def test_labels_in_queries_are_those_of_their_metrics() -> None:
    labels = {label for spec in SPECS for label in spec.labels} | {names.MODEL_LABEL, "le", "__name__"}
    for where, query in panel_queries() + alert_queries():
        named = set(re.findall(r"(\w+)=~?\"", query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            named |= {label.strip() for label in group.split(",")}
        assert named <= labels, f"{where}: {sorted(named - labels)}"


def test_rates_are_of_counters_and_quantiles_of_histograms() -> None:
    for where, query in panel_queries():
        for name in re.findall(r"rate\((medusa_\w+)", query):
            assert EXPORTED[name].kind in ("counter", "histogram"), f"{where}: rate of {name}"
        if "histogram_quantile" in query:
            assert all(name.endswith("_bucket") for name in metric_names(query)), where
            assert re.search(r"sum by \([^)]*\ble\b", query), f"{where}: quantiles need le"


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_source_of_metrics_is_a_choice_of_the_reader() -> None:
    variables = {each["name"]: each for each in dashboard()["templating"]["list"]}
    assert [option["value"] for option in variables["prefix"]["options"]] == ["medusa", "ray_medusa"]
    of_ray = {
        name for _, query in panel_queries(prefix="ray_medusa") for name in re.findall(r"\b(?:ray_)?medusa_\w+", query)
    }
    assert of_ray and all(name.startswith("ray_medusa_") for name in of_ray)
