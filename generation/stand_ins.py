"""What stands in for a model's UNet during one denoising pass.

diffusers' pipelines call their UNet once a step. What a request wants done differently there is put
around the UNet's own forward pass, one layer around the other, and the pipeline is given an object
that calls the outermost: nothing is changed on the shared UNet, and a cancelled call leaves nothing
behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

Forward = Callable[..., tuple[torch.Tensor, ...]]  # (sample, timestep, **the UNet's others)


class Progress:
    """Where in its schedule a pass is."""

    def __init__(self, scheduler: SchedulerMixin, skipped_steps: int, step: int = 0) -> None:
        """`scheduler` is the pass's own; it leaves out `skipped_steps`, and begins at `step`."""
        self._scheduler, self._skipped = scheduler, skipped_steps
        self.step = step  # that begins, from 0

    @property
    def steps(self) -> int:
        """How many there are, once the scheduler has its timesteps."""
        scheduler = self._scheduler
        steps: int = len(scheduler.timesteps) - self._skipped * scheduler.order
        return steps

    def between(self, start: float, end: float) -> bool:
        """Whether the step is in [start, end], shares of the steps, as diffusers decides it."""
        return start <= self.step / self.steps and (self.step + 1) / self.steps <= end


@contextmanager
def given(pipeline: DiffusionPipeline, forward: Forward, progress: Progress) -> Iterator[None]:
    """A UNet that passes `forward`: another object around the same modules.

    `forward` is given timesteps on its sample's device, and `progress` goes on after each call.
    Timesteps come from the CPU (`host_schedule`). As what they are, numbers, they go to a GPU with
    the operation that takes them; copying one as a tensor would wait for all that went before. All
    are fp32, as UNets make them anyway, so that schedulers of whole timesteps need no other pass.
    """
    unet = pipeline.unet
    twin = copy.copy(unet)

    def call(sample: torch.Tensor, timestep: torch.Tensor, **others: object) -> Any:  # noqa: ANN401
        here = torch.full((), timestep.item(), dtype=torch.float32, device=sample.device)
        predicted = forward(sample, here, **others)
        progress.step += 1
        return predicted

    twin.forward = call
    pipeline.unet = twin
    try:
        yield
    finally:
        pipeline.unet = unet


def guided_between(forward: Forward, start: float, end: float, progress: Progress) -> Forward:
    """Guidance (arXiv:2207.12598) in a part of the steps only (arXiv:2404.07724).

    The pipeline sends 2 N rows at each step, first without the prompt and then with it. Outside of
    [start, end], in shares of the steps, the first half is not computed: the second is given out in
    its place too, and whatever weighs their difference comes to nothing.
    """

    def call(sample: torch.Tensor, timestep: torch.Tensor, **others: object) -> Any:  # noqa: ANN401
        if progress.between(start, end):
            return forward(sample, timestep, **others)
        (predicted,) = forward(sample.chunk(2)[1], timestep, **_second_half(others))
        return (torch.cat([predicted, predicted]),)

    return call


def _second_half(others: dict[str, Any]) -> dict[str, Any]:
    """What a UNet is told by name, for the rows with the prompt."""

    def half(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, torch.Tensor):
            return value.chunk(2)[1]
        if isinstance(value, dict):
            return {name: half(inner) for name, inner in value.items()}
        return value

    halves: dict[str, Any] = half(others)
    return halves
