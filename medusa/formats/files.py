"""Tensors from other people's files, which may be hostile: safetensors, or pickles that can hold tensors and nothing else.

Nothing that a file says is ever executed, and no file outside the folder is opened.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from medusa.errors import CheckpointError

# A whole model's weights, in the order in which transformers looks for them.
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt or .bin file whose names are wanted. CheckpointError for anything else in it."""
    with _reading(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor for name, tensor in _only_tensors(loaded, path).items() if wanted(name)}


def read_model(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The wanted tensors of a model folder, sharded or not. CheckpointError where there are no weights."""
    file = _model_file(folder)
    if file.suffix != ".json":
        return read_tensors(file, wanted)
    shards = _shards(file)
    found: dict[str, Tensor] = {}
    for shard in sorted({shard for name, shard in shards.items() if wanted(name)}):
        found |= read_tensors(folder / shard, wanted)
    missing = sorted(name for name in shards if wanted(name) and name not in found)
    if missing:
        raise CheckpointError(f"{folder} lacks tensors that its index names: {', '.join(missing)}")
    return found


def model_names(folder: Path) -> set[str]:
    """The names of all tensors of a model folder."""
    file = _model_file(folder)
    if file.suffix == ".json":
        return set(_shards(file))
    if file.suffix != ".safetensors":
        return set(read_tensors(file))
    with _reading(file), safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the checkpoint is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What can go wrong with a file of tensors, as one CheckpointError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is no pickle of tensors alone: loading it could run code of its author, so it is refused; "
            "ask for a safetensors file"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason}): truncated or of another type") from None


def _model_file(folder: Path) -> Path:
    file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join(MODEL_FILES)}")
    return file


def _shards(index: Path) -> dict[str, str]:
    """Tensor → file of the same folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; the checkpoint is damaged")
    outside = sorted({shard for shard in shards.values() if Path(shard).name != shard})
    if outside:
        raise CheckpointError(f"{index} points outside its folder: {', '.join(outside)}; it is refused")
    return shards


def _only_tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(loaded).__name__}")
    odd = [str(name) for name, value in loaded.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise CheckpointError(f"{path} must hold tensors by name; unexpected: {', '.join(odd)}")
    return loaded
