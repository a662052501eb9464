"""The playground's files and the metrics over real HTTP, and laws of the page that no browser is needed for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import resources

import httpx
import pytest
from fastapi import FastAPI

from deploy.metrics import Metrics
from deploy.pages import MEDIA_TYPES, add_pages
from tests.unit.deploy.conftest import http_server

FOLDER = resources.files("deploy").joinpath("playground")
SCRIPTS = [name for name in MEDIA_TYPES if name.endswith(".js")]


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics("tiny")


@pytest.fixture(scope="module")
def pages(metrics: Metrics) -> Iterator[str]:
    app = FastAPI()
    add_pages(app, metrics)
    with http_server(app) as url:
        yield url


def source(name: str) -> str:
    return FOLDER.joinpath(name).read_text(encoding="utf-8")


def test_each_file_is_served_with_its_type_and_a_policy(pages: str) -> None:
    for name, media_type in MEDIA_TYPES.items():
        path = "/" if name == "index.html" else f"/playground/{name}"
        reply = httpx.get(pages + path)
        assert reply.status_code == 200
        assert reply.text == source(name)
        assert reply.headers["content-type"] == media_type
        policy = dict(each.split(" ", 1) for each in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert reply.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(pages + path, headers={"If-None-Match": reply.headers["etag"]})
        assert (again.status_code, again.text) == (304, "")


def test_the_folder_holds_what_is_served_and_nothing_else_is_reachable(pages: str) -> None:
    assert {each.name for each in FOLDER.iterdir()} == set(MEDIA_TYPES)
    for path in ("/playground/", "/playground/..%2fapp.py", "/playground/app.py", "/playground/index.htm"):
        assert httpx.get(pages + path).status_code == 404


def test_metrics_are_scraped_in_prometheus_format(pages: str, metrics: Metrics) -> None:
    metrics.load(running=1, waiting=0, slots=2)
    reply = httpx.get(f"{pages}/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    assert 'medusa_num_requests_running{model_name="tiny"} 1.0' in reply.text
    assert "process_resident_memory_bytes" in reply.text


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_never_make_html_of_text(name: str) -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval(", "Function("):
        assert way not in source(name)


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    """The policy would stop both; the page must not need either."""
    for name in MEDIA_TYPES:
        assert not re.search(r"(https?:)?//[\w.-]+\.\w", source(name).replace("http://www.w3.org", ""))
    page = source("index.html")
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", page)
    assert "localStorage" not in "".join(map(source, SCRIPTS)), "a key outlives its tab there"


def test_every_element_that_scripts_ask_for_is_on_the_page() -> None:
    page, scripts = source("index.html"), "".join(map(source, SCRIPTS))
    asked = set(re.findall(r'\$\("([\w-]+)"\)', scripts)) | set(re.findall(r'number\("([\w-]+)"\)', scripts))
    assert len(asked) > 15
    assert asked <= set(re.findall(r'\sid="([\w-]+)"', page))


def test_every_field_has_a_label() -> None:
    page = source("index.html")
    labelled = set(re.findall(r'<label[^>]*\sfor="([\w-]+)"', page))
    within = set(re.findall(r'<label[^>]*>(?:[^<]|<span[^>]*>)*<input[^>]*?\sid="([\w-]+)"', page))
    fields = set(re.findall(r'<(?:input|textarea)[^>]*\sid="([\w-]+)"', page))
    assert fields <= labelled | within
    assert 'role="log"' in page and 'aria-live="polite"' in page


def test_responses_that_are_errors_are_counted(pages: str, metrics: Metrics) -> None:
    def counted() -> float:
        found = re.search(r'medusa_http_errors_total\{.*status="404"\} (\S+)', metrics.prometheus.exposition().decode())
        assert found is not None
        return float(found[1])

    before = counted()
    assert [httpx.get(pages + path).status_code for path in ("/nothing", "/", "/metrics", "/none")] == [
        404,
        200,
        200,
        404,
    ]
    assert counted() == before + 2


def test_the_application_has_the_pages(make_loop: Callable, serve_app: Callable) -> None:
    with make_loop() as loop, serve_app(loop) as url:
        found = [httpx.get(url + path).status_code for path in ("/", "/playground/answer.js", "/metrics")]
        missing = httpx.get(f"{url}/playground/other.js")
    assert found == [200, 200, 200]
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "invalid_request_error"
