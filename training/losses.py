"""The terms of the loss: pure functions of tensors, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

MIN_SNR = 1e-8  # a schedule that ends in pure noise has an SNR of 0 there


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Return Min-SNR-γ's weights (B,), all ones for gamma 0 (arXiv:2303.09556, eq. 8, sec. 3.4).

    The paper weighs the error of the clean image by min(SNR, γ). An error of the noise is SNR times
    that one, an error of the velocity SNR + 1 times.
    """
    from diffusers.training_utils import compute_snr

    if gamma == 0:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr: Tensor = compute_snr(noise_scheduler, timesteps).clamp(min=MIN_SNR)
    weights = snr.clamp(max=gamma)
    is_velocity = noise_scheduler.config.prediction_type == "v_prediction"
    return weights / (snr + 1 if is_velocity else snr)


def masked_mse(predicted: Tensor, target: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Return the squared error (B,), weighted by a mask (B, 1, h, w) in [0, 1] of at least `floor`.

    Divided by the sum of each image's mask, so that a small subject counts as much as one that
    fills its image; before any other weight.
    """
    weights = mask.float().clamp(min=floor)
    error = (predicted.float() - target.float()).square().mean(dim=1, keepdim=True)
    return (error * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1e-8)
