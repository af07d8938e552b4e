"""Schedulers come from the pristine config, whatever ran before; and every one of them draws."""

import inspect
import itertools
import json

import diffusers
import pytest
import torch

from generation.errors import InvalidRequest
from generation.schedulers import SCHEDULERS, ScheduleType, a1111_name, build_scheduler
from generation.sde import SeededSDEScheduler
from tests.comparison import max_difference
from tests.miniature.stock import DISTINCT, STOCK
from weights.miniature.evaluate import FOLDER, load_pipeline
from weights.miniature.world import Expectation, judge

CONFIG = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
AUTOMATIC, KARRAS = ScheduleType.AUTOMATIC, ScheduleType.KARRAS
EVERY = [(name, kind) for name, spec in SCHEDULERS.items() for kind in spec.schedule_types]
UNLIKE = [(name, kind) for name, kind in EVERY if name in DISTINCT]
ASKED = {"prompt": "a large red circle on a blue background", "seed": 5}
SPACED = {
    "automatic": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "sgm_uniform": {"timestep_spacing": "trailing"},
}


def test_the_first_names_are_cog_sdxls():
    names = "DDIM DPMSolverMultistep HeunDiscrete KarrasDPM K_EULER_ANCESTRAL K_EULER PNDM"
    assert list(SCHEDULERS)[:7] == names.split()
    assert set(STOCK) == set(SCHEDULERS)
    assert set(SPACED) == set(ScheduleType)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_scheduler_has_the_models_config_and_its_own_overrides(name, kind):
    scheduler = build_scheduler(name, kind, CONFIG, [1])
    scheduler_class, overrides = STOCK[name]
    assert isinstance(scheduler, scheduler_class)
    wanted = scheduler_class.from_config(CONFIG, **overrides, **SPACED[kind]).config
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
    return load_pipeline(FOLDER)


@pytest.mark.parametrize(("name", "kind"), UNLIKE)
def test_equal_to_the_stock_pipeline(stock, make, name, kind):
    scheduler_class, overrides = STOCK[name]
    pristine = diffusers.EulerDiscreteScheduler.load_config(FOLDER / "scheduler")
    stock.scheduler = scheduler_class.from_config(pristine, **overrides, **SPACED[kind])
    latents = stock(
        prompt=ASKED["prompt"],
        negative_prompt="",
        num_inference_steps=5,
        guidance_scale=1.0,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(5),
        output_type="latent",
    ).images
    asked = {**ASKED, "num_inference_steps": 5, "guidance_scale": 1.0, "height": 64, "width": 64}
    ours = make(**asked, scheduler=name, schedule_type=kind).latents
    assert torch.allclose(ours, latents, atol=1e-4, rtol=0)


FEW = {"LCM", "TCD"}  # made for models that were distilled; this one is not
DRAWN = [
    # With other spacings they are compared with stock's.
    pytest.param(name, kind, marks=() if kind is AUTOMATIC else pytest.mark.slow)
    for name, kind in UNLIKE
    if name not in FEW
]


@pytest.mark.parametrize(("name", "kind"), DRAWN)
def test_every_scheduler_draws_what_was_asked(make, name, kind):
    # With levels spaced by sigma this one is wrong in half of the cases after 20 steps.
    steps = 40 if name == "DPM2 a" and kind is not AUTOMATIC else 20
    made = make(**ASKED, num_inference_steps=steps, scheduler=name, schedule_type=kind)
    assert judge(made.pictures[0], Expectation("circle", "red", "blue")).all_right


DRAWING = ["K_EULER_ANCESTRAL", "DPM2 a", "DPM++ 2M SDE", "DPM++ SDE", "DPM++ 2S a", "LCM", "TCD"]


@pytest.mark.parametrize("name", DRAWING)
def test_noise_between_steps_is_each_pictures_own(make, name):
    """The second of a batch is as it is alone, with the seed after the first's."""
    asked = {**ASKED, "scheduler": name, "num_inference_steps": 5, "width": 64, "height": 64}
    both = make(**asked, num_outputs=2)
    alone = make(**{**asked, "seed": 6})
    assert (both.latents[1] - alone.latents[0]).abs().max() < 1e-4
    assert (both.latents[0] - both.latents[1]).abs().max() > 0.1
    assert make(**asked).bytes == make(**asked).bytes


def test_stochastic_noise_is_drawn_on_the_cpu_in_fp32():
    """So that it is the same whatever the device and the precision are."""
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = build_scheduler("DPM++ SDE", AUTOMATIC, CONFIG, [3, 4])
        assert isinstance(scheduler, SeededSDEScheduler)
        scheduler.set_timesteps(4)
        sample = torch.ones(2, 4, 8, 8, dtype=dtype)
        scheduler.step(torch.zeros_like(sample), scheduler.timesteps[0], sample)
        levels = scheduler.sigmas[0], scheduler.sigmas[1]
        drawn.append(scheduler.noise_sampler(*levels))
    assert drawn[1].dtype is torch.bfloat16
    assert torch.allclose(drawn[0], drawn[1].float(), atol=0.05)


def test_a_spacing_changes_the_picture_and_is_written_down(make):
    made = {
        kind: make(**ASKED, scheduler="DPM++ 2M", schedule_type=kind, embed_parameters=True)
        for kind in ScheduleType
    }
    pictures = [m.pictures[0] for m in made.values()]
    assert all(max_difference(*pair) > 1 for pair in itertools.combinations(pictures, 2))
    assert "Sampler: DPM++ 2M Karras," in made[KARRAS].pictures[0].info["parameters"]
    assert a1111_name("Euler a", ScheduleType.SGM_UNIFORM) == "Euler a SGM Uniform"


def test_what_is_refused(make):
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
