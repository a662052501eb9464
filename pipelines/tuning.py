"""How MEDUSA-2 changes a backbone: low-rank adapters through peft, or all its weights. Knows modules; knows no worker."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from medusa.adapters import Adapters
from medusa.backbone import Backbone
from pipelines.config import TrainSection
from pipelines.errors import ConfigError

_NAME = "default"


def check_tuning(train: TrainSection) -> None:
    """ConfigError where this machine cannot tune the backbone as asked."""
    if train.method == "medusa2" and train.tune == "qlora":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError("train.tune qlora needs bitsandbytes, which is not installed; install it, or use lora")
        if not train.use_gpu:
            raise ConfigError("train.tune qlora needs a GPU; set train.use_gpu, or use lora")
        if train.dtype != "bfloat16":
            raise ConfigError("train.tune qlora computes in bfloat16; set train.dtype to it, or use lora")


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers but a tied lm_head: merging an adapter there would change the embeddings."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not embeddings.weight
    ]


def make_tunable(backbone: Backbone, train: TrainSection) -> None:
    """Freeze the backbone but for what is tuned; with LoRA, put adapters beside its linear layers, in place."""
    assert backbone.fingerprint, "taken from the original, before anything is put into it"
    if train.tune == "full":
        backbone.model.requires_grad_(True)
        return
    from peft import LoraConfig, inject_adapter_in_model

    if train.tune == "qlora":
        backbone.model = _quantised(backbone)
    backbone.model.requires_grad_(False)
    config = LoraConfig(
        r=train.lora_rank,
        lora_alpha=train.lora_alpha,
        lora_dropout=train.lora_dropout,
        target_modules=linear_layers(backbone.model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        inject_adapter_in_model(config, backbone.model, adapter_name=_NAME)
    set_dropout(backbone.model, on=True)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have adapters beside them, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def set_dropout(model: nn.Module, *, on: bool) -> None:
    """The backbone itself stays in eval mode; dropout is the adapters' alone."""
    for layer in adapted_layers(model).values():
        layer.lora_dropout.train(on)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The original backbone for the time of the block."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def low_rank_of(layer: nn.Module) -> tuple[Any, nn.Module, nn.Parameter, float] | None:
    """(dropout, A, B's weight, scale) of an adapted layer; None for one that has no adapter."""
    if not hasattr(layer, "lora_A"):
        return None
    adapted: Any = layer
    return adapted.lora_dropout[_NAME], adapted.lora_A[_NAME], adapted.lora_B[_NAME].weight, adapted.scaling[_NAME]


def exported(backbone: Backbone, train: TrainSection) -> Adapters:
    """What was tuned, under the names of the original model. The weights must be whole (gathered)."""
    if train.tune == "full":
        return Adapters(kind="full", tensors={name: p.detach() for name, p in backbone.model.named_parameters()})
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(backbone.model).items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[_NAME].weight.detach()
        tensors[f"{name}.lora_B.weight"] = layer.lora_B[_NAME].weight.detach()
    return Adapters(kind="lora", tensors=tensors, rank=train.lora_rank, alpha=train.lora_alpha)


@torch.no_grad()
def start_from(backbone: Backbone, adapters: Adapters, train: TrainSection) -> None:
    """Go on from a tuned backbone. ConfigError where it was tuned in another way than this run tunes."""
    if train.tune == "full" and adapters.kind == "full":
        adapters.merge_into(backbone.model)
        return
    wanted = exported(backbone, train)
    if (wanted.kind, wanted.rank, wanted.alpha) != (adapters.kind, adapters.rank, adapters.alpha) or (
        wanted.tensors.keys() != adapters.tensors.keys()
    ):
        raise ConfigError(
            f"train.init_from holds a backbone tuned by {adapters.kind} of rank {adapters.rank}, alpha {adapters.alpha:g}; "
            f"this run tunes by {wanted.kind} of rank {wanted.rank}, alpha {wanted.alpha:g}: set train.lora_rank and "
            "train.lora_alpha to match, or start from MEDUSA-1 heads"
        )
    for name, tensor in wanted.tensors.items():
        tensor.copy_(adapters.tensors[name])


def _quantised(backbone: Backbone) -> Any:
    """The same model with 4-bit linear layers. Needs bitsandbytes and a GPU, which `check_tuning` has seen to."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from medusa import attention

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    source = backbone.model.config._name_or_path
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16, device_map={"": backbone.device}
    )
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return model.eval()
