"""Trained heads that come with the package. Knows folders only."""

from __future__ import annotations

from pathlib import Path

from medusa.errors import CheckpointError

ROOT = Path(__file__).parent


def pretrained_heads(backbone_name: str) -> Path:
    """Folder of the heads shipped for a backbone. CheckpointError where there are none."""
    folder = ROOT / backbone_name
    if "/" in backbone_name or not (folder / "config.json").is_file():
        shipped = sorted(path.parent.name for path in ROOT.glob("*/config.json"))
        raise CheckpointError(
            f"no heads come with this package for backbone {backbone_name!r} (there are: {', '.join(shipped) or 'none'}); "
            f"give a heads folder, or none to decode plainly"
        )
    return folder
