"""MEDUSA decoding for transformers models: extra heads, tree attention, exact or typical acceptance (arXiv 2401.10774)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from medusa.config import HeadsConfig, SamplingParams
from medusa.errors import BackboneError, CheckpointError, MedusaError, PromptError
from medusa.grammar import Grammar

if TYPE_CHECKING:
    from medusa.generate import Chunk, Generation, Model, load
    from medusa.tree import Tree

__version__ = "0.1.0"

__all__ = [
    "BackboneError",
    "CheckpointError",
    "Chunk",
    "Generation",
    "Grammar",
    "HeadsConfig",
    "MedusaError",
    "Model",
    "PromptError",
    "SamplingParams",
    "Tree",
    "load",
]

# What needs PyTorch and transformers, seconds of import, comes when it is asked for: a slip in a command line needs neither.
_LATER = {"Chunk": "generate", "Generation": "generate", "Model": "generate", "load": "generate", "Tree": "tree"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_LATER]
