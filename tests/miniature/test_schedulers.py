"""Schedulers are built from the model's config, whatever ran before, and all generate images."""

import functools
import inspect
import itertools
import json

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

from generation.errors import InvalidRequest
from generation.sampling import build_scheduler, initial_latents, select_timesteps
from generation.schedulers import SCHEDULERS, ScheduleType
from tests.helpers.comparison import max_difference
from tests.miniature.reference_pipelines import DISTINCT, REFERENCE_SCHEDULERS, load_reference
from weights.miniature.evaluate import FOLDER
from weights.miniature.world import Expectation, judge

CONFIG = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
AUTOMATIC, KARRAS = ScheduleType.AUTOMATIC, ScheduleType.KARRAS
EVERY = [
    (name, schedule_type)
    for name, spec in SCHEDULERS.items()
    for schedule_type in spec.schedule_types
]
DIFFERENT = [(name, schedule_type) for name, schedule_type in EVERY if name in DISTINCT]
# Of the spacings, which only change a config, those of a scheduler of several steps and of one of
# second order stand for the others.
COMPARED = [
    pytest.param(
        name,
        schedule_type,
        marks=()
        if schedule_type is ScheduleType.AUTOMATIC or name in ("DPM++ 2M", "Heun")
        else pytest.mark.slow,
    )
    for name, schedule_type in DIFFERENT
]
SETTINGS = {"prompt": "a large red circle on a blue background", "seed": 5}
SMALL = {"width": 64, "height": 64, "num_inference_steps": 4}
SPACED = {
    "automatic": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}


def test_the_first_names_are_cog_sdxls():
    names = "DDIM DPMSolverMultistep HeunDiscrete KarrasDPM K_EULER_ANCESTRAL K_EULER PNDM"
    assert list(SCHEDULERS)[:7] == names.split()
    assert set(REFERENCE_SCHEDULERS) == set(SCHEDULERS)
    assert set(SPACED) == set(ScheduleType)


@functools.cache
def reference_scheduler(name, schedule_type):
    """Make diffusers' scheduler once: some take half a second."""
    scheduler_class, overrides = REFERENCE_SCHEDULERS[name]
    return scheduler_class.from_config(CONFIG, **overrides, **SPACED[schedule_type])


# To make DPM2 takes half a second.
CONFIGURED = [
    pytest.param(
        name,
        schedule_type,
        marks=pytest.mark.slow
        if name.startswith("DPM2") and schedule_type is not AUTOMATIC
        else (),
    )
    for name, schedule_type in EVERY
]


@pytest.mark.parametrize(("name", "schedule_type"), CONFIGURED)
def test_a_scheduler_has_the_models_config_and_its_overrides(name, schedule_type):
    scheduler = build_scheduler(name, schedule_type, CONFIG)
    scheduler_class, _ = REFERENCE_SCHEDULERS[name]
    assert isinstance(scheduler, scheduler_class)
    wanted = reference_scheduler(name, schedule_type).config
    # Without what that class does not know, of which diffusers would warn.
    known = inspect.signature(scheduler_class.__init__).parameters.keys() - {"noise_sampler_seed"}
    assert {k: v for k, v in scheduler.config.items() if k in known} == {
        k: v for k, v in wanted.items() if k in known
    }
    assert scheduler.config.beta_end == CONFIG["beta_end"]


def test_nothing_of_one_scheduler_reaches_the_next():
    before = json.dumps(CONFIG)
    build_scheduler("KarrasDPM", AUTOMATIC, CONFIG).set_timesteps(10)
    after = build_scheduler("DPMSolverMultistep", AUTOMATIC, CONFIG)
    assert after.config.use_karras_sigmas is False
    assert json.dumps(CONFIG) == before


@pytest.fixture(scope="module")
def stock():
    return load_reference()


@pytest.mark.parametrize(("name", "schedule_type"), COMPARED)
def test_equal_to_the_stock_pipeline(stock, make, name, schedule_type):
    stock.scheduler = reference_scheduler(name, schedule_type)
    latents = stock(
        prompt=SETTINGS["prompt"],
        negative_prompt="",
        num_inference_steps=5,
        guidance_scale=1.0,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="latent",
    ).images
    settings = {**SETTINGS, **SMALL, "num_inference_steps": 5, "guidance_scale": 1.0}
    ours = make(**settings, scheduler=name, schedule_type=schedule_type).latents
    assert torch.allclose(ours, latents, atol=1e-4, rtol=0)


FEW = {"LCM", "TCD"}  # made for models that were distilled; this one is not
# One of each kind: ancestral, of second order, of several steps, with noise of several steps. All
# are compared with stock's above, and with every spacing.
KINDS = {"Euler a", "Heun", "DPM++ 2M", "DPM++ SDE"}
DRAWN = [
    pytest.param(
        name,
        schedule_type,
        marks=() if name in KINDS and schedule_type is AUTOMATIC else pytest.mark.slow,
    )
    for name, schedule_type in DIFFERENT
    if name not in FEW
]


@pytest.mark.parametrize(("name", "schedule_type"), DRAWN)
def test_every_scheduler_generates_what_the_prompt_describes(make, name, schedule_type):
    # With levels spaced by sigma this one is wrong in half of the cases after 20 steps.
    steps = 40 if name == "DPM2 a" and schedule_type is not AUTOMATIC else 20
    made = make(**SETTINGS, num_inference_steps=steps, scheduler=name, schedule_type=schedule_type)
    assert judge(made.images[0], Expectation("circle", "red", "blue")).all_right


STOCHASTIC = [
    "K_EULER_ANCESTRAL",
    "DPM2 a",
    "DPM++ 2M SDE",
    "DPM++ SDE",
    "DPM++ 2S a",
    "LCM",
    "TCD",
]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_between_steps_depends_on_each_images_seed(make, name):
    """The second of a batch is as it is alone, with the seed after the first's."""
    settings = {**SETTINGS, **SMALL, "scheduler": name}
    both = make(**settings, num_outputs=2)
    second = {**settings, "seed": 6}
    alone = make(**second)
    # Rounding grows with the latents, which DPM2 a's few steps take to 15.
    scale = alone.latents.abs().max()
    assert (both.latents[1] - alone.latents[0]).abs().max() < 3e-5 * scale
    assert (both.latents[0] - both.latents[1]).abs().max() > 0.1
    assert make(**second).bytes == alone.bytes


def test_stochastic_noise_is_drawn_on_the_cpu_in_fp32():
    """It is the same on every device, and that of a request's seeds."""
    drawn = []
    for device in ("cpu", "meta"):
        scheduler = build_scheduler("DPM++ SDE", AUTOMATIC, CONFIG)
        timesteps = select_timesteps(scheduler, 4)
        initial_latents(scheduler, timesteps, torch.zeros(2, 4, 8, 8, device=device), None, [3, 4])
        levels = scheduler.sigmas[0], scheduler.sigmas[1]
        drawn.append(scheduler.noise_sampler(*levels))
    sigmas = scheduler.sigmas[scheduler.sigmas > 0]
    on_cpu = BrownianTreeNoiseSampler(
        torch.zeros(2, 4, 8, 8), sigmas.min().item(), sigmas.max().item(), [3, 4]
    )
    assert torch.equal(drawn[0], on_cpu(*levels))
    assert [noise.device.type for noise in drawn] == ["cpu", "meta"]
    assert all(noise.dtype is torch.float32 for noise in drawn)


def test_a_schedule_type_changes_the_image_and_is_recorded(make):
    made = {
        schedule_type: make(
            **SETTINGS,
            **SMALL,
            scheduler="DPM++ 2M",
            schedule_type=schedule_type,
            embed_parameters=True,
        )
        for schedule_type in ScheduleType
    }
    images = [m.images[0] for m in made.values()]
    assert all(max_difference(*pair) > 1 for pair in itertools.combinations(images, 2))
    assert "Sampler: DPM++ 2M Karras," in made[KARRAS].images[0].info["parameters"]


def test_invalid_requests_are_rejected(make):
    with pytest.raises(
        InvalidRequest,
        match="schedule_type is karras, and scheduler DDIM has only automatic, sgm_uniform; use",
    ):
        make(scheduler="DDIM", schedule_type="karras")
    with pytest.raises(InvalidRequest, match="schedule_type 'beta' is not known; choose one of au"):
        make(schedule_type="beta")
    with pytest.raises(InvalidRequest, match="num_inference_steps is 51, and scheduler LCM has at"):
        make(scheduler="LCM", num_inference_steps=51)
    with pytest.raises(
        InvalidRequest, match="refine_steps is 51, and scheduler LCM has at most 50"
    ):
        make(scheduler="LCM", refine="base_image_refiner", refine_steps=51)
