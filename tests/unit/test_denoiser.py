"""The denoising loop and its denoiser: progress, noise by image, guidance, precision, copies."""

from types import SimpleNamespace

import pytest
import torch

from generation import latents as latents_module
from generation.conditioning import Conditioning
from generation.latents import NonBlockingCopies
from generation.sampling import (
    CFGDenoiser,
    GuidanceInterval,
    denoise,
    initial_latents,
    refiner_cutoff,
    select_timesteps,
)
from tests.unit.test_sampling import ORDERS, build, generators, randn


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
        components=SimpleNamespace(unet=forward),
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
