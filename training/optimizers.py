"""The optimizers, and the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from training.config import Optimizer, Schedule
from training.errors import MissingOptimizer
from training.plan import TrainPlan

BETAS = (0.9, 0.99)  # a training of hundreds of steps: Adam's 0.999 remembers all of it


@dataclass(frozen=True)
class Group:
    """Parameters that learn together, at one rate."""

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float
    until: int  # they learn in the steps before this one


def build(kind: Optimizer, group: Group, device: torch.device) -> torch.optim.Optimizer:
    """An optimizer of the group's own: Prodigy finds one rate for all that it is given.

    Raises MissingOptimizer where it cannot run.
    """
    check(kind, device.type)
    parameters: Iterable[nn.Parameter] = group.parameters.values()
    rate, decay = group.learning_rate, group.weight_decay
    if kind is Optimizer.ADAMW:
        # Fused: some hundred small tensors in one call, a tenth of a step on a CPU otherwise.
        return torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=decay, fused=True)
    if kind is Optimizer.PRODIGY:
        from prodigyopt import Prodigy

        # huggingface/diffusers, train_dreambooth_lora_sdxl_advanced.py: its flags' values
        prodigy: torch.optim.Optimizer = Prodigy(
            parameters,
            lr=max(rate, 1e-12),
            betas=BETAS,
            weight_decay=decay,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
        return prodigy
    if kind is Optimizer.ADAFACTOR:
        from transformers.optimization import Adafactor

        # kohya-ss/sd-scripts, docs: a fixed rate, as the other optimizers have
        adafactor: torch.optim.Optimizer = Adafactor(
            parameters,
            lr=rate,
            weight_decay=decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
        return adafactor
    from bitsandbytes.optim import AdamW8bit

    adamw_8bit: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=rate, betas=BETAS, weight_decay=decay
    )
    return adamw_8bit


def check(kind: Optimizer, device: str) -> None:
    """Raises MissingOptimizer where an optimizer cannot run on a kind of device."""
    if kind is not Optimizer.ADAMW_8BIT:
        return
    if device != "cuda":
        raise MissingOptimizer(
            f"optimizer adamw_8bit needs a CUDA GPU, and the device is {device}; use adamw"
        )
    try:
        import bitsandbytes.optim  # noqa: F401
    except ImportError as error:
        raise MissingOptimizer(
            f"optimizer adamw_8bit needs the package bitsandbytes, which cannot be used here"
            f" ({error}); install it, or use adamw"
        ) from error


def rate_factor(plan: TrainPlan, step: int) -> float:
    """What the learning rates are multiplied by in a step; the first is 0."""
    if step < plan.lr_warmup_steps:
        return (step + 1) / (plan.lr_warmup_steps + 1)
    done = (step - plan.lr_warmup_steps) / (plan.max_train_steps - plan.lr_warmup_steps)
    if plan.lr_scheduler is Schedule.LINEAR:
        return 1 - done
    if plan.lr_scheduler is Schedule.COSINE:
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
