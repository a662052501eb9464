"""Which models tree attention can decode: by what they say of themselves, and by one forward beside their own.

S tokens of a short text, V vocabulary

What is refused here would be decoded wrongly, in silence. Knows the backbone; knows no heads and no tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medusa import attention
from medusa.errors import BackboneError

if TYPE_CHECKING:
    from medusa.backbone import Backbone

MOVING_ROPE = {"longrope", "dynamic"}
ATTENTION_KINDS = ("full_attention", "sliding_attention")
# Ordinary text: bf16 noise on unlikely token sequences can grow as large as a real fault.
CHECK_TEXT = "The quick brown fox jumps over the lazy dog."
# Of the logits' norm. Transformers computes parts of a float64 model in float32; bfloat16 noise was seen to reach 0.054 on
# 30 layers. Rounding to int8 is asked for, not a fault: 0.14 was seen there.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.int8: 0.3, torch.bfloat16: 0.1, torch.float16: 0.1}
ROUGH = (torch.bfloat16, torch.float16)
SLACK = 1.5  # times as far from float32 as the model's own forward in a rough type


def refuse_unsupported(model: nn.Module) -> None:
    """BackboneError, by name, for what tree attention cannot decode."""
    config: Any = model.config
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(f"{kind} is an encoder–decoder; Medusa heads need a decoder-only model")
    if config.get_text_config() is not config:
        raise BackboneError(f"{kind} is multimodal; give the folder of its text model, which is a decoder by itself")
    if getattr(model, "_is_stateful", False):
        raise BackboneError(
            f"{kind} keeps a recurrent state, which cannot branch over a tree; use an attention-only model"
        )
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - set(ATTENTION_KINDS))
    if odd:
        raise BackboneError(f"{kind} has layers of type {', '.join(odd)}, which tree attention does not support")
    moving = sorted(_rope_types(config) & MOVING_ROPE)
    if moving:
        raise BackboneError(
            f"{kind} has {', '.join(moving)} rotary embeddings, which change with the longest sequence of a batch: an answer "
            "would depend on its neighbours"
        )
    if getattr(config, "attention_chunk_size", None):
        raise BackboneError(f"{kind} uses chunked attention, which tree attention does not support")
    if not getattr(model, "_supports_attention_backend", False):
        raise BackboneError(f"{kind} does not use transformers' attention interface, so tree attention cannot reach it")


@torch.inference_mode()
def check_decodable(backbone: Backbone) -> None:
    """Compare one short forward through cache and tree attention with the model's own; BackboneError where they differ.

    Refuses, rather than decode silently wrong, models that change attention or logits in a way not known here. A model
    whose own forward in 16 bits is rough (Qwen 2's large biases of keys make it so) is held to that roughness.
    """
    model, kind = backbone.model, backbone.model.config.model_type
    ids = torch.tensor([list(backbone.tokenizer(CHECK_TEXT)["input_ids"])], device=backbone.device)
    try:
        ours = backbone.logits(backbone.step_alone(ids)).double()
        theirs = own_logits(backbone, ids)
        if not theirs.isfinite().all():
            raise BackboneError(
                f"{kind} overflows float16; use bfloat16 or float32"
                if model.dtype == torch.float16
                else f"{kind} gives no numbers in its own forward: its weights are damaged; load them from a sound copy"
            )
        gap = _gap(ours, theirs)
        if gap <= TOLERANCE[backbone.weight_dtype]:
            return
        if backbone.weight_dtype in ROUGH:
            exact = own_logits(backbone, ids, widened=True)
            if _gap(ours, exact) <= SLACK * _gap(theirs, exact):
                return
    except (RuntimeError, TypeError, AttributeError) as error:
        raise BackboneError(f"{kind} cannot decode trees: {str(error).splitlines()[0]}") from error
    raise BackboneError(
        f"{kind} computes attention or logits in a way not known here (its logits differ from ours by {gap:.2g} of their "
        "norm); it would decode wrongly and is refused"
    )


def own_logits(backbone: Backbone, ids: Tensor, *, widened: bool = False) -> Tensor:
    """ids [1,S] → logits [1,S,V] in float64, of the model's own eager forward; `widened`, of that in float32."""
    model = backbone.model
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, attention.IMPLEMENTATION)
        model.set_attn_implementation("eager")
        if widened:
            stack.enter_context(_widened(model))
        return model(input_ids=ids, use_cache=False).logits.double()


def _gap(logits: Tensor, wanted: Tensor) -> float:
    """How far apart, as a share of the spread of what is wanted."""
    spread = (wanted - wanted.mean(dim=-1, keepdim=True)).norm()
    return float((logits - wanted).norm() / spread.clamp_min(1e-6))


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """Meanwhile each module has its 16-bit weights in float32 while it runs, and what it gives is float32 then: the memory of
    one layer's weights, not of a whole second model."""
    narrow: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        narrow[module] = [(p, p.data) for p in module.parameters(recurse=False) if p.dtype in ROUGH]
        for parameter, data in narrow[module]:
            parameter.data = data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in narrow.pop(module, []):
            parameter.data = data

    with ExitStack() as stack:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                stack.callback(module.register_forward_pre_hook(widen).remove)
                stack.callback(module.register_forward_hook(restore, always_call=True).remove)
        yield


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embedding in use: one for the model, or one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [value for value in settings.values() if isinstance(value, dict)] or [settings]
    return {str(one.get("rope_type", "default")) for one in each}
