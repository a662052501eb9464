"""The layers hold when the code runs, not only when it is read; `make lint` reads it (import-linter)."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "mlflow", "deepspeed", "fastapi", "pipelines", "deploy")


def loaded_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after `statement`."""
    program = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 0, outcome.stderr
    return set(outcome.stdout.split())


def test_import_medusa_is_light() -> None:
    loaded = loaded_after("import medusa, medusa.engine, medusa.checkpoint, medusa.tree_search, medusa.losses")
    assert "medusa" in loaded
    assert not loaded & set(HEAVY)


def test_the_probe_sees_what_is_loaded() -> None:
    """Else the test above could not fail."""
    assert "fastapi" in loaded_after("import fastapi")


def imported_modules(source: str) -> Iterator[str]:
    """Every absolute module that a source imports, anywhere in it: `from a import b` counts as a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("source", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda path: path.stem)
def test_pipelines_never_import_serve(source: Path) -> None:
    """import-linter sees ray as one package, so this half of the contract is read here."""
    serve = [name for name in imported_modules(source.read_text()) if f"{name}.".startswith("ray.serve.")]
    assert not serve


def test_imported_modules_finds_every_form() -> None:
    source = "import ray.serve\nfrom ray import serve\ndef f():\n    from ray.serve import run"
    assert [name for name in imported_modules(source) if name.startswith("ray.serve")] == [
        "ray.serve",
        "ray.serve",
        "ray.serve",
        "ray.serve.run",
    ]


def test_lint_runs_the_import_contracts() -> None:
    """The contracts of pyproject.toml bind only if `make lint` calls the tool that reads them."""
    dry_run = subprocess.run(["make", "-n", "-W", "pyproject.toml", "lint"], cwd=ROOT, capture_output=True, text=True)
    assert "lint-imports" in dry_run.stdout
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    forbidden = {name for contract in contracts for name in contract.get("forbidden_modules", ())}
    assert {"ray", "mlflow", "deepspeed", "fastapi"} <= forbidden
    assert any(contract["type"] == "layers" for contract in contracts)
