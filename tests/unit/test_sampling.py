"""The sampling loop's parts, against diffusers: timesteps, noise levels, masks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from generation.sampling import (
    KnownLatents,
    build_scheduler,
    denoise,
    initial_latents,
    noised,
    refiner_cutoff,
    select_timesteps,
)
from generation.schedulers import SCHEDULERS, ScheduleType
from models.loading import read_scheduler_config
from weights.miniature.evaluate import FOLDER

CONFIG = read_scheduler_config(FOLDER)
ORDERS = ["K_EULER", "DDIM", "HeunDiscrete", "DPM2 a"]  # of first order, then of second
STRENGTHS = [1.0, 0.8, 0.55, 0.35]
SHAPE = (2, 4, 8, 8)


def build(name: str):
    return build_scheduler(name, ScheduleType.AUTOMATIC, CONFIG)


def reference_timesteps(scheduler, steps: int, strength: float, denoising_start=None):
    """Return those of diffusers' image-to-image pipeline for a scheduler that is set."""
    pipeline = SimpleNamespace(scheduler=scheduler)
    arguments = (steps, strength, "cpu", denoising_start)
    return StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, *arguments)[0]


def randn(seed: int):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


# Timesteps


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("steps", [3, 8, 25])
@pytest.mark.parametrize("name", ORDERS)
def test_timesteps_of_a_strength_are_diffusers(name, steps, strength):
    scheduler, stock = build(name), build(name)
    timesteps = select_timesteps(scheduler, steps, strength)
    stock.set_timesteps(steps)
    assert torch.equal(timesteps.scheduled, stock.timesteps)
    assert torch.equal(timesteps.sampled, reference_timesteps(stock, steps, strength))
    assert timesteps.begin == len(stock.timesteps) - len(timesteps.sampled)


@pytest.mark.parametrize("high_noise_frac", [0.3, 0.4, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("steps", [5, 10, 25])
@pytest.mark.parametrize("name", ORDERS)
def test_an_ensemble_divides_the_timesteps_as_diffusers(name, steps, high_noise_frac):
    scheduler, stock = build(name), build(name)
    timesteps = select_timesteps(scheduler, steps)
    stock.set_timesteps(steps)
    cutoff = refiner_cutoff(timesteps, high_noise_frac, 1000)
    # StableDiffusionXLPipeline.__call__, "Apply denoising_end"
    limit = round(1000 - high_noise_frac * 1000)
    assert torch.equal(timesteps.until(cutoff).sampled, stock.timesteps[stock.timesteps >= limit])
    refined = timesteps.below(cutoff, scheduler.order)
    assert torch.equal(refined.sampled, reference_timesteps(stock, steps, 1, high_noise_frac))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", ORDERS)
def test_base_and_refiner_share_the_timesteps_of_a_strength(name, strength):
    scheduler = build(name)
    timesteps = select_timesteps(scheduler, 20, strength)
    cutoff = refiner_cutoff(timesteps, 0.8, 1000)
    base, refined = timesteps.until(cutoff), timesteps.below(cutoff, scheduler.order)
    assert base.begin == timesteps.begin
    assert 0 <= base.end - refined.begin <= scheduler.order - 1  # a whole step of second order
    assert refined.end == timesteps.end
    assert refined.preceding == refined.begin - timesteps.begin


def test_a_step_is_followed_by_the_next_of_the_schedule_to_its_end():
    timesteps = select_timesteps(build("K_EULER"), 4).until(500)
    assert timesteps.after(0) == timesteps.scheduled[1]
    last = len(timesteps.sampled) - 1
    assert timesteps.after(last) == timesteps.scheduled[last + 1]  # the refiner's first
    assert replace(timesteps, end=4).after(3) is None


@pytest.mark.parametrize("name", ORDERS)
def test_the_base_model_makes_the_first_step(name):
    timesteps = select_timesteps(build(name), 10, 0.4)
    cutoff = refiner_cutoff(timesteps, 0.0, 1000)
    assert cutoff <= timesteps.sampled[0] < 1000
    assert len(timesteps.until(cutoff).sampled) >= 1


def test_a_refiner_without_a_step_has_no_effect(capsys):
    assert refiner_cutoff(select_timesteps(build("K_EULER"), 10), 1.0, 1000) is None
    assert "refine has no effect" in capsys.readouterr().out


# Noise levels


def after_steps(name: str, steps: int, begin_strength: float = 0.8):
    """Return a scheduler and its timesteps after so many steps."""
    scheduler = build(name)
    timesteps = select_timesteps(scheduler, 8, begin_strength)
    sample = initial_latents(scheduler, timesteps, randn(1), randn(2), (1, 2))
    for t in timesteps.sampled[:steps]:
        sample = scheduler.step(0.1 * scheduler.scale_model_input(sample, t), t, sample)[0]
    return scheduler, timesteps


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_added_as_by_every_scheduler(name, steps):
    """At its first timestep, and during inpainting after steps."""
    scheduler, timesteps = after_steps(name, steps)
    level = timesteps.sampled[steps]
    ours = noised(scheduler, randn(3), randn(4), level)
    assert torch.equal(ours, scheduler.add_noise(randn(3), randn(4), level.repeat(2)))
    assert (ours - randn(3)).abs().max() > 0.1


def test_after_the_last_step_nothing_is_added():
    scheduler, timesteps = after_steps("K_EULER", 6)
    known = randn(3)
    assert timesteps.after(5) is None
    assert noised(scheduler, known, randn(4), timesteps.after(5)) is known


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_starts_from_noise_of_the_schedulers_scale(name):
    scheduler, stock = build(name), build(name)
    timesteps = select_timesteps(scheduler, 8)
    stock.set_timesteps(8)
    sample = initial_latents(scheduler, timesteps, randn(1), None, (1, 2))
    assert torch.equal(sample, randn(1) * stock.init_noise_sigma)


# Inpainting


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50])
def test_a_grey_mask_may_change_in_its_share_of_the_steps_the_last_ones(steps):
    shares = torch.arange(steps + 1).reshape(1, 1, 1, -1) / steps
    known = KnownLatents(torch.zeros(1), torch.zeros(1), shares)
    editable = torch.cat([known.editable(step, steps) for step in range(steps)])  # (steps, ...)
    counts = editable.sum(dim=0).flatten()
    assert counts.tolist() == list(range(steps + 1))
    assert (editable[1:] >= editable[:-1]).all()


@pytest.mark.parametrize("name", ["K_EULER", "HeunDiscrete", "DDIM", "PNDM"])
def test_outside_the_mask_latents_follow_the_image(name):
    scheduler = build(name)
    timesteps = select_timesteps(scheduler, 6, 0.7)
    init, noise = randn(1), randn(2)
    change = torch.zeros(1, 1, 8, 8)
    change[..., :4] = 1
    known = KnownLatents(init, noise, change)
    samples = []

    def denoiser(scaled, t, before, after):
        samples.append(scaled)
        return torch.full(SHAPE, 0.5)

    sample = initial_latents(scheduler, timesteps, noise, init, (1, 2))
    result = denoise(denoiser, scheduler, timesteps, generators(), sample, known)
    assert torch.equal(result[..., 4:], init[..., 4:])
    assert (result[..., :4] - init[..., :4]).abs().min() > 0
    stock = build(name)
    stock.set_timesteps(6)
    expected = stock.scale_model_input(
        stock.add_noise(init, noise, timesteps.sampled[1].repeat(2)), timesteps.sampled[1]
    )
    torch.testing.assert_close(samples[1][..., 4:], expected[..., 4:])
