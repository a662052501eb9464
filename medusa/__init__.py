"""MEDUSA decoding for transformers models: extra heads, tree attention, exact or typical acceptance (arXiv 2401.10774)."""

from medusa.config import HeadsConfig, SamplingParams
from medusa.errors import BackboneError, CheckpointError, MedusaError, PromptError
from medusa.generate import Chunk, Generation, Model, load
from medusa.grammar import Grammar
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
