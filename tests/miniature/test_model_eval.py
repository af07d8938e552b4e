"""The models meet their thresholds; `python -m tests.evals.model` prints the figures."""

import functools
from collections.abc import Callable

import pytest

from generation.base_models import GuidanceMode
from tests.evals import model as model_eval
from tests.evals.harness import Harness
from tests.evals.model import (
    ATTRIBUTES,
    CLEARLY,
    LCM,
    MODELS,
    SCORES,
    TEACHERS,
    TURBO,
    generate,
)
from weights.miniature.evaluate import shares

MANY_STEPS, FEW_STEPS = 8, 24  # of the 64 captions, where images take many steps or few
CHANCE = 1 / 16  # by which a share of so few may be lower


@pytest.fixture(scope="module")
def harness(engine, tmp_path_factory) -> Harness:
    return Harness(engine, tmp_path_factory.mktemp("harness"))


@pytest.mark.parametrize("name", SCORES)
def test_models_of_many_steps_meet_the_thresholds(harness, name):
    found = shares(generate(harness, name, MANY_STEPS))
    assert all(
        found[attribute] >= threshold - CHANCE for attribute, threshold in ATTRIBUTES.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
def test_models_of_many_steps_meet_the_thresholds_with_all_captions(harness, name):
    found = shares(generate(harness, name))
    assert all(found[attribute] >= threshold for attribute, threshold in ATTRIBUTES.items())
    assert found["all"] == pytest.approx(SCORES[name], abs=0.02)


@pytest.fixture(scope="module")
def few_steps(harness) -> Callable[[str], float]:
    """Return the score of a distilled model: the share of captions that are right in all."""
    return functools.cache(lambda name: shares(generate(harness, name, FEW_STEPS))["all"])


@pytest.mark.parametrize(("name", "teacher"), TEACHERS.items())
def test_models_of_few_steps_draw_nearly_as_well_as_their_teachers(few_steps, name, teacher):
    threshold = TURBO if MODELS[name].guidance is GuidanceMode.NONE else LCM
    assert few_steps(name) >= threshold * SCORES[teacher]


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_without_lcm_four_steps_are_too_few(harness, few_steps, name):
    plain = shares(generate(harness, name, FEW_STEPS, scheduler="K_EULER", num_inference_steps=4))[
        "all"
    ]
    assert plain <= few_steps(f"{name}-lcm") - CLEARLY


@pytest.mark.parametrize("name", MODELS)
def test_input_images_are_changed_as_described(harness, name):
    assert model_eval.image_to_image(harness, name, count=3, steps=10).right >= 0.6
    assert model_eval.inpainting(harness, name, count=3, steps=10).right >= 0.6
