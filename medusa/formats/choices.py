"""The reference implementation's trees, `medusa_choices`, and ours. Knows paths; knows no heads.

Both are lists of paths of ranks that count from 0. Ours are in growth order: every beginning of the list is a tree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path as FilePath

from medusa.errors import CheckpointError
from medusa.tree import Path, Tree

CHOICES = "medusa_choices.json"
REFERENCE_RANKS = 10  # the reference takes each head's ten best tokens, whatever the tree asks for


def paths_from_choices(choices: object, where: object) -> list[Path]:
    """Paths in growth order: as given where every beginning is a tree, else shorter ones first. CheckpointError."""
    if not isinstance(choices, list) or not all(
        isinstance(path, list) and path and all(isinstance(rank, int) and not isinstance(rank, bool) for rank in path)
        for path in choices
    ):
        raise CheckpointError(f"{where} must hold a list of paths such as [[0], [0, 0], [1]]")
    paths = [tuple(path) for path in choices]
    if len(set(paths)) < len(paths):
        doubled = sorted({path for path in paths if paths.count(path) > 1})
        raise CheckpointError(f"{where} holds path {list(doubled[0])} more than once")
    try:
        Tree.from_paths(paths)
    except ValueError as error:
        raise CheckpointError(f"{where} holds no usable tree: {error}") from None
    place = {path: index for index, path in enumerate(paths)}
    nested = all(place[path[:-1]] < place[path] for path in paths if len(path) > 1)
    return paths if nested else sorted(paths, key=len)


def read_choices(file: FilePath) -> list[Path]:
    """The paths in a JSON file: `medusa_choices` itself. CheckpointError."""
    try:
        return paths_from_choices(json.loads(file.read_text(encoding="utf-8")), file)
    except FileNotFoundError:
        raise CheckpointError(f"no file of paths at {file}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not text ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error})") from None


def choices_from_paths(paths: Sequence[Path]) -> list[list[int]]:
    """`medusa_choices`. ValueError for ranks that the reference cannot fill."""
    wide = [list(path) for path in paths if max(path) >= REFERENCE_RANKS]
    if wide:
        raise ValueError(
            f"the reference implementation fills {REFERENCE_RANKS} ranks of a head, and this tree has paths {wide[:3]}; "
            "export a smaller tree"
        )
    return [list(path) for path in paths]
