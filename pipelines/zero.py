"""From configuration to DeepSpeed's dictionary and the learning rate of a step. Pure; imports no DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

from pipelines.config import TrainSection


def zero_config(train: TrainSection, *, num_workers: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed settings of one engine. A step is one micro-batch, so no accumulation.

    The optimizer is torch's own AdamW: DeepSpeed's CPU Adam is compiled at first use, which a laptop need not do.
    """
    return {
        "train_batch_size": num_workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": train.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": on_gpu,
            "stage3_gather_16bit_weights_on_model_save": train.zero_stage == 3,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def learning_rate(train: TrainSection, step: int) -> float:
    """Rate of step 0, 1, …: a linear rise over `warmup_steps`, then a cosine down to `final_lr_share` at the last step."""
    if step < train.warmup_steps:
        return train.lr_heads * (step + 1) / train.warmup_steps
    span = max(train.steps - 1 - train.warmup_steps, 1)
    done = min((step - train.warmup_steps) / span, 1.0)
    share = train.final_lr_share + (1 - train.final_lr_share) * 0.5 * (1 + math.cos(math.pi * done))
    return train.lr_heads * share
