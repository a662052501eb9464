"""Trained heads that come with the package. Knows folders only."""

from __future__ import annotations

from pathlib import Path

from medusa.errors import CheckpointError

ROOT = Path(__file__).parent

SUFFIXES = {
    "default": "",
    "hydra": "",  # what they were called before they were the default
    "plain": "-plain",
    "medusa2": "-medusa2",
}  # name of a shipped set → what follows its backbone's name in that of its folder
NAMES = ", ".join(name for name in SUFFIXES if name != "hydra")  # as messages give them


def heads_folder(heads: str | Path, backbone_name: str) -> Path:
    """`heads` as given, or where they are the name of a shipped set ("default", "hydra", "plain", "medusa2"), its folder.

    CheckpointError where there is no such folder, and where the backbone has no such set.
    """
    if str(heads) in SUFFIXES:
        return pretrained_heads(backbone_name, str(heads))
    if not Path(heads).is_dir():
        raise CheckpointError(f"no heads folder at {heads}; give a checkpoint's folder, or {NAMES}")
    return Path(heads)


def pretrained_heads(backbone_name: str, name: str = "default") -> Path:
    """Folder of a set of heads shipped for a backbone. CheckpointError where there is none."""
    folder = ROOT / (backbone_name + SUFFIXES[name])
    if "/" in backbone_name or not (folder / "config.json").is_file():
        shipped = sorted(path.parent.name for path in ROOT.glob("*/config.json"))
        raise CheckpointError(
            f"no heads come with this package for backbone {backbone_name!r} under the name {name!r} (there are: "
            f"{', '.join(shipped) or 'none'}); "
            f"give a heads folder, or none to decode plainly"
        )
    return folder
