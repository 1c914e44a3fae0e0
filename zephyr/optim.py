"""The update: AdamW on float32 shards, one clip by the global norm, the learning rate of each step.

The master weights are float32 even where the compute is bf16: at DPO's learning rate of 5e-7 an
AdamW step is hundreds of times smaller than the spacing of bf16 numbers, and a bf16 weight would
not move at all.
"""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW as Zephyr uses it: betas 0.9 and 0.999, eps 1e-8, no weight decay (zephyr-7b-beta's
    card)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
    )


def learning_rate(
    step: int, n_steps: int, peak: float, schedule: str, warmup_ratio: float
) -> float:
    """The learning rate of update number `step`, from 0: linear warm-up, then the schedule.

    Hugging Face's formulas: warm-up takes ceil(warmup_ratio * n_steps) updates, the first of which
    has learning rate 0; `linear` and `cosine` then fall to 0, which they would reach at step
    n_steps.
    """
    n_warmup = math.ceil(warmup_ratio * n_steps)
    if step < n_warmup:
        return peak * step / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    if schedule == "linear":
        return peak * max(0.0, 1 - progress)
    if schedule == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule {schedule!r} is unknown: choose linear, cosine or constant")


def update(optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float) -> Tensor:
    """One update from the accumulated gradients, which it then drops.

    Gradients of the whole step, on all ranks, count as one vector: if its norm exceeds
    `max_grad_norm` it is scaled down to it (0 turns clipping off). Returns that norm, before
    clipping: () float32.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
