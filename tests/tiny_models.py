"""Tiny random backbones and a tiny tokenizer, built from configurations alone. Knows transformers, not medusa.

The weights are drawn wide enough that greedy output wanders instead of repeating one token, and narrow enough that
float32 still tells two logits apart: both are needed before "tree decoding equals plain decoding" means anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 300
HIDDEN_SIZE = 32
MAX_CONTEXT = 256
SLIDING_WINDOW = 12  # shorter than any test's output, so that the window moves off the prompt

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=MAX_CONTEXT,
    pad_token_id=PAD_ID,
    bos_token_id=BOS_ID,
    eos_token_id=EOS_ID,
    # Tied embeddings make a random model say its input again: the residual stream still holds it.
    tie_word_embeddings=False,
    initializer_range=0.3,
)
_ALTERNATING = ["sliding_attention", "full_attention"]

_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, dict(sliding_window=SLIDING_WINDOW)),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, dict(head_dim=8)),
    "gemma2": (
        Gemma2Config,
        dict(
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=SLIDING_WINDOW,
            layer_types=_ALTERNATING,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=8.0,
        ),
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=SLIDING_WINDOW, layer_types=_ALTERNATING),
    ),
}
FAMILIES = tuple(_FAMILIES)


def make_tiny_backbone_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of `family` (one of FAMILIES) in eval mode; equal arguments give equal weights.

    `overrides` replace configuration fields, e.g. `num_hidden_layers=1` or `tie_word_embeddings=True`. The global
    random state is left as it was found.
    """
    config_class, fields = _FAMILIES[family]
    config = config_class(**{**_COMMON, **fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn in float32 whatever the dtype, so that float32 and float64 models of one seed are the same model.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = EOS_ID
    model.generation_config.pad_token_id = PAD_ID
    for weight in model.parameters():  # and not the rotary frequencies: see `load_backbone`
        weight.data = weight.data.to(dtype)
    return model.eval()


def with_drawn_vectors(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norms and biases drawn as well: as they are made, all ones and zeros, leaving them out would not show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += (0.3 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    return model


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB_SIZE tokens with a ChatML template: any text goes in, and comes out again unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__ or "", "system user assistant " * 3], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_folder(
    folder: Path, family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write a tiny model with its tokenizer as `from_pretrained` wants them; returns `folder`."""
    make_tiny_backbone_model(family, seed, dtype, **overrides).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder
