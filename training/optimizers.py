"""Groups of parameters, their optimizers and their learning-rate schedules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from training.config import Optimizer, Schedule
from training.errors import MissingOptimizer
from training.plan import TrainPlan

BETAS = (0.9, 0.99)  # a training has hundreds of steps: Adam's 0.999 would average over all of them


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate."""

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float
    end: int  # the steps before it train them


def build_optimizer(
    kind: Optimizer, group: ParameterGroup, device: torch.device
) -> torch.optim.Optimizer:
    """Return an optimizer for one group, as Prodigy finds one rate for all that it is given.

    Raises MissingOptimizer where it cannot run.
    """
    check(kind, device.type)
    parameters = list(group.parameters.values())
    rate, decay = group.learning_rate, group.weight_decay
    optimizer: torch.optim.Optimizer
    if kind is Optimizer.ADAMW:
        # Fused: one call for hundreds of small tensors, which take a tenth of a step on a CPU.
        return torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=decay, fused=True)
    if kind is Optimizer.PRODIGY:
        from prodigyopt import Prodigy

        # huggingface/diffusers, train_dreambooth_lora_sdxl_advanced.py: its flags' values
        optimizer = Prodigy(
            parameters,
            lr=max(rate, 1e-12),
            betas=BETAS,
            weight_decay=decay,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    elif kind is Optimizer.ADAFACTOR:
        from transformers.optimization import Adafactor

        # kohya-ss/sd-scripts, docs: a fixed rate, as the other optimizers have
        optimizer = Adafactor(
            parameters,
            lr=rate,
            weight_decay=decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
    else:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, lr=rate, betas=BETAS, weight_decay=decay)
    return optimizer


def check(kind: Optimizer, device: str) -> None:
    """Raise MissingOptimizer where an optimizer cannot run on a kind of device."""
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


def build_lr_scheduler(
    plan: TrainPlan, learning_rate: float, optimizer: torch.optim.Optimizer, first_step: int
) -> LambdaLR:
    """Return diffusers' learning-rate schedule, at `first_step` of the training.

    It counts from 1, as diffusers' first step of a warm-up has a rate of 0 and changes nothing.
    """
    from diffusers.optimization import get_scheduler

    constant = plan.lr_scheduler is Schedule.CONSTANT
    for param_group in optimizer.param_groups:
        param_group["initial_lr"] = learning_rate
    lr_scheduler: LambdaLR = get_scheduler(
        "constant_with_warmup" if constant else plan.lr_scheduler.value,
        optimizer,
        num_warmup_steps=plan.lr_warmup_steps + 1,
        num_training_steps=plan.max_train_steps + 1,
        last_epoch=first_step,
    )
    return lr_scheduler
