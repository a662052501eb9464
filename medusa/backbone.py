"""A language model as the method sees it: token ids in, last hidden states and logits out. Knows no heads and no tree.

B sequences, N new positions, S cache positions, D hidden, V vocabulary
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from medusa import attention
from medusa.adapters import Adapters
from medusa.decodable import check_decodable, refuse_unsupported
from medusa.errors import BackboneError
from medusa.fused_llama import FAMILIES, FusedLlama
from medusa.grammar import GrammarVocabulary
from medusa.heads import LmHead, LogitTransform, PartialLmHead
from medusa.kv_cache import KVCache
from medusa.linear import Kernel, Linear
from medusa.provision import DEFAULT_BACKBONE, default_backbone

DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int8": torch.int8,  # the weights of products alone; needs the CPU kernels
}
SAMPLED_VALUES = 64


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where new positions go and what they see: the offsets of B rows, N new positions, the first `length` cache slots.

    `depths` [N] and `visible` [N,N] are those of all rows, or [B,N] and [B,N,N] each row's own.
    """

    first_slot: int
    offsets: Tensor
    depths: Tensor
    visible: Tensor
    length: int


@dataclass(kw_only=True)
class Backbone:
    """A decoder-only transformers model with its tokenizer, ready for tree decoding. Make one with `load_backbone`."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    transform: LogitTransform = field(default_factory=LogitTransform)
    fused: FusedLlama | None = None
    version: int = field(default=0, init=False)  # of the weights: keys and values of two versions never mix

    def __post_init__(self) -> None:
        refuse_unsupported(self.model)
        attention.register()
        self.model.set_attn_implementation(attention.IMPLEMENTATION)
        self.model.eval()
        self._windows = attention.layer_windows(self.model.config)
        self._cache_argument = _cache_argument(self.model)
        self._fingerprint: str | None = None

    # Shapes and places

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.lm_head_weight.shape[0]

    @property
    def max_context(self) -> int:
        """Positions that the backbone was made for, prompt and answer together."""
        return int(getattr(self.model.config, "max_position_embeddings", 4096))

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the weights in products: int8 where they were rounded, else `dtype`."""
        return torch.int8 if self.fused is not None and self.fused.int8 else self.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def step_dtype(self) -> torch.dtype:
        """Type of hidden states while decoding: the fused path may keep more than the weights' type."""
        return self.fused.dtype if self.fused is not None else self.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """Type of keys and values while decoding."""
        return self.fused.cache_dtype if self.fused is not None else self.dtype

    @property
    def lm_head_weight(self) -> Tensor:
        """[V,D]."""
        return self.model.get_output_embeddings().weight

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token that ends an answer."""
        found: set[Any] = set()
        sources = (self.model.generation_config, self.model.config, self.tokenizer)
        for value in (getattr(source, "eos_token_id", None) for source in sources):
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
        return frozenset(int(token) for token in found if token is not None)

    @cached_property
    def grammar_vocabulary(self) -> GrammarVocabulary:
        """The tokenizer as grammars read it; making it takes a second. Raises PromptError where it cannot serve them."""
        return GrammarVocabulary.of(self.tokenizer, vocab_size=self.vocab_size, eos=self.eos_token_ids)

    @property
    def fingerprint(self) -> str:
        """Hash of names, shapes and sampled values of all weights: equal for the same weights on any device and, through
        `load_backbone`, in any type."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, weight in sorted(self.model.named_parameters()):
                flat = weight.detach().flatten()
                sample = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].to(torch.bfloat16).float().cpu()
                digest.update(f"{name}{list(weight.shape)}".encode())
                digest.update(sample.numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def merge(self, adapters: Adapters) -> None:
        """Tune the weights for good; the fingerprint stays that of the original. CheckpointError where they do not fit."""
        assert self.fingerprint
        adapters.merge_into(self.model)
        self.version += 1
        if self.fused is not None:
            # It holds copies of the weights.
            self.fused = FusedLlama(self.model, int8=self.fused.int8, gpu_kernels=self.fused.gpu_kernels)

    # Running it

    @property
    def fuses_steps(self) -> bool:
        """Are the beginning and the end of a step, what heads propose and what follows from its logits, Triton kernels too?"""
        return self.fused is not None and self.fused.gpu_kernels == "fused"

    def new_cache(self, *, num_slots: int, capacity: int) -> KVCache:
        config = self.model.config
        heads = config.num_attention_heads
        return KVCache(
            num_layers=config.num_hidden_layers,
            num_slots=num_slots,
            capacity=capacity,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.cache_dtype,
            device=self.device,
            fused=self.fuses_steps,
        )

    def step(self, ids: Tensor, placement: Placement, cache: KVCache) -> Tensor:
        """Run ids [B,N] behind their prefixes, write their keys and values, return last hidden states [B,N,D]."""
        where = placement
        num_new = ids.shape[1]
        cache.begin(first_slot=where.first_slot, offsets=where.offsets, num_new=num_new, length=where.length)
        positions = (where.offsets[:, None] + where.depths).clamp_max(self.max_context - 1)
        if self.fused is not None:
            return self.fused(ids, positions, where, cache)
        masks = {
            kind: attention.step_mask(
                offsets=where.offsets,
                depths=where.depths,
                visible=where.visible,
                length=where.length,
                dtype=self.step_dtype,
                window=window,
            )
            for kind, window in self._windows.items()
        }
        return self._run(ids, positions, masks, cache)

    def step_alone(self, ids: Tensor) -> Tensor:
        """ids [1,S] → last hidden states [1,S,D] of one step over a cache of its own: by the arithmetic that decodes."""
        length = ids.shape[1]
        steps = torch.arange(length, device=ids.device)
        where = Placement(
            first_slot=0, offsets=steps.new_zeros(1), depths=steps, visible=steps[:, None] >= steps, length=length
        )
        return self.step(ids, where, self.new_cache(num_slots=1, capacity=length))

    def hidden_states(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """ids [B,S], padded on the right if at all → last hidden states [B,S,D] of a plain causal forward, no cache.

        `documents` [B,S] numbers the documents packed into each row, neighbours apart: each is seen by itself alone and
        its positions begin at 0, so the result is that of its documents one by one.
        """
        length = ids.shape[1]
        steps = torch.arange(length, device=ids.device)
        if documents is not None:
            packed = {
                kind: attention.packed_mask(documents, dtype=self.dtype, window=window)
                for kind, window in self._windows.items()
            }
            return self._run(ids, attention.packed_positions(documents), packed, None)
        masks = {
            kind: attention.step_mask(
                offsets=steps.new_zeros(1),
                depths=steps,
                visible=steps[:, None] >= steps,
                length=length,
                dtype=self.dtype,
                window=window,
            )
            for kind, window in self._windows.items()
        }
        return self._run(ids, steps.expand_as(ids), masks, None)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [...,D] → logits [...,V], through the backbone's own soft-cap or scale."""
        if self.fused is not None:
            return self.transform(self.fused.lm_head(hidden))
        return self.transform(F.linear(hidden, self.lm_head_weight))

    def lm_head_for(self, vocabulary: Tensor | None) -> LmHead:
        """This backbone's lm_head over `vocabulary` (ids) alone, in its own copy; over all tokens for None."""
        if vocabulary is None:
            return self
        project = self.linear_of_guesses(self.lm_head_weight.detach()[vocabulary])
        return PartialLmHead(project=project, transform=self.transform, embed=self.embed)

    @property
    def packs(self) -> bool:
        """Does `linear` lay weights out in a way of its own?"""
        return self.fused is not None and self.fused.kernel is not Kernel.PLAIN

    def linear(self, weight: Tensor) -> Linear:
        """weight [O,I] → a product x [...,I] → [...,O] in the arithmetic of this backbone's own."""
        return self.fused.linear(weight) if self.fused is not None else lambda x: F.linear(x, weight)

    def linear_of_guesses(self, weight: Tensor) -> Linear:
        """The same for the heads' weights, which only propose: as roughly as suits the device."""
        return self.linear(weight) if self.fused is None else self.fused.linear_of_guesses(weight)

    def embed(self, ids: Tensor, /) -> Tensor:
        """ids [...] → the model's input embeddings [...,D]."""
        return self.model.get_input_embeddings()(ids)

    def _run(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor], cache: KVCache | None) -> Tensor:
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        decoder = self.model.get_decoder()
        out = decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=cache is not None,
            **{self._cache_argument: cache},
        )
        return out.last_hidden_state


def load_backbone(
    name: str | Path = DEFAULT_BACKBONE,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    fused: bool = True,
    gpu_kernels: attention.GpuKernels | None = None,
) -> Backbone:
    """A backbone from the built-in default, a folder, or a hub id. Raises BackboneError; ValueError for a bad dtype or device.

    `fused` lets a model that the fused path computes (Llama, Mistral, Qwen 2 and 3) run through it; the generic path is the
    reference. `int8` rounds the weights of that path, half the bytes of bfloat16: on a CPU with a C compiler.
    `gpu_kernels` is what the fused path runs by on a GPU besides its products: our own Triton kernels ("triton", chosen where
    there are both), or PyTorch's, with a mask ("torch"). "fused": a hydra tree and a step's end too, which no GPU has run yet.
    """
    torch_dtype = parse_dtype(dtype)
    int8 = torch_dtype == torch.int8
    if int8:
        torch_dtype = torch.bfloat16
    where = parse_device(device)
    source = default_backbone() if str(name) == DEFAULT_BACKBONE else name
    if str(source).startswith((".", "/", "~")) and not Path(source).is_dir():
        raise BackboneError(f"no model folder at {source}; give {DEFAULT_BACKBONE!r}, a model folder or a hub id")
    try:
        config = AutoConfig.from_pretrained(source)
        if getattr(config, "is_encoder_decoder", False):
            raise BackboneError(
                f"{name} is an encoder–decoder ({config.model_type}); Medusa heads need a decoder-only model"
            )
        attention.register()
        tokenizer = AutoTokenizer.from_pretrained(source)
        # The fingerprint is taken in the stored type, since float16 rounds what bfloat16 keeps.
        stored = "auto" if torch_dtype == torch.float16 else torch_dtype
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=stored)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"cannot load backbone {str(name)!r}: {reason} (give {DEFAULT_BACKBONE!r}, a model folder or a reachable hub id)"
        ) from error
    backbone = Backbone(model=model, tokenizer=tokenizer, name=str(name), transform=_logit_transform(model.config))
    assert backbone.fingerprint
    _place(model, where, torch_dtype)
    if fused and FusedLlama.fits(model):
        chosen = attention.parse_gpu_kernels(gpu_kernels, where, model.dtype)
        backbone.fused = FusedLlama(model, int8=int8, gpu_kernels=chosen)
    elif int8:
        raise BackboneError(
            f"{name} ({model.config.model_type}) cannot run with int8 weights, which are for {', '.join(FAMILIES)} whose "
            "layers see alike, through the fused path; use bfloat16"
        )
    check_decodable(backbone)
    return backbone


def _place(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move the model, its weights in `dtype`. Buffers keep their own type: rotary frequencies rounded to 16 bits would turn
    far positions by other angles than the model was trained with."""
    model.to(device)
    stored = model.dtype
    for weight in model.parameters():
        if weight.dtype == stored:  # some models keep a few in float32
            weight.data = weight.data.to(dtype)


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device, or for None CUDA where there is one. ValueError for what this machine does not have."""
    has_gpu = torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; choose cpu or cuda") from None
    if where.type == "cuda" and not has_gpu:
        raise ValueError(
            f"device {device} needs a CUDA GPU and a CUDA build of torch, and this machine has none; use cpu"
        )
    return where


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """What `parse_dtype`, configurations and files call the type: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _cache_argument(model: PreTrainedModel) -> str:
    """What a decoder calls its cache: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.get_decoder().forward).parameters else "past_key_values"


def _logit_transform(config: Any) -> LogitTransform:
    """Gemma's soft-cap, Cohere's logit_scale, Granite's logits_scaling."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))
