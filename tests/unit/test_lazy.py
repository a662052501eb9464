"""What costs seconds to import is imported when it is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import medusa


def run(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=kept | environment, check=False
    )
    assert not done.stderr, done.stderr
    return done.stdout.strip()


def test_a_configuration_and_its_slips_need_no_pytorch() -> None:
    code = """
import sys, medusa, deploy.cli
try:
    deploy.cli._configured(None, ['train.steps=x'])
except medusa.MedusaError as error:
    print(error)
print('torch' in sys.modules)"""
    told = run(code).splitlines()
    assert told[0].startswith("train.steps: ") and told[-1] == "False"


def test_all_that_medusa_names_is_there() -> None:
    assert all(getattr(medusa, name) is not None for name in medusa.__all__)
    assert set(medusa.__all__) <= set(dir(medusa))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        medusa.lod  # noqa: B018
    assert run("from medusa import Tree, load\nprint(Tree.__name__, load.__name__)") == "Tree load"


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_idle_threads_of_commands_and_servers_soon_sleep_unless_the_user_says_else(
    given: dict[str, str], found: str
) -> None:
    assert run("import os, deploy\nprint(os.environ.get('GOMP_SPINCOUNT'))", **given) == found


@pytest.mark.parametrize(
    "arguments",
    [
        ["key", "new"],
        ["generate", "Hi", "--heads", "/nowhere"],
        ["generate", "Hi", "--top-p", "2"],
        ["registry", "list", "workdir=/nowhere"],
    ],
)
def test_what_needs_no_model_waits_for_no_pytorch(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ['medusa', *{arguments!r}]
import deploy.cli
sys.stderr = sys.stdout
try:
    deploy.cli.main()
except SystemExit as end:
    print(end.code, 'torch' in sys.modules)"""
    told = run(code).splitlines()
    assert told[-1] in ("0 False", "2 False") and told[0].startswith(
        ("key:  sk-medusa-", "medusa: error: ", "no version ")
    )
