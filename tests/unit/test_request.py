"""Every rule about a request, and what is filled in where it leaves a value open."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.base_models import BASE_MODELS, MINIATURE_SDXL, SDXL
from generation.errors import InvalidRequest
from generation.request import (
    SIDE_MULTIPLE,
    GenerationRequest,
    Mode,
    nearest_valid_size,
    resolve,
)
from generation.schedulers import SCHEDULERS

REQUEST = GenerationRequest(
    prompt="a red circle",
    negative_prompt="",
    width=None,
    height=None,
    num_outputs=1,
    scheduler=None,
    num_inference_steps=None,
    guidance_scale=None,
    seed=7,
)


def test_open_values_take_the_models_own():
    plan = resolve(REQUEST, SDXL)
    assert (plan.width, plan.height) == (1024, 1024)
    assert (plan.scheduler, plan.num_inference_steps, plan.guidance_scale) == ("K_EULER", 50, 7.5)
    assert plan.mode is Mode.TXT2IMG
    small = resolve(REQUEST, MINIATURE_SDXL)
    assert (small.width, small.height, small.num_inference_steps) == (128, 128, 20)


def test_given_values_are_kept():
    asked = replace(
        REQUEST,
        width=512,
        height=768,
        scheduler="DDIM",
        num_inference_steps=3,
        guidance_scale=0.0,
        num_outputs=2,
    )
    plan = resolve(asked, SDXL)
    assert (plan.width, plan.height, plan.scheduler) == (512, 768, "DDIM")
    assert (plan.num_inference_steps, plan.guidance_scale, len(plan.seeds)) == (3, 0.0, 2)


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1, False), (1.01, True), (50, True)])
def test_guidance_of_one_or_less_runs_no_second_pass(scale, guided):
    assert resolve(replace(REQUEST, guidance_scale=scale), SDXL).guided is guided


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"scheduler": "EULER"}, ["'EULER'", "K_EULER", "PNDM"]),
        ({"num_outputs": 0}, ["num_outputs is 0", "from 1 to 4"]),
        ({"num_outputs": 5}, ["num_outputs is 5", "from 1 to 4"]),
        ({"num_inference_steps": 0}, ["num_inference_steps is 0", "from 1 to 500"]),
        ({"num_inference_steps": 501}, ["num_inference_steps is 501", "from 1 to 500"]),
        ({"guidance_scale": -0.1}, ["guidance_scale is -0.1", "from 0 to 50"]),
        ({"guidance_scale": math.nan}, ["guidance_scale is nan", "from 0 to 50"]),
        ({"seed": -1}, ["seed is -1", "from 0 to 4294967295"]),
        ({"seed": 2**32}, ["seed is 4294967296", "from 0 to 4294967295"]),
        ({"width": 1020}, ["width=1020", "multiple of 8", "width=1024 height=1024"]),
        ({"height": 100}, ["height=100", "from 256 to 2048", "width=1024 height=256"]),
        ({"width": 5000}, ["width=5000", "width=2048 height=1024"]),
        ({"width": 2048, "height": 2048}, ["2359296 pixels", "width=1536 height=1536"]),
    ],
)
def test_a_broken_rule_names_value_rule_and_remedy(change, fragments):
    with pytest.raises(InvalidRequest) as raised:
        resolve(replace(REQUEST, **change), SDXL)
    for fragment in fragments:
        assert fragment in str(raised.value)


@given(st.integers(-100, 10000), st.integers(-100, 10000), st.sampled_from([SDXL, MINIATURE_SDXL]))
def test_the_nearest_size_is_valid_and_is_itself_its_nearest(width, height, spec):
    w, h = nearest_valid_size(width, height, spec)
    for side in (w, h):
        assert side % SIDE_MULTIPLE == 0
        assert spec.min_side <= side <= spec.max_side
    assert w * h <= spec.max_pixels
    assert nearest_valid_size(w, h, spec) == (w, h)


def test_the_nearest_size_keeps_the_aspect_ratio_when_the_area_is_too_large():
    w, h = nearest_valid_size(2048, 1536, SDXL)
    assert w / h == pytest.approx(2048 / 1536, rel=0.01)


def test_picture_k_has_seed_plus_k_and_wraps_at_32_bits():
    assert resolve(replace(REQUEST, num_outputs=3), SDXL).seeds == (7, 8, 9)
    last = replace(REQUEST, seed=2**32 - 1, num_outputs=2)
    assert resolve(last, SDXL).seeds == (2**32 - 1, 0)


def test_an_open_seed_is_drawn_from_all_32_bits():
    seeds = {resolve(replace(REQUEST, seed=None), SDXL).seeds[0] for _ in range(200)}
    assert len(seeds) == 200
    assert max(seeds) > 2**31


def test_the_defaults_of_every_model_are_valid():
    for models in BASE_MODELS.values():
        for name, spec in models.items():
            assert spec.name == name
            assert spec.scheduler in SCHEDULERS
            resolve(REQUEST, spec)
