"""ControlNets meet their thresholds; `python -m tests.evals.control` prints the figures."""

import numpy as np
import pytest
from scipy import ndimage

from tests.evals import control as control_eval
from tests.evals.control import COLOURS_KEPT, CONTROL_TYPES, HALVES, ROWS, TWICE
from tests.evals.control_measures import edge_agreement, overlap
from tests.evals.harness import Harness

FEWER = 3  # of the report's 16 seeds
STEPS = {"num_inference_steps": 8}
QUICK = [
    pytest.param(
        model,
        control_type,
        marks=() if model == "sdxl" or control_type is CONTROL_TYPES[0] else pytest.mark.slow,
        id=f"{model}-{control_type.name}",
    )
    for model, control_type in ROWS
]


@pytest.fixture(scope="module")
def harness(engine, tmp_path_factory) -> Harness:
    return Harness(engine, tmp_path_factory.mktemp("harness"))


@pytest.mark.parametrize(("model", "control_type"), QUICK)
def test_images_follow_their_controls(harness, tmp_path, model, control_type):
    found = control_eval.measure(harness, tmp_path, model, control_type, FEWER, **STEPS)
    assert found.score >= control_type.threshold - 0.05  # of few seeds and steps
    assert not control_type.doubles or found.score >= TWICE * found.without
    assert found.colours >= COLOURS_KEPT - 1 / FEWER


@pytest.mark.slow
@pytest.mark.parametrize(("model", "control_type"), ROWS, ids=[f"{m}-{k.name}" for m, k in ROWS])
def test_images_follow_their_controls_with_all_seeds(harness, tmp_path, model, control_type):
    assert control_eval.meets(
        control_type, control_eval.measure(harness, tmp_path, model, control_type)
    )


@pytest.mark.parametrize("model", control_eval.FEW_STEPS)
def test_images_of_few_steps_follow_edges(harness, tmp_path, model):
    found = control_eval.measure(harness, tmp_path, model, CONTROL_TYPES[0], FEWER)
    assert found.score >= max(control_eval.FEW_STEPS_THRESHOLD, TWICE * found.without)


@pytest.mark.parametrize("mode", control_eval.MODES)
def test_images_that_start_from_one_follow_edges(harness, tmp_path, mode):
    score, without = control_eval.measure_mode(
        harness, tmp_path, mode, CONTROL_TYPES[0], FEWER, **STEPS
    )
    assert score >= max(CONTROL_TYPES[0].threshold - 0.05, TWICE * without)


@pytest.mark.parametrize("model", ["sdxl", "sd15"])
def test_images_follow_two_controls(harness, tmp_path, model):
    halves = control_eval.measure_halves(harness, tmp_path, model, FEWER, **STEPS)
    assert min(halves.edges, halves.segments) >= HALVES
    assert halves.edges >= TWICE * halves.without[0]


# The measures


def square(left: int) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[20:40, left : left + 20] = True
    return mask


def test_edges_agree_within_two_pixels():
    outline = square(20) & ~ndimage.binary_erosion(square(20))
    assert edge_agreement(outline, outline) == 1
    for shift, low, high in ((2, 0.99, 1), (6, 0, 0.75)):
        assert low <= edge_agreement(np.roll(outline, shift, axis=1), outline) <= high
    assert edge_agreement(np.zeros_like(outline), outline) == 0
    assert edge_agreement(np.zeros_like(outline), np.zeros_like(outline)) == 1


def test_overlap_is_intersection_over_union():
    assert overlap(square(20), square(20)) == 1
    assert overlap(square(0), square(40)) == 0
    assert overlap(square(20), square(30)) == pytest.approx(1 / 3)


def test_cases_are_the_same_at_each_call_and_have_other_colours():
    for control_type in CONTROL_TYPES:
        first, second = control_eval.cases(control_type), control_eval.cases(control_type)
        assert first == second
        assert all(c.subject.scene.shape in control_type.shapes for c in first)
        same = [c.subject.scene.colour == c.colour for c in first]
        assert np.mean(same) < 0.5 or control_type.has_colours
