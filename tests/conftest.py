"""Fixtures of every tier of tests. Nothing here reaches a network: models are tiny, random and made on the spot."""

from __future__ import annotations

import os
import signal

# Before torch, transformers, ray or mlflow are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import tests.interpreter  # noqa: F401  before anything that may import Triton
from tests.tiny_models import save_tiny_folder

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# Their processes want every core for themselves, and some of them wait for one another.
ALONE = ("integration", "e2e")

# A run that a shell began in the background ignores Ctrl-C, and whatever it starts would too: tests send it on purpose.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in float32 with its tokenizer: `medusa.load(tiny_folder, heads=None)` works offline.

    Read-only by agreement: the whole session shares it.
    """
    return save_tiny_folder(tmp_path_factory.mktemp("tiny") / "llama", "llama", seed=0)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random state and leaves none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With `-n`, a file's tests run in one process; integration and end-to-end tests, one after the other, when the rest is
    done or nearly so."""
    from xdist.scheduler import LoadFileScheduling

    class OneByOne(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "alone" if file.startswith(tuple(f"tests/{tier}/" for tier in ALONE)) else file

    config.option.loadscopereorder = False
    return OneByOne(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests under integration/, e2e/ and gpu/ carry that marker without saying so; the longest come last."""
    tiers = {"integration", "e2e", "gpu"}
    here = Path(__file__).parent
    for item in items:
        for tier in tiers & set(item.path.relative_to(here).parts):
            item.add_marker(tier)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=lambda item: any(item.get_closest_marker(tier) for tier in ALONE))
