"""The models keep their bars; `python -m tests.miniature.model_bars` prints the figures."""

import functools
from collections.abc import Callable

import pytest

from generation.base_models import GuidanceMode
from tests.miniature import model_bars
from tests.miniature.mode_bars import Bench
from tests.miniature.model_bars import (
    ATTRIBUTES,
    CLEARLY,
    LCM,
    MODELS,
    SCORES,
    TEACHERS,
    TURBO,
    draw,
)
from weights.miniature.evaluate import shares

MANY_STEPS, FEW_STEPS = 8, 24  # of the 64 captions, where pictures take many steps or few
CHANCE = 1 / 16  # by which a share of so few may be lower


@pytest.fixture(scope="module")
def bench(engine, tmp_path_factory) -> Bench:
    return Bench(engine, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", SCORES)
def test_models_of_many_steps_meet_the_bar(bench, name):
    found = shares(draw(bench, name, MANY_STEPS))
    assert all(found[attribute] >= bar - CHANCE for attribute, bar in ATTRIBUTES.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_models_of_many_steps_meet_the_bar_with_all_captions(bench, name):
    found = shares(draw(bench, name))
    assert all(found[attribute] >= bar for attribute, bar in ATTRIBUTES.items())
    assert found["all"] == pytest.approx(SCORES[name], abs=0.02)


@pytest.fixture(scope="module")
def few_steps(bench) -> Callable[[str], float]:
    """The score of a model of few steps: the share of captions that are right in all."""
    return functools.cache(lambda name: shares(draw(bench, name, FEW_STEPS))["all"])


@pytest.mark.parametrize(("name", "teacher"), TEACHERS.items())
def test_models_of_few_steps_draw_nearly_as_well_as_their_teachers(few_steps, name, teacher):
    bar = TURBO if MODELS[name].guidance is GuidanceMode.NONE else LCM
    assert few_steps(name) >= bar * SCORES[teacher]


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_without_lcm_four_steps_are_too_few(bench, few_steps, name):
    plain = shares(draw(bench, name, FEW_STEPS, scheduler="K_EULER", num_inference_steps=4))["all"]
    assert plain <= few_steps(f"{name}-lcm") - CLEARLY


@pytest.mark.parametrize("name", MODELS)
def test_pictures_that_are_sent_are_changed_as_asked(bench, name):
    assert model_bars.image_to_image(bench, name, count=3, steps=10).right >= 0.6
    assert model_bars.inpainting(bench, name, count=3, steps=10).right >= 0.6
