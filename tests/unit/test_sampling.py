"""The sampling loop's parts, against diffusers: timesteps, noise levels, masks, guidance."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from generation import latents as latents_module
from generation.conditioning import Conditioning
from generation.latents import NonBlockingCopies
from generation.sampling import (
    CFGDenoiser,
    GuidanceInterval,
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


# Denoising


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


@pytest.mark.parametrize("name", ORDERS)
def test_progress_covers_an_image_without_gaps(name):
    """Over both models of an ensemble."""
    scheduler = build(name)
    whole = select_timesteps(scheduler, 10, 0.8)
    cutoff = refiner_cutoff(whole, 0.6, 1000)
    shares = []

    def denoiser(scaled, t, before, after):
        shares.append((before, after))
        return scaled

    for part in (whole.until(cutoff), whole.below(cutoff, scheduler.order)):
        scheduler = build(name)
        select_timesteps(scheduler, 10, 0.8)
        scheduler.set_begin_index(part.begin) if hasattr(scheduler, "set_begin_index") else None
        denoise(denoiser, scheduler, part, generators(), randn(1))
    assert shares[0][0] == 0
    assert shares[-1][1] == 1
    count = len(whole.sampled)
    for before, after in shares:
        assert after - before == pytest.approx(1 / count)
    assert {round(before * count) for before, _ in shares} == set(range(count))


@pytest.mark.parametrize("name", ["K_EULER_ANCESTRAL", "DPM++ 2M SDE", "DPM++ SDE", "LCM", "TCD"])
def test_an_images_noise_is_that_which_it_has_alone(name):
    def sample(noise, drawing, seeds):
        scheduler = build(name)
        timesteps = select_timesteps(scheduler, 5)
        start = initial_latents(scheduler, timesteps, noise, None, seeds)
        return denoise(lambda x, *_: 0.1 * x, scheduler, timesteps, drawing, start)

    together = sample(randn(1), generators(), (1, 2))
    alone = sample(randn(1)[1:], generators()[1:], (2,))
    torch.testing.assert_close(together[1:], alone)


class Runner:
    """Runs a UNet's forward pass, and keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, dict[str, object]]] = []

    def run(self, name, function, sample, timestep, **arguments):
        self.calls.append((sample, arguments))
        return function(sample, timestep, **arguments)


def guided(scale: float = 3.0, start: float = 0.2, end: float = 0.8, dtype=torch.float32):
    """Return a denoiser whose UNet predicts each row's prompt, and its runner."""

    def forward(sample, timestep, encoder_hidden_states, **_):
        assert sample.dtype == dtype
        return (sample * 0 + encoder_hidden_states.reshape(-1, 1, 1, 1),)

    runner = Runner()
    model = SimpleNamespace(
        components=SimpleNamespace(unet=SimpleNamespace(forward=forward)),
        graphs=runner,
        dtype=dtype,
    )
    prompts = torch.tensor([1.0, 1.0, 2.0, 4.0]).reshape(4, 1, 1)  # two negative ones, two prompts
    conditioning = Conditioning(prompts, prompts[:, 0], prompts[:, 0])
    return CFGDenoiser(model, conditioning, GuidanceInterval(scale, start, end)), runner


def test_guidance_extrapolates_from_the_negative_prompt():
    """arXiv:2207.12598."""
    denoiser, runner = guided()
    noise_pred = denoiser(randn(1), torch.tensor(5.0), 0.5, 0.6)
    assert noise_pred[:, 0, 0, 0].tolist() == [1 + 3 * (2 - 1), 1 + 3 * (4 - 1)]
    ((sample, _),) = runner.calls
    assert torch.equal(sample, torch.cat([randn(1), randn(1)]))


@pytest.mark.parametrize(
    ("before", "after", "is_guided"),
    [(0.2, 0.3, True), (0.7, 0.8, True), (0.19, 0.29, False), (0.71, 0.81, False), (0, 1, False)],
)
def test_outside_its_interval_guidance_takes_no_second_prediction(before, after, is_guided):
    denoiser, runner = guided()
    noise_pred = denoiser(randn(1), torch.tensor(5.0), before, after)
    ((sample, arguments),) = runner.calls
    assert len(sample) == (4 if is_guided else 2)
    assert all(len(t) == len(sample) for t in arguments["added_cond_kwargs"].values())
    if not is_guided:
        assert noise_pred[:, 0, 0, 0].tolist() == [2, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_the_unets_input_is_in_half_precision(dtype):
    denoiser, _ = guided(dtype=dtype)
    scheduler = build("K_EULER")
    timesteps = select_timesteps(scheduler, 3)
    assert denoiser(randn(1), timesteps.sampled[0], 0, 1 / 3).dtype == torch.float32
    assert denoise(denoiser, scheduler, timesteps, generators(), randn(1)).dtype == torch.float32


# Copies that do not block


@pytest.fixture
def copies(monkeypatch):
    """Return what was copied without blocking."""
    found = []

    def copy(tensor, device):
        found.append((tensor, device))
        return torch.empty_like(tensor, device=device)

    monkeypatch.setattr(latents_module, "copy_to_device", copy)
    return found


META = torch.device("meta")


def test_copies_to_a_device_do_not_block_within_the_mode_alone(copies):
    tensor = torch.ones(2)
    with NonBlockingCopies():
        assert tensor.to(META).device == META
    assert len(copies) == 1
    with pytest.raises(KeyboardInterrupt), NonBlockingCopies():
        raise KeyboardInterrupt
    tensor.to(META)
    assert len(copies) == 1


def test_other_conversions_are_as_always(copies):
    with NonBlockingCopies():
        assert torch.ones(2).to(torch.float16).dtype == torch.float16
        assert torch.ones(2, device=META).to(META).device == META  # from a device
        assert torch.ones(2).to(META, torch.float16).dtype == torch.float16
        assert (torch.ones(2) + 1).tolist() == [2, 2]
    assert not copies
