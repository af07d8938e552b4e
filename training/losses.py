"""What a prediction costs: pure functions of tensors, in fp32."""

import torch
from torch import Tensor

MIN_SNR = 1e-8  # a schedule that ends in pure noise has an SNR of 0 there


def signal_to_noise(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """SNR = ᾱ / (1 - ᾱ), (B,); arXiv:2303.09556, section 3.1."""
    alpha_bar = alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return (alpha_bar / (1 - alpha_bar)).clamp(min=MIN_SNR)


def snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ (arXiv:2303.09556, equation 8 and section 3.4), (B,); all ones for gamma 0.

    The paper weighs the error of the clean picture by min(SNR, γ). An error of the noise is SNR
    times that one, an error of the velocity SNR + 1 times.
    """
    if gamma == 0:
        return torch.ones_like(snr)
    weights = snr.clamp(max=gamma)
    return weights / (snr + 1 if prediction_type == "v_prediction" else snr)


def masked_error(predicted: Tensor, wanted: Tensor, mask: Tensor, floor: float) -> Tensor:
    """Squared error (B,), weighted by a mask (B, 1, h, w) in [0, 1], which counts `floor` at least.

    Divided by what the mask adds up to, so a small subject teaches as much as one that fills its
    picture; picture by picture, ahead of any other weight.
    """
    weights = mask.float().clamp(min=floor)
    error = (predicted.float() - wanted.float()).square().mean(dim=1, keepdim=True)
    return (error * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1e-8)
