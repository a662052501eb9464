"""Our OpenAPI document is what the server does: schemathesis asks what it allows and what it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from deploy.api_keys import hash_key
from medusa import Model
from tests.unit.deploy.conftest import ScriptedLoop

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, unsupported_method,
]  # fmt: skip
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/version"),
]
# A request without a body can hardly be wrong.
ASKED = [(operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
ASKED += [(operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation[0] == "POST"]


@pytest.fixture(scope="module")
def asked(model: Model, serve_app: Callable) -> Iterator[str]:
    with serve_app(ScriptedLoop(model.backbone.tokenizer, [70, 71])) as url:
        yield url


@pytest.fixture(scope="module")
def document(asked: str) -> Any:
    return schemathesis.openapi.from_url(f"{asked}/openapi.json")


@pytest.mark.parametrize(("operation", "mode"), ASKED)
def test_no_fault_and_no_status_that_is_not_declared(
    document: Any, operation: tuple[str, str], mode: GenerationMode
) -> None:
    """What the document allows (positive) and what it does not (negative), the same requests in every run."""
    method, path = operation

    @given(document[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and method == "POST":
            case.body["model"] = "tiny"  # else hardly a request would come further than its name
        case.call_and_validate(checks=CHECKS, timeout=20)

    ask()


def test_every_operation_is_asked(document: Any) -> None:
    described = {(operation.ok().method.upper(), operation.ok().path) for operation in document.get_all_operations()}
    assert described == set(OPERATIONS)


def test_it_declares_every_refusal_and_no_422(asked: str) -> None:
    document = httpx.get(f"{asked}/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions"):
        responses = document["paths"][path]["post"]["responses"]
        assert responses.keys() == {"200", "400", "401", "404", "408", "413", "429", "500", "503"}
        assert responses["200"]["content"].keys() == {"application/json", "text/event-stream"}
        for status in responses.keys() - {"200"}:
            assert responses[status]["content"]["application/json"]["schema"] == {
                "$ref": "#/components/schemas/ErrorBody"
            }
    assert "security" not in document


def test_it_says_that_a_key_is_wanted(model: Model, serve_app: Callable) -> None:
    loop = ScriptedLoop(model.backbone.tokenizer, [70])
    with serve_app(loop, api_keys=[hash_key("k")]) as url:
        document = httpx.get(f"{url}/openapi.json", headers={"Authorization": "Bearer k"}).json()
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_no_page_of_documentation_loads_scripts_from_elsewhere(asked: str) -> None:
    assert [httpx.get(f"{asked}{path}").status_code for path in ("/docs", "/redoc")] == [404, 404]
