"""From configuration to DeepSpeed's dictionary, and what a step's rates and weights are. Pure; imports no DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

from pipelines.config import TrainSection


def zero_config(train: TrainSection, *, num_workers: int, on_gpu: bool, micro_batches: int = 1) -> dict[str, Any]:
    """DeepSpeed settings of one engine whose step is `micro_batches` forwards on each worker.

    The optimizer is torch's own AdamW: DeepSpeed's CPU Adam is compiled at first use, which a laptop need not do.
    """
    return {
        "train_batch_size": num_workers * micro_batches,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
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


def schedule(train: TrainSection, step: int) -> float:
    """Share of the peak rate at step 0, 1, …: a linear rise over `warmup_steps`, then a cosine down to `final_lr_share`
    at the last step."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    span = max(train.steps - 1 - train.warmup_steps, 1)
    done = min((step - train.warmup_steps) / span, 1.0)
    return train.final_lr_share + (1 - train.final_lr_share) * 0.5 * (1 + math.cos(math.pi * done))


def learning_rates(train: TrainSection, step: int) -> dict[str, float]:
    """Rate of each group of parameters. Where the backbone learns too, all of the heads' follow it at `lr_ratio`."""
    share = schedule(train, step)
    if train.method == "medusa1":
        return {"heads": train.lr_heads * share}
    return {"heads": train.lr_ratio * train.lr_backbone * share, "backbone": train.lr_backbone * share}


def lambda0(train: TrainSection, step: int) -> float:
    """Weight of the heads' losses beside the backbone's own: constant, or rising along a sine from 0 to the last step."""
    if train.lambda0_schedule == "constant":
        return train.lambda0
    return train.lambda0 * math.sin(0.5 * math.pi * step / max(train.steps - 1, 1))
