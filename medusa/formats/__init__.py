"""Medusa heads in other systems' files: the reference implementation's three layouts and vLLM's, both ways, strictly."""

from medusa.formats.exporting import FORMATS, Exported, check_request, export_heads, save_backbone
from medusa.formats.importing import Imported, holds_backbone, import_heads

__all__ = [
    "FORMATS",
    "Exported",
    "Imported",
    "check_request",
    "export_heads",
    "holds_backbone",
    "import_heads",
    "save_backbone",
]
