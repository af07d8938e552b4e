"""DPM-Solver++ (SDE) whose noise is the same on every device.

The stock one draws on the device, so a seed's picture on a GPU is not its picture on a CPU.
"""

from typing import Any

import torch
from diffusers import DPMSolverSDEScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

from generation.noise import moved


class SeededSDEScheduler(DPMSolverSDEScheduler):  # type: ignore[misc]
    """With one Brownian motion for each picture, from its own seed, drawn on the CPU in fp32."""

    noise_sampler: Any  # (sigma, sigma after) → (N, 4, h, w)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> Any:  # noqa: ANN401
        """As the stock one's."""
        if self.noise_sampler is None:
            levels = self.sigmas[self.sigmas > 0]
            draw = BrownianTreeNoiseSampler(
                torch.zeros(sample.shape),  # it wants to know the shape
                levels.min().item(),
                levels.max().item(),
                self.noise_sampler_seed,
            )
            self.noise_sampler = lambda sigma, after: moved(
                draw(sigma.cpu(), after.cpu()).to(sample.dtype), sample.device
            )
        return super().step(model_output, timestep, sample, return_dict, s_noise)
