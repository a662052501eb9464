"""All layers of a Llama, Mistral, Qwen 2 or 3 in one call. Knows weights and placements; what is computed stands in layers.h.

B sequences, N new positions, D hidden, C positions of the context, E head size
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa.kv_cache import KVCache
from medusa.native.linear import CWeight, PackedWeight, kernels

if TYPE_CHECKING:
    from medusa.backbone import Placement


class CLayer(ctypes.Structure):
    """`Layer` of model.h."""

    _fields_ = (
        ("norm_attention", ctypes.c_void_p),
        ("norm_mlp", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("gains", ctypes.c_void_p),
        ("query_key_value", CWeight),
        ("out", CWeight),
        ("gate", CWeight),
        ("up", CWeight),
        ("down", CWeight),
    )


class CModel(ctypes.Structure):
    """`Model` of model.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(CLayer)),
        ("num_layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("norm", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
    )


class CStep(ctypes.Structure):
    """`Step` of model.h."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("num_new", ctypes.c_int64),
        ("offsets", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("visible", ctypes.c_void_p),
        ("visible_stride", ctypes.c_int64),
        ("cache", ctypes.c_void_p),
        ("plane_stride", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("work", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class NativeLayer:
    """One layer's weights, products packed, the rest in float32: norms [D] and, where the family has them, the bias of
    queries, keys and values and the gains [2,E] of query and key heads' own norms."""

    norm_attention: Tensor
    norm_mlp: Tensor
    bias: Tensor | None = None
    gains: Tensor | None = None
    query_key_value: PackedWeight
    out: PackedWeight
    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight

    def c(self) -> CLayer:
        products = {name: getattr(self, name).c() for name in ("query_key_value", "out", "gate", "up", "down")}
        rest = {name: getattr(self, name) for name in ("norm_attention", "norm_mlp", "bias", "gains")}
        return CLayer(**{name: weight.data_ptr() for name, weight in rest.items() if weight is not None}, **products)


class NativeLlama:
    """The layers between embedding and lm_head. cos and sin [C,E/2] are the rotary tables of all positions."""

    @staticmethod
    def fits(head_dim: int) -> bool:
        """Attention reads heads in whole vectors."""
        return head_dim % kernels().medusa_lanes() == 0

    def __init__(
        self,
        layers: Sequence[NativeLayer],
        *,
        norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_kv_heads: int,
        groups: int,
        head_dim: int,
        eps: float,
        window: int | None,
    ) -> None:
        self._held = (list(layers), norm, cos.contiguous(), sin.contiguous())  # the kernels know their addresses only
        self._layers = (CLayer * len(layers))(*(layer.c() for layer in layers))
        self._model = CModel(
            layers=self._layers,
            num_layers=len(layers),
            hidden=norm.shape[0],
            num_kv_heads=num_kv_heads,
            groups=groups,
            head_dim=head_dim,
            window=window or 0,
            eps=eps,
            norm=norm.data_ptr(),
            cos=self._held[2].data_ptr(),
            sin=self._held[3].data_ptr(),
        )

    def __call__(self, hidden: Tensor, positions: Tensor, where: Placement, cache: KVCache) -> Tensor:
        """Embeddings [B,N,D] at positions [B,N] → last hidden states [B,N,D], in place; keys and values are written.

        A window hides the prefix here; what it hides of the new positions `where.visible` must say.
        """
        batch, num_new = positions.shape
        assert hidden.is_contiguous() and (hidden.dtype, cache.store.dtype) == (torch.float32, torch.bfloat16)
        offsets, positions, visible = where.offsets.contiguous(), positions.contiguous(), where.visible.contiguous()
        rows = cache.store[:, where.first_slot :]
        step = CStep(
            batch=batch,
            num_new=num_new,
            offsets=offsets.data_ptr(),
            positions=positions.data_ptr(),
            visible=visible.data_ptr(),
            visible_stride=num_new * num_new if visible.dim() == 3 else 0,
            cache=rows.data_ptr(),
            plane_stride=rows.stride(0),
            slot_stride=rows.stride(1),
            head_stride=rows.stride(2),
            hidden=hidden.data_ptr(),
            threads=torch.get_num_threads(),
        )
        model, here = ctypes.byref(self._model), ctypes.byref(step)
        work = torch.empty(kernels().medusa_work_bytes(model, here), dtype=torch.uint8)
        step.work = work.data_ptr()
        kernels().medusa_layers(model, here)
        return hidden
