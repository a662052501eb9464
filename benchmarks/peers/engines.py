"""Which foreign engines there are and how each is started: vLLM plain and with our heads, llama.cpp. Starts none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.process import Launch
from benchmarks.serving_servers import vllm_environment
from medusa.backbone import dtype_name
from medusa.formats.exporting import export_heads, save_backbone
from medusa.generate import Model
from medusa.provision import DEFAULT_BACKBONE, default_backbone, default_gguf

VLLM = "vLLM"
VLLM_HEADS = "vLLM with our heads"
LLAMA = "llama.cpp"
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Environments:
    """Interpreters of the environments that hold the engines; None leaves an engine out. `vllm_options` are arguments of
    vLLM's `LLM`; `gguf` is the file that llama.cpp reads, None for the default backbone's own."""

    vllm: Path | None = None
    llama: Path | None = None
    vllm_options: Mapping[str, Any] | None = None
    gguf: Path | None = None


def parse_options(text: str) -> dict[str, Any]:
    """`--vllm-options`. ValueError for what is no JSON object."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f'--vllm-options must be a JSON object like {{"enforce_eager": true}}, got {text!r} ({error})'
        ) from error


def weights_folder(model: Model, backbone: str, workdir: Path) -> str:
    """What others load to hold the same weights as `model`: its source, or a copy in `workdir` where heads have tuned it."""
    if model.checkpoint is not None and model.checkpoint.adapters is not None:
        tuned = workdir / "backbone"
        save_backbone(tuned, model.backbone)
        return str(tuned)
    return str(default_backbone()) if backbone == DEFAULT_BACKBONE else backbone


def peer_launches(
    environments: Environments,
    model: Model,
    *,
    source: str,
    workdir: Path,
    context_length: int,
    max_batch_size: int,
    num_threads: int,
    others: Sequence[Model] = (),
) -> list[Launch]:
    """The engines asked for, each for prompts and answers of `context_length` together. Our heads, or where vLLM has no such
    kind the first of `others` of one that it has, are exported into `workdir`. ValueError for llama.cpp without a file to
    read."""
    launches = []
    if environments.vllm is not None:
        drafts: dict[str, dict[str, Any] | None] = {VLLM: None}
        room = context_length
        known = [one.checkpoint for one in (model, *others) if one.checkpoint is not None]
        if checkpoint := next((one for one in known if one.heads.config.kind == "medusa"), None):
            heads = workdir / "heads"
            export_heads(heads, checkpoint, model.backbone, format="vllm", backbone_saved=True)
            count = checkpoint.heads.num_heads
            drafts[VLLM_HEADS] = {"method": "medusa", "model": str(heads), "num_speculative_tokens": count}
            room += count + 1  # at the end of its context vLLM drafts less
        for name, draft in drafts.items():
            settings = {
                "model": source, "dtype": dtype_name(model.backbone.dtype), "draft": draft,
                "context_length": room, "max_batch_size": max_batch_size,
                "options": dict(environments.vllm_options or {}),
            }  # fmt: skip
            launches.append(
                Launch(
                    name=name, python=environments.vllm, engine=HERE / "vllm_engine.py", settings=settings,
                    environment=vllm_environment(num_threads), max_batch_size=max_batch_size,
                )
            )  # fmt: skip
    if environments.llama is not None:
        gguf = environments.gguf or _own_gguf(model)
        settings = {"model": str(gguf), "context_length": context_length, "num_threads": num_threads}
        launches.append(
            Launch(name=LLAMA, python=environments.llama, engine=HERE / "llama_engine.py", settings=settings)
        )
    return launches


def _own_gguf(model: Model) -> Path:
    if model.backbone.name != DEFAULT_BACKBONE:
        raise ValueError(f"llama.cpp needs a GGUF file of {model.backbone.name}: give --gguf FILE")
    return default_gguf()
