"""A fused forward for Llama, Mistral, Qwen 2 and 3, beside the generic path and held to it by tests. Knows layers; knows no tree.

    B sequences, N new positions, D hidden, H query heads, G query heads per key/value head, E head size

Query, key and value are one product, gate and up another; weights are packed for this device; nothing is looked up by
name in the loop. What lies between the products is `llama_torch`'s or, on a GPU, `llama_triton`'s; on a CPU with a C
compiler all layers are one call (medusa/native).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from medusa import llama_torch
from medusa.attention import (
    MAX_TRITON_NODES,
    Attend,
    GpuKernels,
    layer_windows,
    masked_attend,
    step_mask,
    triton_attend,
    within_window,
)
from medusa.errors import BackboneError
from medusa.kv_cache import KVCache
from medusa.linear import NATIVE, Kernel, Linear, kernel_for
from medusa.llama_torch import HeadEdits
from medusa.native.build import library
from medusa.native.linear import PackedWeight, fits_int8
from medusa.native.llama import NativeLayer, NativeLlama

if TYPE_CHECKING:
    from medusa.backbone import Placement

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class FusedLlama:
    """Same call and same result as the generic path, for a model of FAMILIES whose layers all see alike, the whole context or
    one sliding window (Mistral 0.1), without quantisation and without biases but those of queries, keys and values (Qwen 2).

    Where weights stay as they are (on a GPU, in float32) the model's own become views of the fused ones; packing them,
    on a CPU, keeps the model's beside the packed ones: twice the memory. Training them afterwards is not for this path.
    """

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Is this a model that the fused path computes exactly?"""
        config: Any = model.config
        if config.model_type not in FAMILIES:
            return False
        core: Any = model.get_decoder()
        return (
            getattr(config, "hidden_act", "") == "silu"
            and getattr(config, "quantization_config", None) is None
            and model.dtype.is_floating_point
            and len(_windows(config)) == 1
            and not any(_biases(layer.self_attn.o_proj, *layer.mlp.children()) for layer in core.layers)
        )

    def __init__(self, model: PreTrainedModel, *, int8: bool = False, gpu_kernels: GpuKernels = "torch") -> None:
        """`int8` rounds the weights of products, each output's to 255 steps. BackboneError where no kernel reads them.
        `gpu_kernels` does what lies between the products where the CPU's own kernels do not: PyTorch's operations ("torch") or
        our own ("triton"); "fused" is for a step's ends as well, see `Backbone.fuses_steps`."""
        config: Any = model.config
        core: Any = model.get_decoder()
        self.int8 = int8
        self.gpu_kernels = gpu_kernels
        self.kernel = Kernel.NATIVE_INT8 if int8 else kernel_for(model.dtype, model.device)
        if int8 and (model.device.type != "cpu" or library() is None):
            raise BackboneError(
                f"int8 weights need a CPU with a C compiler (here: {model.device.type}, "
                f"{'no ' if library() is None else ''}kernels); use bfloat16"
            )
        self.dtype = self.kernel.activation_dtype(model.dtype)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.eps = config.rms_norm_eps
        (self.window,) = _windows(config)
        self.embedding = core.embed_tokens.weight
        self.rotary = core.rotary_emb
        self.norm = core.norm.weight.to(self.dtype)
        self.native: NativeLlama | None = None
        self.layers: list[_Layer] = []
        if self.kernel in NATIVE and NativeLlama.fits(self.head_dim):
            self.native = self._native(core, max_context=config.max_position_embeddings)
        else:
            self.layers = [self._fuse(layer) for layer in core.layers]
        self.cache_dtype = self.dtype if self.native is None else torch.bfloat16
        self.lm_head = self.linear(model.get_output_embeddings().weight)

    def _fuse(self, layer: Any) -> _Layer:
        attn, mlp = layer.self_attn, layer.mlp
        return _Layer(
            norm_attention=layer.input_layernorm.weight.to(self.dtype),
            qkv=self._joined(attn.q_proj, attn.k_proj, attn.v_proj),
            edits=self._head_edits(attn, self.dtype),
            out=self.linear(attn.o_proj.weight),
            norm_mlp=layer.post_attention_layernorm.weight.to(self.dtype),
            gate_up=self._joined(mlp.gate_proj, mlp.up_proj),
            down=self.linear(mlp.down_proj.weight),
        )

    def _head_edits(self, attn: Any, dtype: torch.dtype) -> HeadEdits:
        """What this layer does to its heads before they turn, in `dtype`."""
        biases = _biases(attn.q_proj, attn.k_proj, attn.v_proj)
        norms = [attn.q_norm.weight.detach(), attn.k_norm.weight.detach()] if hasattr(attn, "q_norm") else []
        return HeadEdits(
            bias=torch.cat(biases).to(dtype) if biases else None,
            gains=torch.stack(norms).to(dtype) if norms else None,
            eps=self.eps,
        )

    def _native(self, core: Any, *, max_context: int) -> NativeLlama:
        """All layers in one call. The rotary tables are made once: what a position gets must not depend on its place in
        a batch."""
        tables = self.rotary(torch.zeros(1), torch.arange(max_context)[None])
        cos, sin = (table[0, :, : self.head_dim // 2] for table in tables)
        return NativeLlama(
            [self._native_layer(layer) for layer in core.layers],
            norm=self.norm,
            cos=cos,
            sin=sin,
            num_kv_heads=self.num_kv_heads,
            groups=self.groups,
            head_dim=self.head_dim,
            eps=self.eps,
            window=self.window,
        )

    def _native_layer(self, layer: Any) -> NativeLayer:
        attn, mlp, packed = layer.self_attn, layer.mlp, partial(PackedWeight.of, int8=self.int8)
        edits = self._head_edits(attn, torch.float32)
        return NativeLayer(
            norm_attention=layer.input_layernorm.weight.float(),
            norm_mlp=layer.post_attention_layernorm.weight.float(),
            query_key_value=packed(torch.cat([p.weight for p in (attn.q_proj, attn.k_proj, attn.v_proj)])),
            bias=edits.bias,
            gains=edits.gains,
            out=packed(attn.o_proj.weight),
            gate=packed(mlp.gate_proj.weight),
            up=packed(mlp.up_proj.weight),
            down=packed(mlp.down_proj.weight),
        )

    def _joined(self, *layers: Any) -> Linear:
        """One product for several linear layers that read the same input."""
        joined = torch.cat([layer.weight.detach() for layer in layers])
        if self.kernel is Kernel.PLAIN:
            for layer, part in zip(layers, joined.split([layer.weight.shape[0] for layer in layers]), strict=True):
                layer.weight.data = part
        return self.linear(joined)

    def linear(self, weight: Tensor) -> Linear:
        """x [...,I] → x·weightᵀ [...,O] in this path's own arithmetic, of a weight in the backbone's type."""
        return self.kernel.prepare(weight.to(self.embedding.dtype))

    def linear_of_guesses(self, weight: Tensor) -> Linear:
        """The same for what only proposes: in int8, half the bytes, where our kernels multiply it and its width allows that.
        No token of greedy or rejection acceptance depends on it; of typical it may change which plausible one is taken."""
        kernel = self.kernel
        if kernel in NATIVE:
            kernel = Kernel.NATIVE_INT8 if fits_int8(weight.shape[1]) else Kernel.NATIVE
        return kernel.prepare(weight.to(self.embedding.dtype))

    def __call__(self, ids: Tensor, positions: Tensor, where: Placement, cache: KVCache) -> Tensor:
        """ids [B,N] at positions [B,N] → last hidden states [B,N,D]. The cache has been told where they go."""
        hidden = F.embedding(ids, self.embedding).to(self.dtype)
        if self.native is not None:
            if self.window is not None:
                where = replace(where, visible=within_window(where.depths, where.visible, self.window))
            return self.native(hidden, positions, where, cache)
        with torch.cuda.device_of(hidden):  # Triton launches on the current device
            return self._layer_by_layer(hidden, positions, where, cache)

    def _layer_by_layer(self, hidden: Tensor, positions: Tensor, where: Placement, cache: KVCache) -> Tensor:
        cos, sin = self.rotary(hidden, positions)
        attend, between = self._attend(where, hidden.shape[1]), self._between
        normed = between.norm(hidden, self.layers[0].norm_attention, self.eps)
        norms_after = [layer.norm_attention for layer in self.layers[1:]] + [self.norm]
        for index, (layer, norm_after) in enumerate(zip(self.layers, norms_after, strict=True)):
            qkv = layer.qkv(normed)
            seen = attend(*between.rotate_into(cache, index, qkv, cos, sin, groups=self.groups, edits=layer.edits))
            hidden, normed = between.add_norm(hidden, layer.out(seen.flatten(2)), layer.norm_mlp, self.eps)
            moved = layer.down(between.gated(layer.gate_up(normed)))
            hidden, normed = between.add_norm(hidden, moved, norm_after, self.eps)
        return normed

    @property
    def _between(self) -> _Between:
        """What lies between the products, by the kernels chosen."""
        if self.gpu_kernels == "torch":
            return llama_torch
        from medusa import llama_triton  # Triton is where CUDA builds of torch are

        return llama_triton

    def _attend(self, where: Placement, num_new: int) -> Attend:
        """Attention of this step, the same in all layers; a long chunk of a prompt is always read with a mask."""
        if self.gpu_kernels != "torch" and num_new <= MAX_TRITON_NODES:
            return triton_attend(where.offsets, where.depths, where.visible, self.window)
        mask = step_mask(
            offsets=where.offsets,
            depths=where.depths,
            visible=where.visible,
            length=where.length,
            dtype=self.dtype,
            window=self.window,
        )
        return masked_attend(mask, self.groups)


def _windows(config: Any) -> set[int | None]:
    """Sliding windows of the layers; None: the whole context, as a window no shorter than that is."""
    most = config.max_position_embeddings
    return {None if window is None or window >= most else window for window in layer_windows(config).values()}


def _biases(*layers: Any) -> list[Tensor]:
    """Those of the linear layers among `layers` that have one."""
    return [layer.bias.detach() for layer in layers if getattr(layer, "bias", None) is not None]


class _Between(Protocol):
    """`llama_torch` and `llama_triton`."""

    def norm(self, hidden: Tensor, weight: Tensor, eps: float, /) -> Tensor: ...

    def add_norm(self, hidden: Tensor, update: Tensor, weight: Tensor, eps: float, /) -> tuple[Tensor, Tensor]: ...

    def gated(self, gate_up: Tensor, /) -> Tensor: ...

    def rotate_into(
        self,
        cache: KVCache,
        layer: int,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        /,
        *,
        groups: int,
        edits: HeadEdits,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One decoder layer's products, and what is done between them by weights."""

    norm_attention: Tensor
    qkv: Linear
    edits: HeadEdits
    out: Linear
    norm_mlp: Tensor
    gate_up: Linear
    down: Linear
